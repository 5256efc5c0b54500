"""The event queue: what happens next, in order of time, then of insertion."""

from __future__ import annotations

from heapq import heappush
from typing import TypeAlias

# Kinds of events, with what their two numbers mean.
DECODE = 0  # a decode worker's batch changes by itself: worker, version of its schedule
STEP = 1  # a prefill step ends: worker, -
PREFILL = 2  # a request enters a prefill queue: request, -
JOIN = 3  # a request's KV has arrived: request, decode worker
HANDOVER = 4  # a migration's copy has caught up: request, id of the migration
ROUND = 5  # rescheduling: -, -
SAMPLE = 6  # the load is recorded: -, -
ADMIT = 7  # workers have reported, and requests wait for room: -, -

Event: TypeAlias = tuple[float, int, int, int, int]


class EventQueue:
    """A heap of ``(time, number, kind, x, y)``; ``now``: the time of the event being handled."""

    __slots__ = ("_number", "heap", "now")

    def __init__(self) -> None:
        self.heap: list[Event] = []
        self.now = 0.0
        self._number = 0

    def push(self, time_s: float, kind: int, x: int = 0, y: int = 0) -> None:
        """``kind`` happens at ``time_s``."""
        self._number += 1
        heappush(self.heap, (time_s, self._number, kind, x, y))
