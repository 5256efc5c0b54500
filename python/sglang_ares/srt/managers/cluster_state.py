"""What the controller knows: each worker's last report, who owns each request, what is moving."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import msgspec

from sglang_ares.srt.disaggregation.migration import COMPLETED, FAILED
from sglang_ares.srt.managers.attempts import split_rid
from sglang_ares.srt.managers.cluster_views import (
    CHANGING,
    READY,
    MovingRequest,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    FirstEstimates,
    Landed,
    LoadUpdate,
    Message,
    MigrationResult,
    WorkerReport,
)
from sglang_ares.srt.managers.migration_counts import MigrationCounts
from sglang_ares.srt.policy.types import DECODE, WorkerLoad

# Tokens of another host may still be on their way when its worker says that the request has ended.
# If the worker is lost within this time (s), the token ledger is asked.
_TOKENS_ON_THEIR_WAY_S = 60.0
# Requests remembered after their end.
_REMEMBERED = 1 << 16


class ClusterState:
    """The controller's tables. All times are monotonic seconds."""

    def __init__(self, workers: list[WorkerView]) -> None:
        self.workers = {w.worker_id: w for w in workers}
        self.owners: dict[str, Ownership] = {}
        self.moving: dict[int, MovingRequest] = {}
        # Rids that ended: their last attempt, should the rid be used again.
        self._last_attempts: OrderedDict[str, int] = OrderedDict()
        # Requests that ended on another host: when.
        self._ended_elsewhere: OrderedDict[str, tuple[float, Ownership]] = OrderedDict()
        # Moving requests that left their target: ended there, if they had landed at all.
        self._left_target: set[str] = set()
        # The decode worker that is kept for a request that waits for room, if one is.
        self.kept: int | None = None
        self.migrations = MigrationCounts()
        self.started_at = time.monotonic()

    def ready(self, role: str) -> list[WorkerView]:
        """The serving workers of a role, draining ones too."""
        return [w for w in self.workers.values() if w.role == role and w.state == READY]

    def serving(self) -> list[WorkerView]:
        """The ready workers of either role."""
        return [w for w in self.workers.values() if w.state == READY]

    def with_role(self, role: str) -> list[WorkerView]:
        """The workers of a role that may be given requests."""
        return [w for w in self.ready(role) if not w.draining and w.changing_to is None]

    @property
    def closed(self) -> frozenset[int]:
        """Workers that nothing is moved to for balance or memory, though they serve: what is to
        fit there must not be moved full."""
        return frozenset() if self.kept is None else frozenset({self.kept})

    def outstanding(self, view: WorkerView) -> int:
        """Requests that a worker has still to do in its role, as far as can be known here: none
        is on its way there, waits, runs or is being moved when this is 0."""
        worker_id = view.worker_id
        if view.role == DECODE:
            owned = sum(o.decode == worker_id and not o.recovering for o in self.owners.values())
            return owned + sum(worker_id in (m.source, m.target) for m in self.moving.values())
        load = view.load()
        return load.running + load.queued

    def without_output(self, worker_id: int) -> list[Ownership]:
        """Requests that were sent to a worker, for either phase, and have no output yet, as far as
        can be known here."""
        begun = {
            r.rid for view in self.ready(DECODE) for r in view.load().requests if r.output_tokens
        }
        moving = {m.rid for m in self.moving.values()}
        return [
            o
            for o in self.owners.values()
            if worker_id in (o.prefill, o.decode)
            and not (o.recovering or o.aborted)
            and o.name not in begun
            and o.name not in moving
        ]

    def operating_state(self, view: WorkerView) -> str:
        """The state an operator sees."""
        if view.state == READY and view.changing_to is not None:
            return CHANGING
        if view.state != READY or not view.draining:
            return view.state
        decode = view.role == DECODE
        holds = (
            any(o.decode == view.worker_id for o in self.owners.values())
            if decode
            else (view.load().running + view.load().queued > 0)
        )
        return "draining" if holds else "drained"

    def loads(self, role: str) -> list[WorkerLoad]:
        """The loads of a role's workers, for a policy. What is on the move counts where it goes,
        or the same gap would be closed twice."""
        moving = frozenset(m.rid for m in self.moving.values())
        loads = {
            w.worker_id: self._with_first_estimates(w.load(moving)) for w in self.with_role(role)
        }
        for move in self.moving.values():
            source, target = loads.get(move.source), loads.get(move.target)
            tokens = next(
                (r.tokens for r in (source.requests if source else ()) if r.rid == move.rid), 0
            )
            if source is not None and target is not None and tokens:
                held = max(0, source.kv_tokens - tokens)
                loads[move.source] = msgspec.structs.replace(source, kv_tokens=held)
                coming = target.queued_tokens + tokens
                loads[move.target] = msgspec.structs.replace(target, queued_tokens=coming)
        return list(loads.values())

    def _with_first_estimates(self, load: WorkerLoad) -> WorkerLoad:
        """What is left of prefill's prediction stands in where the decode worker reports none."""
        requests = []
        for request in load.requests:
            owner = self.owner_of(request.rid) if request.remaining is None else None
            if owner is not None:
                expected = owner.expected_after(request.output_tokens)
                request = msgspec.structs.replace(request, remaining=expected)
            requests.append(request)
        return msgspec.structs.replace(load, requests=tuple(requests))

    def new_owner(self, rid: str, request: Any) -> Ownership:
        """A request that is to be dispatched. Under a rid that was used before, attempts go on
        counting, so that no leftover of the earlier request is taken for this one's. The earlier
        one has ended for its client, or the front would not have taken the rid, whether its worker
        has said so or not."""
        self.forget(rid)
        self._ended_elsewhere.pop(rid, None)
        attempt = self._last_attempts.get(rid, -1) + 1
        return Ownership(rid, request, -1, -1, time.monotonic(), attempt, attempt)

    def note_waiting(self, owner: Ownership) -> None:
        """A request is to wait until it is dispatched."""
        self.owners[owner.rid] = owner

    def note_dispatch(self, owner: Ownership, prompt_tokens: int) -> None:
        """An attempt at a request was sent to its two workers."""
        self.owners[owner.rid] = owner
        for worker_id in (owner.prefill, owner.decode):
            self.workers[worker_id].dispatched[owner.name] = prompt_tokens

    def owner_of(self, name: str) -> Ownership | None:
        """The live request of which ``name`` is the current attempt."""
        rid, attempt = split_rid(name)
        owner = self.owners.get(rid)
        return owner if owner is not None and owner.attempt == attempt else None

    def forget(self, rid: str) -> None:
        """A request has ended."""
        owner = self.owners.pop(rid, None)
        if owner is not None:
            self._last_attempts[rid] = owner.attempt
            self._last_attempts.move_to_end(rid)
            if len(self._last_attempts) > _REMEMBERED:
                self._last_attempts.popitem(last=False)
            for view in self.workers.values():
                view.dispatched.pop(owner.name, None)

    def note_lost(self, worker_id: int) -> None:
        """A worker died: its load and the moves it commanded are void. Moves towards it are
        reported back by their sources."""
        view = self.workers[worker_id]
        view.report = None
        view.changing_to = None
        view.dispatched.clear()
        for result in self.moves_lost_with(worker_id):
            self.note_migration_result(result)

    def moves_lost_with(self, worker_id: int) -> list[MigrationResult]:
        """How the migrations ended whose source has died, and cannot tell any more."""
        return [
            MigrationResult(
                migration_id=migration_id,
                rid=move.rid,
                source=move.source,
                target=move.target,
                outcome=FAILED,
                reason="source died",
                tokens=0,
                tokens_sent=0,
                tokens_saved=0,
                kv_bytes=0,
                duration_s=0.0,
            )
            for migration_id, move in self.moving.items()
            if move.source == worker_id
        ]

    def note_adopted(self, message: Adopted) -> None:
        """The target of a migration says that it owns the request."""
        view = self.workers.get(message.worker_id)
        if view is None or view.role != DECODE or view.state != READY:
            return
        owner = self.owner_of(message.rid)
        if owner is not None and not owner.recovering:
            owner.decode = message.worker_id

    def fault(self, message: Message) -> str | None:
        """What is wrong with a worker's message that decodes, if anything."""
        if isinstance(message, (WorkerReport, LoadUpdate)):
            view = self.workers.get(message.worker_id)
            if view is None:
                return f"there is no worker {message.worker_id}"
            if (message.load.worker_id, message.load.role) != (view.worker_id, view.role):
                return f"the load is not one of {view.role} worker {view.worker_id}"
        elif isinstance(message, FirstEstimates):
            if message.worker_id not in self.workers:
                return f"there is no worker {message.worker_id}"
        elif isinstance(message, MigrationResult):
            known = self.moving.get(message.migration_id)
            told = (message.rid, message.source, message.target)
            if known is None or told != (known.rid, known.source, known.target):
                return f"migration {message.migration_id} is not under way, or another one"
        elif isinstance(message, Landed) and (
            message.worker_id not in self.workers
            or not 0 < message.migration_id <= self.migrations.attempted
        ):
            return f"worker {message.worker_id} or migration {message.migration_id} is unknown"
        return None

    def note_load(self, update: LoadUpdate) -> None:
        """A worker's load between two reports."""
        view = self.workers.get(update.worker_id)
        if view is None or view.report is None or update.incarnation != view.incarnation:
            return
        view.report = msgspec.structs.replace(view.report, load=update.load)
        for request in update.load.requests:
            view.dispatched.pop(request.rid, None)

    def note_report(self, report: WorkerReport) -> bool:
        """A worker's load; what it finished is forgotten. False if it no longer counts."""
        view = self.workers.get(report.worker_id)
        if view is None or view.state != READY:
            return False
        if report.incarnation != view.incarnation:
            return False
        view.report = report
        view.reported_at = time.monotonic()
        for request in report.load.requests:
            view.dispatched.pop(request.rid, None)
        for name in report.finished:
            view.dispatched.pop(name, None)
            owner = self.owner_of(name)
            if owner is None or owner.recovering or view.role != DECODE:
                continue
            if owner.decode == view.worker_id:
                self.forget(owner.rid)
                if view.host:
                    self._remember_ended(owner)
            elif any(m.rid == name and m.target == view.worker_id for m in self.moving.values()):
                self._left_target.add(name)
        return True

    def note_first_estimates(self, message: FirstEstimates) -> None:
        """What prefill predicts for requests whose decode worker has not begun."""
        for name, remaining in message.remaining.items():
            owner = self.owner_of(name)
            if owner is not None:
                owner.first_estimate = remaining

    def _remember_ended(self, owner: Ownership) -> None:
        now = time.monotonic()
        self._ended_elsewhere[owner.rid] = (now, owner)
        self._ended_elsewhere.move_to_end(owner.rid)
        while next(iter(self._ended_elsewhere.values()))[0] < now - _TOKENS_ON_THEIR_WAY_S:
            self._ended_elsewhere.popitem(last=False)

    def take_back_ended(self, worker_id: int) -> None:
        """A worker of another host was lost: requests that it said it had ended lately may not
        have come to their end for the client. They are live again until the ledger has spoken."""
        since = time.monotonic() - _TOKENS_ON_THEIR_WAY_S
        for rid, (ended_at, owner) in list(self._ended_elsewhere.items()):
            if owner.decode != worker_id:
                continue
            del self._ended_elsewhere[rid]
            if ended_at > since and rid not in self.owners and not owner.aborted:
                self._last_attempts.pop(rid, None)
                self.owners[rid] = owner

    def note_migration_started(self, migration_id: int, move: MovingRequest) -> None:
        """A migration was commanded."""
        self.migrations.started(move.cause)
        self.moving[migration_id] = move

    def note_migration_result(self, result: MigrationResult) -> MovingRequest | None:
        """A migration ended; what was commanded, if it was."""
        move = self.moving.pop(result.migration_id, None)
        if move is None:
            return None
        self.migrations.ended(result)
        left_target = result.rid in self._left_target
        self._left_target.discard(result.rid)
        if result.outcome == COMPLETED:
            owner = self.owner_of(result.rid)
            if owner is not None and left_target:
                self.forget(owner.rid)
            self.workers[result.source].dispatched.pop(result.rid, None)
            if owner is not None and not owner.recovering:
                owner.decode = result.target
        return move
