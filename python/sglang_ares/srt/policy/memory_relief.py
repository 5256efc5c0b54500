"""Relief of memory: requests leave a worker before its KV runs out and upstream retracts some.

A worker is *short* when its free KV does not cover what its running requests will write within
the horizon, or falls below a floor. Whatever the rescheduling policy does, requests then move to
workers that keep at least twice that much after taking them, and what upstream itself reserves for
its running requests: so the next round does not send anything back.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import msgspec

from sglang_ares.srt.policy.types import Move, RequestLoad, WorkerLoad

# A target keeps this many times what makes a worker short.
_COMFORT = 2


class ReliefLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What counts as short, and what a round may do about it.

    ``horizon_s``: how far ahead a shortage is foreseen (until the next report, plus a move).
    ``min_steps``: decode steps reckoned with at least. ``floor``: share of the capacity that stays
    free. ``reserved_tokens``: KV tokens that a target must have free for each of its running or
    queued requests and for the arriving one, or it refuses. ``headroom_tokens``: KV reserved
    beside a request while it is copied. ``max_moves``: moves per round.
    """

    horizon_s: float
    min_steps: int = 32
    floor: float = 0.05
    reserved_tokens: int = 512
    headroom_tokens: int = 64
    max_moves: int = 8


@dataclass
class _Ledger:
    """A worker's memory as the plan so far leaves it."""

    worker_id: int
    capacity: int
    free: int
    running: int
    queued: int
    steps: int
    limits: ReliefLimits

    @classmethod
    def of(cls, worker: WorkerLoad, limits: ReliefLimits) -> _Ledger:
        steps = limits.min_steps
        if worker.decode_step_ms > 0:
            steps = max(steps, round(1e3 * limits.horizon_s / worker.decode_step_ms))
        free = worker.kv_capacity - worker.load_tokens
        return cls(
            worker_id=worker.worker_id,
            capacity=worker.kv_capacity,
            free=free,
            running=worker.running,
            queued=worker.queued,
            steps=steps,
            limits=limits,
        )

    def needed(self, running: int) -> int:
        """Free KV tokens that ``running`` requests want."""
        return max(running * self.steps, round(self.limits.floor * self.capacity))

    @property
    def shortage(self) -> int:
        """KV tokens that are missing; not above 0 where none are."""
        return self.needed(self.running) - self.free

    def spare_after(self, request: RequestLoad) -> int:
        """KV tokens beyond comfort once ``request`` is here; negative: it must not come."""
        running = self.running + self.queued + 1
        comfort = max(_COMFORT * self.needed(running), running * self.limits.reserved_tokens)
        return self.free - request.tokens - self.limits.headroom_tokens - comfort

    def gain_without(self, request: RequestLoad) -> int:
        """By how much the shortage shrinks when ``request`` leaves."""
        return request.tokens + self.needed(self.running) - self.needed(self.running - 1)

    def take(self, request: RequestLoad) -> None:
        self.free -= request.tokens
        self.running += 1

    def give(self, request: RequestLoad) -> None:
        self.free += request.tokens
        self.running -= 1


def is_short(worker: WorkerLoad, limits: ReliefLimits) -> bool:
    """Whether the worker's KV runs short within the horizon."""
    return worker.running > 0 and _Ledger.of(worker, limits).shortage > 0


def memory_relief(
    workers: Sequence[WorkerLoad],
    limits: ReliefLimits,
    closed: AbstractSet[int] = frozenset(),
) -> tuple[Move, ...]:
    """Moves that end the shortages, the worst first; none to the ``closed`` workers.

    As few requests move as possible, and of these as few tokens: the largest one until a single
    one is enough, then the smallest that is.
    """
    ledgers = {w.worker_id: _Ledger.of(w, limits) for w in workers}
    short = {w.worker_id for w in workers if is_short(w, limits)}
    targets = [ledgers[w.worker_id] for w in workers if w.worker_id not in short | closed]
    moves: list[Move] = []
    for worker in sorted(workers, key=lambda w: (-ledgers[w.worker_id].shortage, w.worker_id)):
        if worker.worker_id not in short:
            continue
        source = ledgers[worker.worker_id]
        candidates = [r for r in worker.requests if r.movable]
        while source.shortage > 0 and len(moves) < limits.max_moves:
            fitting = [r for r in candidates if _roomiest(targets, r) is not None]
            chosen = _next_to_leave(fitting, source)
            if chosen is None:
                break
            target = _roomiest(targets, chosen)
            assert target is not None
            candidates.remove(chosen)
            source.give(chosen)
            target.take(chosen)
            moves.append(Move(rid=chosen.rid, source=source.worker_id, target=target.worker_id))
    return tuple(moves)


def _next_to_leave(candidates: list[RequestLoad], source: _Ledger) -> RequestLoad | None:
    """The smallest request that ends the shortage alone, else the largest."""
    enough = [r for r in candidates if source.gain_without(r) >= source.shortage]
    if enough:
        return min(enough, key=lambda r: (r.tokens, r.rid))
    return max(candidates, key=lambda r: (r.tokens, r.rid), default=None)


def _roomiest(targets: list[_Ledger], request: RequestLoad) -> _Ledger | None:
    """The target with the most to spare once ``request`` is there, if there is one."""
    fitting = [t for t in targets if t.spare_after(request) >= 0]
    return max(fitting, key=lambda t: (t.spare_after(request), -t.worker_id), default=None)
