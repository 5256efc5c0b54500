"""Migrations under way: memory promised at the target, the copy, the hand-over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.events import HANDOVER, JOIN, EventQueue
from sglang_ares.simulator.request_log import MOVED, RequestLog
from sglang_ares.srt.policy.types import Move

if TYPE_CHECKING:
    from sglang_ares.simulator.decode_pool import DecodePool


@dataclass(frozen=True)
class Migration:
    """``request`` goes from ``source`` to ``target``, where ``promised`` tokens are reserved for
    it; it had ``resident`` tokens at the start."""

    migration_id: int
    request: int
    source: int
    target: int
    resident: int
    promised: int


class Migrations:
    """All moves under way. A worker sends, and receives, one copy at a time.

    ``completed``, ``refused`` (no memory, or too many at once), ``cancelled`` (the request ended,
    or grew out of its reservation), ``moved_tokens``: counts since the start.
    """

    def __init__(
        self, config: SimulationConfig, log: RequestLog, events: EventQueue, pool: DecodePool
    ) -> None:
        limits = config.limits
        self._log = log
        self._events = events
        self._pool = pool
        self._cost = limits.cost
        self._headroom = limits.headroom_tokens
        self._most = len(log) if config.moves_are_free else config.max_migrations_per_worker
        self._sending_until = [0.0] * config.decode_workers
        self._receiving_until = [0.0] * config.decode_workers
        self._outgoing: Counter[int] = Counter()
        self._incoming: Counter[int] = Counter()
        self._next_id = 0
        self.under_way: dict[int, Migration] = {}
        self.completed = self.refused = self.cancelled = self.moved_tokens = 0

    def start(self, move: Move) -> None:
        """Begin a move that a policy planned; the target may refuse it."""
        request, target = int(move.rid), move.target
        pool, source = self._pool, self._log.worker[request]
        pool.touch(source)
        room = pool.touch(target)
        if request in pool.workers[source].running and request not in self.under_way:
            resident = pool.resident(source, request)
            promised = resident + self._headroom
            crowded = max(self._outgoing[source], self._incoming[target]) >= self._most
            if crowded or not room.has_room(promised):
                self.refused += 1
            else:
                room.promise(promised)
                self._begin(request, source, target, resident, promised)
        pool.arm(source)
        pool.arm(target)

    def _begin(self, request: int, source: int, target: int, resident: int, promised: int) -> None:
        migration = Migration(self._next_id, request, source, target, resident, promised)
        self._next_id += 1
        self.under_way[request] = migration
        self._outgoing[source] += 1
        self._incoming[target] += 1
        copied_at = self._copied_at(source, target, resident)
        self._events.push(copied_at, HANDOVER, request, migration.migration_id)

    def _copied_at(self, source: int, target: int, tokens: int) -> float:
        """When a copy that is asked for now has come to its end."""
        ready = self._events.now + self._cost.fixed_s
        if self._cost.tokens_per_s <= 0:
            return ready
        begin = max(ready, self._sending_until[source], self._receiving_until[target])
        end = begin + tokens / self._cost.tokens_per_s
        self._sending_until[source] = self._receiving_until[target] = end
        return end

    def hand_over(self, request: int, migration_id: int) -> None:
        """The copy has caught up: after the step in progress the request belongs to the target."""
        migration = self.under_way.get(request)
        if migration is None or migration.migration_id != migration_id:
            return
        pool = self._pool
        pool.touch(migration.source)
        target = pool.touch(migration.target)
        # The step in progress may have been its last.
        if request in self.under_way:
            resident = pool.resident(migration.source, request)
            more = resident - migration.promised
            self._end(migration)
            if more > 0 and not target.fits(more):
                self.cancelled += 1
                target.release(migration.promised)
            else:
                target.promised += more
                self._leave(migration, resident)
        pool.arm(migration.source)
        pool.arm(migration.target)

    def _leave(self, migration: Migration, resident: int) -> None:
        """The request stops on the source, and joins the target after its pause."""
        request, log = migration.request, self._log
        self.completed += 1
        self.moved_tokens += resident
        left_s = self._pool.leave(migration.source, request, MOVED)
        log.moves[request] += 1
        log.moved_s[request] = left_s
        log.worker[request] = migration.target
        self._events.push(left_s + self._cost.pause_s, JOIN, request, migration.target)

    def cancel(self, request: int) -> None:
        """``request`` will not move, if it was about to."""
        migration = self.under_way.get(request)
        if migration is not None:
            self._end(migration)
            self.cancelled += 1
            self._pool.touch(migration.target).release(migration.promised)
            self._pool.arm(migration.target)

    def _end(self, migration: Migration) -> None:
        del self.under_way[migration.request]
        self._outgoing[migration.source] -= 1
        self._incoming[migration.target] -= 1
