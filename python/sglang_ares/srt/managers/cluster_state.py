"""What the controller knows: each worker's last report, who owns each request, what is moving."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_ares.srt.disaggregation.migration import CANCELLED, COMPLETED, REFUSED
from sglang_ares.srt.managers.attempts import internal_rid, split_rid
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    FirstEstimates,
    Landed,
    LoadUpdate,
    Message,
    MigrationResult,
    WorkerReport,
)
from sglang_ares.srt.policy.types import DECODE, Remaining, RequestLoad, WorkerLoad

# What a worker can be: serving; lost, its processes not gone yet; waiting for its restart or
# starting again; given up; gone with its host, which had asked.
READY = "ready"
DYING = "dying"
RESTARTING = "restarting"
FAILED_FOR_GOOD = "failed"
LEFT = "left"
# Shown to operators of a worker that serves until it changes its role.
CHANGING = "changing"

# Tokens of another host may still be on their way when its worker says that the request has ended.
# If the worker is lost within this time (s), the token ledger is asked.
_TOKENS_ON_THEIR_WAY_S = 60.0
# Requests remembered after their end.
_REMEMBERED = 1 << 16


@dataclass
class WorkerView:
    """One worker as last reported, and what was sent to it since."""

    worker_id: int
    role: str
    pids: list[int]
    kv_capacity: int
    incarnation: int = 0
    state: str = READY
    # Why it is not ready.
    reason: str = ""
    # The operator wants it empty: it takes no requests, and those it has are moved away.
    draining: bool = False
    # Another host than the controller's, if it runs on one.
    host: str = ""
    # The role it is to have; it takes no requests until then.
    changing_to: str | None = None
    report: WorkerReport | None = None
    reported_at: float = 0.0
    # Prompt tokens of requests dispatched here that no report has shown yet.
    dispatched: dict[str, int] = field(default_factory=dict)

    def load(self, moving: frozenset[str] = frozenset()) -> WorkerLoad:
        """The load a policy should reckon with; requests in ``moving`` must stay."""
        if self.report is None:
            base = WorkerLoad(
                worker_id=self.worker_id,
                role=self.role,
                kv_tokens=0,
                kv_capacity=self.kv_capacity,
                running=0,
                queued=0,
                queued_tokens=0,
            )
        else:
            base = self.report.load
        requests = tuple(
            msgspec.structs.replace(r, movable=False) if r.rid in moving else r
            for r in base.requests
        )
        return msgspec.structs.replace(
            base,
            queued=base.queued + len(self.dispatched),
            queued_tokens=base.queued_tokens + sum(self.dispatched.values()),
            requests=requests,
        )


@dataclass
class Ownership:
    """A live request: what the front sent (a ``TokenizedGenerateReqInput``), where it is (on no
    worker, -1, while it waits to be dispatched), and which attempt at it runs. ``recovering``: it
    is nowhere until the token ledger has answered. ``aborted``: the client has left, so that it
    need not be recovered."""

    rid: str
    request: Any
    prefill: int
    decode: int
    dispatched_at: float
    attempt: int = 0
    first_attempt: int = 0
    recovering: bool = False
    # Attempts that ended because their worker changed its role: no failures.
    handed_back: int = 0
    aborted: bool = False
    # What prefill predicted, until its decode worker does.
    first_estimate: Remaining | None = None

    @property
    def waiting(self) -> bool:
        """No worker knows of it yet."""
        return self.decode < 0

    @property
    def name(self) -> str:
        """What the workers call it."""
        return internal_rid(self.rid, self.attempt)


# Why a migration was commanded.
MANUAL = "manual"
POLICY = "policy"
MEMORY = "memory"
DRAIN = "drain"
ROLE = "role"
CAUSES = (MANUAL, POLICY, MEMORY, DRAIN, ROLE)


@dataclass
class MovingRequest:
    """A migration that was commanded, for ``cause``, and has not been reported back. ``rid``: the
    attempt."""

    rid: str
    source: int
    target: int
    cause: str = POLICY


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
        self.migrations_attempted = 0
        self.migrations_completed = 0
        self.migration_tokens_sent = 0
        self.migration_tokens_saved = 0
        self.migrations_by_cause: Counter[str] = Counter()
        self.migrations_refused: Counter[str] = Counter()
        self.migrations_failed: Counter[str] = Counter()
        self.migrations_cancelled: Counter[str] = Counter()
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
        """What prefill predicted stands in until the decode worker reports a prediction."""
        requests = []
        for request in load.requests:
            owner = self.owner_of(request.rid) if request.remaining is None else None
            if owner is not None and owner.first_estimate is not None:
                request = msgspec.structs.replace(request, remaining=owner.first_estimate)
            requests.append(request)
        return msgspec.structs.replace(load, requests=tuple(requests))

    def new_owner(self, rid: str, request: Any) -> Ownership:
        """A request that is to be dispatched. Under a rid that was used before, attempts go on
        counting, so that no leftover of the earlier request is taken for this one's."""
        attempt = self._last_attempts.pop(rid, -1) + 1
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
        for migration_id, move in list(self.moving.items()):
            if move.source == worker_id:
                del self.moving[migration_id]
                self.migrations_failed["source died"] += 1

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
            or not 0 < message.migration_id <= self.migrations_attempted
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

    def note_report(self, report: WorkerReport) -> None:
        """A worker's load; what it finished is forgotten."""
        view = self.workers.get(report.worker_id)
        if view is None or view.state != READY:
            return
        if report.incarnation != view.incarnation:
            return
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
        self.migrations_attempted += 1
        self.migrations_by_cause[move.cause] += 1
        self.moving[migration_id] = move

    def note_migration_result(self, result: MigrationResult) -> MovingRequest | None:
        """A migration ended; what was commanded, if it was."""
        move = self.moving.pop(result.migration_id, None)
        if move is None:
            return None
        self.migration_tokens_sent += result.tokens_sent
        self.migration_tokens_saved += result.tokens_saved
        left_target = result.rid in self._left_target
        self._left_target.discard(result.rid)
        if result.outcome == COMPLETED:
            owner = self.owner_of(result.rid)
            if owner is not None and left_target:
                self.forget(owner.rid)
            self.migrations_completed += 1
            self.workers[result.source].dispatched.pop(result.rid, None)
            if owner is not None and not owner.recovering:
                owner.decode = result.target
        elif result.outcome == REFUSED:
            self.migrations_refused[_key(result.reason)] += 1
        elif result.outcome == CANCELLED:
            self.migrations_cancelled[_key(result.reason)] += 1
        else:
            self.migrations_failed[_key(result.reason)] += 1
        return move

    def _remaining(self, owner: Ownership, load: RequestLoad | None) -> Remaining | None:
        reported = load.remaining if load is not None else None
        return reported if reported is not None else owner.first_estimate

    # --- documents --------------------------------------------------------------------------

    def status(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The body of ``GET /ares/status``; ``settings`` stand first in it."""
        return {
            "uptime_s": time.monotonic() - self.started_at,
            **settings,
            "workers": [self._worker_status(w) for w in self.workers.values()],
            "migrations": {
                "attempted": self.migrations_attempted,
                "completed": self.migrations_completed,
                "refused": dict(self.migrations_refused),
                "failed": dict(self.migrations_failed),
                "cancelled": dict(self.migrations_cancelled),
                "in_flight": len(self.moving),
                "tokens_sent": self.migration_tokens_sent,
                "tokens_saved": self.migration_tokens_saved,
                "causes": {cause: self.migrations_by_cause[cause] for cause in CAUSES},
            },
            "requests": len(self.owners),
        }

    def _worker_status(self, view: WorkerView) -> dict[str, Any]:
        load = view.load()
        report = view.report
        status: dict[str, Any] = {
            "id": view.worker_id,
            "role": view.role,
            "state": self.operating_state(view),
            "restarts": view.incarnation,
            "pids": view.pids,
            "running": load.running,
            "queued": load.queued,
            "queued_tokens": load.queued_tokens,
            "kv_tokens": load.kv_tokens,
            "kv_capacity": load.kv_capacity,
        }
        if view.host:
            status["host"] = view.host
        if view.reason:
            status["reason"] = view.reason
        if view.changing_to is not None:
            status["changing_to"] = view.changing_to
        if report is not None:
            status.update(
                report_age_s=time.monotonic() - view.reported_at,
                migrations_in=report.migrations_in,
                migrations_out=report.migrations_out,
                retracted=report.retracted,
                dropped_frames=report.dropped_frames,
                decode_step_ms=report.decode_step_ms,
                late_steps=report.late_steps,
                step=msgspec.to_builtins(report.load.step),
                pools=msgspec.to_builtins(report.pools),
            )
        return status

    def requests(self) -> list[dict[str, Any]]:
        """The body of ``GET /ares/requests``: live requests, where and how large they are."""
        now = time.monotonic()
        loads = {r.rid: r for w in self.ready(DECODE) for r in w.load().requests}
        return [
            {
                "rid": owner.rid,
                "worker": None if owner.waiting else owner.decode,
                "tokens": loads[owner.name].tokens if owner.name in loads else 0,
                "output_tokens": loads[owner.name].output_tokens if owner.name in loads else 0,
                "predicted_remaining": self._remaining(owner, loads.get(owner.name)),
                "age_s": now - owner.dispatched_at,
                "attempt": owner.attempt,
            }
            for owner in self.owners.values()
        ]


def _key(reason: str) -> str:
    """The stable part of a reason: what stands before its explanation."""
    return reason.split(":", 1)[0]
