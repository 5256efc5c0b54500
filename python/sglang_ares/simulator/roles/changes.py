"""Changes of roles: a label at once, or a worker that is emptied first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
import numpy as np

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.events import EventQueue
from sglang_ares.simulator.migrations import Migrations
from sglang_ares.simulator.request_log import RequestLog
from sglang_ares.simulator.roles.config import COLOCATED
from sglang_ares.simulator.roles.history import FlipRecord, RoleHistory
from sglang_ares.simulator.roles.pool import CHANGED, FOLLOW, ElasticPool
from sglang_ares.srt.policy.draining import drain_moves
from sglang_ares.srt.policy.snapshot import Bools, Ints
from sglang_ares.srt.policy.types import DECODE, PREFILL, RequestLoad, WorkerLoad

# How often an emptying worker is looked at.
_FOLLOW_S = 0.1


@dataclass
class _Change:
    change_id: int
    to_decode: bool
    record: FlipRecord
    handed_back: bool = False
    emptied: bool = False


class RoleChanges:
    """``decodes``: the labels, ``(W,)``; of a worker that changes, the one it will have.
    ``serves``: whether it may be given work. ``to_prefill`` and ``to_decode`` place requests that
    were taken off a worker."""

    def __init__(
        self,
        config: SimulationConfig,
        log: RequestLog,
        events: EventQueue,
        pool: ElasticPool,
        migrations: Migrations,
    ) -> None:
        assert config.roles is not None
        self._settings = config.roles
        self._log = log
        self._events = events
        self._pool = pool
        self._migrations = migrations
        self._limits = msgspec.structs.replace(
            config.limits, max_moves=config.max_migrations_per_worker
        )
        self._capacity = config.profile.kv_capacity_tokens
        count = config.prefill_workers + config.decode_workers
        first = 0 if self._settings.policy == COLOCATED else config.prefill_workers
        self.decodes: Bools = np.arange(count) >= first
        self.serves: Bools = np.ones(count, np.bool_)
        self.history = RoleHistory()
        self.to_prefill: Callable[[int], None] = lambda request: None
        self.to_decode: Callable[[int], None] = lambda request: None
        self._changes: dict[int, _Change] = {}
        self._next_id = 0

    @property
    def under_way(self) -> bool:
        """Whether a worker is being emptied."""
        return bool(self._changes)

    def serving(self, *, decodes: bool) -> Ints:
        """Rows of the workers that may be given work of a role."""
        return np.flatnonzero(self.serves & (self.decodes == decodes))

    def flip(self, row: int, *, to_decode: bool, cause: str, reason: str) -> bool:
        """Change worker ``row``, or begin to; false if it cannot be now."""
        refusal = self._why_not(row, to_decode)
        if refusal is not None:
            self.history.refuse(refusal)
            return False
        worker, now = self._pool.elastic[row], self._events.now
        held = len(worker.running) + len(worker.queue) + len(worker.waiting)
        role = DECODE if to_decode else PREFILL
        record = FlipRecord(now, row, role, cause, reason, held)
        self.history.flips.append(record)
        self.decodes[row] = to_decode
        if self._settings.relabels:
            record.done_s, record.outcome = now, "relabelled"
            self._relabelled(row, to_decode)
            return True
        self.serves[row] = False
        self._changes[row] = _Change(self._next_id, to_decode, record)
        if not to_decode:
            self._place_again(row)
        self._events.push(now, FOLLOW, row, self._next_id)
        self._next_id += 1
        return True

    def _why_not(self, row: int, to_decode: bool) -> str | None:
        if not self.serves[row]:
            return "it is changing already"
        if self.decodes[row] == to_decode:
            return "it has that role"
        if len(self._changes) >= self._settings.most_changes:
            return "others are changing"
        others = self.serving(decodes=not to_decode)
        if len(others) < 2:
            return "it is the last one of its role"
        if to_decode or self._settings.relabels:
            return None
        workers = self._pool.elastic
        held = workers[row].tokens + workers[row].promised - workers[row].held
        headroom = self._limits.headroom_tokens
        free = sum(
            max(0, self._capacity - workers[r].tokens - workers[r].promised - headroom)
            for r in others.tolist()
            if r != row
        )
        return "the others have no room" if held > free else None

    # --- what happens -----------------------------------------------------------------------

    def follow(self, row: int, change_id: int) -> None:
        """Look after a worker that is being emptied."""
        change = self._changes.get(row)
        if change is None or change.change_id != change_id:
            return
        worker, now = self._pool.elastic[row], self._events.now
        self._pool.touch(row)
        self._pool.arm(row)
        since_s = now - change.record.start_s
        if change.to_decode:
            if not change.handed_back and since_s >= self._settings.hand_back_s:
                change.handed_back = True
                self._hand_back(self._pool.hand_back(row))
            left = len(worker.queue)
        else:
            left = len(worker.running) + worker.coming - worker.prompts
            if left:
                self._drain(row)
        if not left:
            self._events.push(now + self._settings.flip_s, CHANGED, row, change_id)
        elif since_s > self._settings.give_up_s:
            del self._changes[row]
            self.decodes[row] = not change.to_decode
            self.serves[row] = True
            change.record.outcome = "given up"
        else:
            self._events.push(now + _FOLLOW_S, FOLLOW, row, change_id)

    def changed(self, row: int, change_id: int) -> None:
        """An emptied worker serves in its new role."""
        change = self._changes.pop(row)
        assert change.change_id == change_id
        self.serves[row] = True
        change.record.done_s, change.record.outcome = self._events.now, "changed"
        self._relabelled(row, change.to_decode)

    def sample(self) -> None:
        """Record the pools."""
        decodes, serves = self.decodes, self.serves.copy()
        if self._settings.relabels:
            for row, worker in enumerate(self._pool.elastic):
                former = worker.queue if decodes[row] else worker.running
                serves[row] = not former
        if self._settings.policy == COLOCATED:
            serves[:] = True
        self.history.samples.append(
            (
                int((~decodes & serves).sum()),
                int((decodes & ~serves).sum()),
                int((decodes & serves).sum()),
                int((~decodes & ~serves).sum()),
            )
        )

    def _relabelled(self, row: int, to_decode: bool) -> None:
        """What waits elsewhere with its KV here decodes here; what waits here goes elsewhere."""
        if not to_decode:
            self._place_again(row)
            return
        pool = self._pool
        here = [r for r in sorted(pool.waits) if pool.source[r] == row]
        for request in here:
            pool.recall(request)
            pool.decode_at(request, row)

    def _place_again(self, row: int) -> None:
        for request in list(self._pool.elastic[row].waiting):
            self._pool.recall(request)
            self.to_decode(request)

    def _hand_back(self, requests: Iterable[int]) -> None:
        for request in requests:
            self.to_prefill(request)

    def _drain(self, row: int) -> None:
        """Move what runs on worker ``row`` to the other decode workers."""
        others = self.serving(decodes=True).tolist()
        targets = [self._load(other, requests=False) for other in others]
        for move in drain_moves(self._load(row, requests=True), targets, self._limits):
            self._migrations.start(move)

    def _load(self, row: int, *, requests: bool) -> WorkerLoad:
        pool, worker = self._pool, self._pool.elastic[row]
        moving = self._migrations.under_way
        loads: tuple[RequestLoad, ...] = ()
        if requests:
            loads = tuple(
                RequestLoad(
                    rid=str(request),
                    tokens=pool.resident(row, request),
                    output_tokens=1,
                    age_s=0.0,
                    since_move_s=0.0,
                    movable=request not in moving,
                )
                for request in worker.running
            )
        return WorkerLoad(
            worker_id=row,
            role=DECODE,
            kv_tokens=worker.tokens + worker.promised,
            kv_capacity=self._capacity,
            running=len(worker.running),
            queued=len(worker.waiting),
            queued_tokens=worker.waiting_tokens,
            requests=loads,
        )
