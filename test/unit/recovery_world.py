"""A cluster in memory around the real :class:`Recovery` and :class:`ClusterState`.

Workers run attempts, move them, fail, finish and die; messages wait in one FIFO per sender and
receiver, and a test delivers them in any order. The client counts: the n-th token it gets must be
n, so that a lost or repeated one shows. What a dead worker had sent arrives, if at all, before it
is buried: the controller reads its mailbox before it looks after the workers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang_ares.srt.disaggregation.request_state import pack_ids, unpack_ids
from sglang_ares.srt.managers.attempts import split_rid
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    DYING,
    FAILED_FOR_GOOD,
    READY,
    RESTARTING,
    MovingRequest,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    Discard,
    EmittedTokens,
    Fenced,
    FenceRequests,
    Message,
    MigrationResult,
    PeerDied,
    PeerDiedAck,
    RequestFailed,
)
from sglang_ares.srt.managers.recovery import Recovery
from sglang_ares.srt.policy.types import DECODE, PREFILL

MISSING = "no decode worker is left"


def request(**fields: Any) -> Any:
    """What the front sent, as far as the refusal table reads it; any other field is None."""

    class Anything(SimpleNamespace):
        def __getattr__(self, name: str) -> None:
            return None

    return Anything(**{"sampling_params": Anything(n=1, beam_width=1), **fields})


@dataclass
class Attempt:
    """An attempt on its decode worker. ``waits_for``: the prefill worker that has its KV to send;
    ``handed_to``: stopped, and on its way to that worker, which may have taken it (``taken``)."""

    name: str
    next_token: int
    waits_for: int | None
    handed_to: int | None = None
    taken: bool = False


@dataclass
class Ledger:
    """What the clients got, and which attempt may speak."""

    streams: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    ended: set[str] = field(default_factory=set)
    attempts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def hears(self, name: str) -> bool:
        rid, attempt = split_rid(name)
        return attempt == self.attempts[rid]

    def token(self, attempt: Attempt) -> None:
        stream = self.streams[split_rid(attempt.name)[0]]
        if self.hears(attempt.name):
            assert attempt.next_token == len(stream), "a token is lost or repeated"
            stream.append(attempt.next_token)
        attempt.next_token += 1

    def end(self, name: str) -> None:
        rid = split_rid(name)[0]
        if self.hears(name):
            assert rid not in self.ended, f"{rid} ended twice"
            self.ended.add(rid)

    def fence(self, message: FenceRequests) -> Fenced:
        self.attempts.update(message.attempts)
        return Fenced(
            fence_id=message.fence_id,
            requests=[
                EmittedTokens(
                    rid=rid,
                    ended=rid in self.ended,
                    output_ids=pack_ids(() if rid in self.ended else self.streams[rid]),
                    cached_tokens=0,
                    reasoning_tokens=0,
                )
                for rid in message.attempts
            ],
        )


class RecoveryWorld:
    """Implements ``RecoveryHost``; workers 0.. are prefill workers, then come decode workers."""

    def __init__(self, *, prefill: int = 1, decode: int = 3, max_attempts: int = 50) -> None:
        roles = [PREFILL] * prefill + [DECODE] * decode
        self.state = ClusterState(
            [WorkerView(i, role, pids=[], kv_capacity=1000) for i, role in enumerate(roles)]
        )
        self.recovery = Recovery(self, self.state, max_attempts)
        self.ledger = Ledger()
        self.running: dict[int, dict[str, Attempt]] = {i: {} for i in self.state.workers}
        self.inbox: dict[int, deque[Message]] = {i: deque() for i in self.state.workers}
        self.outbox: dict[int, deque[Message]] = {i: deque() for i in self.state.workers}
        self.committed: list[tuple[int, int, str]] = []
        self.fences: list[FenceRequests] = []
        self.told_ends: dict[str, tuple[int | None, str]] = {}
        self.dispatched: dict[str, int] = defaultdict(int)
        self.aborted: set[str] = set()
        self.missing: str | None = None
        self.moves = 0

    # --- RecoveryHost -----------------------------------------------------------------------

    def tell(self, worker_id: int, message: Message) -> None:
        assert self.state.workers[worker_id].state == READY, f"{message} to a worker that is gone"
        self.inbox[worker_id].append(message)

    def fence(self, request: FenceRequests) -> None:
        self.fences.append(request)

    def redispatch(self, owner: Ownership, emitted: EmittedTokens) -> bool:
        assert emitted.rid == owner.rid and not emitted.ended
        assert self.ledger.attempts[owner.rid] == owner.attempt, "not fenced yet"
        return self.dispatch(owner, list(unpack_ids(emitted.output_ids)))

    def missing_role(self) -> str | None:
        return self.missing

    def end(self, owner: Ownership, status: int | None, reason: str) -> None:
        assert owner.rid not in self.told_ends and owner.rid not in self.ledger.ended
        self.told_ends[owner.rid] = (status, reason)

    # --- what a test may do -----------------------------------------------------------------

    def ready(self, role: str) -> list[int]:
        return [w.worker_id for w in self.state.with_role(role)]

    def dispatch(self, owner: Ownership, output: list[int], salt: int = 0) -> bool:
        prefill, decode = self.ready(PREFILL), self.ready(DECODE)
        if not prefill or not decode:
            return False
        salt = salt or owner.attempt
        owner.prefill, owner.decode = prefill[salt % len(prefill)], decode[salt % len(decode)]
        live = [n for w in self.running.values() for n in w if n == owner.name]
        assert not live, f"{owner.name} is dispatched twice"
        self.state.note_dispatch(owner, 10)
        self.running[owner.decode][owner.name] = Attempt(owner.name, len(output), owner.prefill)
        self.dispatched[owner.rid] += 1
        return True

    def submit(self, rid: str, salt: int = 0, **fields: Any) -> Ownership:
        owner = Ownership(rid, request(**fields), -1, -1, dispatched_at=0.0)
        if not self.dispatch(owner, [], salt):
            self.end(owner, 503, "all workers of a role are starting anew")
        return owner

    def emit(self, worker_id: int, name: str) -> None:
        attempt = self.running[worker_id][name]
        attempt.waits_for = None
        if attempt.handed_to is None:
            self.ledger.token(attempt)

    def finish(self, worker_id: int, name: str) -> None:
        del self.running[worker_id][name]
        self.ledger.end(name)
        self.outbox[worker_id].append(finished(self.state, worker_id, name))

    def fail(self, worker_id: int, name: str) -> None:
        del self.running[worker_id][name]
        failed = RequestFailed(rid=name, worker_id=worker_id, reason="Decode transfer failed")
        self.outbox[worker_id].append(failed)

    def abort(self, rid: str) -> None:
        """As the controller routes it."""
        owner = self.state.owners.get(rid)
        self.aborted.add(rid)
        if owner is None:
            return
        owner.aborted = True
        if owner.recovering:
            self.recovery.on_abort(owner)
            return
        for worker_id, attempts in self.running.items():
            attempt = attempts.get(owner.name)
            if attempt is not None and attempt.handed_to is None:
                self.finish(worker_id, owner.name)

    def start_move(self, rid: str, target: int) -> None:
        """Up to the hand-over."""
        owner = self.state.owners[rid]
        attempt = self.running[owner.decode].get(owner.name)
        busy = any(m.rid == owner.name for m in self.state.moving.values())
        if attempt is None or attempt.waits_for is not None or busy or target == owner.decode:
            return
        self.moves += 1
        self.state.note_migration_started(
            self.moves, MovingRequest(owner.name, owner.decode, target)
        )
        attempt.handed_to = target

    def commit(self, source: int, name: str) -> None:
        """The target takes over and says so, to the source and to the controller."""
        attempt = self.running[source][name]
        target = attempt.handed_to
        assert target is not None
        (move,) = [i for i, m in self.state.moving.items() if m.rid == name]
        if self.state.workers[target].state == READY and not attempt.taken:
            attempt.taken = True
            self.running[target][name] = Attempt(name, attempt.next_token, None)
            self.outbox[target].append(Adopted(migration_id=move, rid=name, worker_id=target))
            self.committed.append((source, target, name))

    def hear_committed(self, source: int, target: int, name: str) -> None:
        self.committed.remove((source, target, name))
        if self.running[source].pop(name, None) is not None:
            (move,) = [i for i, m in self.state.moving.items() if m.rid == name]
            self.outbox[source].append(moved(move, name, source, target))

    def die(self, worker_id: int, heard: int) -> None:
        """The worker's last words but the first ``heard`` are lost with it."""
        view = self.state.workers[worker_id]
        if view.state != READY:
            return
        view.state = DYING
        self.running[worker_id].clear()
        self.inbox[worker_id].clear()
        self.committed = [c for c in self.committed if worker_id not in c[:2]]
        while len(self.outbox[worker_id]) > heard:
            self.outbox[worker_id].pop()

    def bury(self, worker_id: int, *, for_good: bool = False) -> None:
        view = self.state.workers[worker_id]
        if view.state != DYING:
            return
        while self.to_controller(worker_id):
            pass
        view.state = FAILED_FOR_GOOD if for_good else RESTARTING
        self.recovery.worker_died(worker_id)
        self.recovery.dispatch_parked()

    def bring_back(self, worker_id: int) -> None:
        view = self.state.workers[worker_id]
        if view.state == RESTARTING and self.recovery.settled(worker_id):
            view.state, view.incarnation = READY, view.incarnation + 1
            self.recovery.dispatch_parked()

    def to_worker(self, worker_id: int) -> bool:
        """The oldest message of the controller arrives."""
        if not self.inbox[worker_id]:
            return False
        message = self.inbox[worker_id].popleft()
        attempts = self.running[worker_id]
        if isinstance(message, Discard):
            for name in message.rids:
                attempts.pop(name, None)
        elif isinstance(message, PeerDied):
            dead = message.worker_id
            for name, attempt in list(attempts.items()):
                if dead in (attempt.waits_for, attempt.handed_to):
                    self.fail(worker_id, name)
            ack = PeerDiedAck(event_id=message.event_id, worker_id=worker_id)
            self.outbox[worker_id].append(ack)
        return True

    def to_controller(self, worker_id: int) -> bool:
        """The oldest message of the worker arrives."""
        if not self.outbox[worker_id]:
            return False
        message = self.outbox[worker_id].popleft()
        if isinstance(message, RequestFailed):
            self.recovery.on_request_failed(message.rid, message.reason)
        elif isinstance(message, PeerDiedAck):
            self.recovery.on_acknowledged(message.event_id, message.worker_id)
        elif isinstance(message, Adopted):
            self.state.note_adopted(message)
        elif isinstance(message, MigrationResult):
            self.state.note_migration_result(message)
        else:
            self.state.note_report(message)  # type: ignore[arg-type]
        return True

    def answer_fence(self, which: int = 0) -> None:
        if self.fences:
            fence = self.fences.pop(which % len(self.fences))
            self.recovery.on_fenced(self.ledger.fence(fence))

    def settle(self) -> None:
        """Everything arrives; every dead worker is buried and, if it may, comes back."""
        for _ in range(200):
            for worker_id in self.state.workers:
                self.bury(worker_id)
                while self.to_worker(worker_id) or self.to_controller(worker_id):
                    pass
                self.bring_back(worker_id)
            while self.committed:
                self.hear_committed(*self.committed[0])
            while self.fences:
                self.answer_fence()
        assert not any(self.inbox.values()) and not any(self.outbox.values())

    def run_out(self) -> None:
        """Every attempt that can end does, until none is left."""
        for _ in range(20):
            self.settle()
            for worker_id, attempts in self.running.items():
                for name, attempt in list(attempts.items()):
                    if attempt.handed_to is not None:
                        self.commit(worker_id, name)
                    else:
                        self.emit(worker_id, name)
                        self.finish(worker_id, name)
        self.settle()


def finished(state: ClusterState, worker_id: int, name: str) -> Any:
    """A report that lists ``name`` as finished; of it only this is read."""
    view = state.workers[worker_id]
    load = SimpleNamespace(requests=())
    return SimpleNamespace(
        worker_id=worker_id, incarnation=view.incarnation, load=load, finished=[name]
    )


def moved(migration_id: int, name: str, source: int, target: int) -> MigrationResult:
    return MigrationResult(
        migration_id=migration_id,
        rid=name,
        source=source,
        target=target,
        outcome="completed",
        reason="",
        tokens=1,
        tokens_sent=1,
        tokens_saved=0,
        kv_bytes=1,
        duration_s=0.0,
    )
