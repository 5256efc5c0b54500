"""Requests that wait in the controller until a decode worker has room for them."""

from __future__ import annotations

import math
from collections.abc import Callable

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.events import ADMIT, EventQueue
from sglang_ares.simulator.view import DecodeView
from sglang_ares.srt.policy.admission import kept_for_oldest, next_in_turn, room
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest

# A report that does not wait for its time comes after this share of the interval at the earliest.
AT_ONCE = 0.1


class HeldRequests:
    """``bind`` places a request on one of the given workers. The controller learns from the
    workers' reports that there is room, and so does this: from the regular ones, and from those
    that follow the end of a request at once."""

    def __init__(
        self,
        config: SimulationConfig,
        events: EventQueue,
        view: DecodeView,
        bind: Callable[[NewRequest, WorkerTable], None],
    ) -> None:
        self._slo_s = config.ttft_slo_ms * 1e-3
        self._reserved = config.reserved_tokens
        self._interval_s = config.report_interval_s
        self._events = events
        self._view = view
        self._bind = bind
        # In order of arrival.
        self._held: list[NewRequest] = []
        self._arrived_s: list[float] = []
        self._tokens: list[int] = []
        self._admitted = 0
        # The worker that is kept for the oldest, if one is.
        self.kept: int | None = None
        self._due_s = math.inf

    def arrive(self, new: NewRequest) -> None:
        """A request arrives: it is bound now if there is room and nobody goes before."""
        self._held.append(new)
        self._arrived_s.append(self._events.now)
        self._tokens.append(new.prompt_tokens)
        self._let_in()

    def on_end(self) -> None:
        """A request has ended, and its worker says so."""
        if self._held:
            soon_s = self._view.reported_s + self._interval_s * AT_ONCE
            self._expect(max(self._events.now, soon_s))

    def on_reports(self) -> None:
        """The workers have reported."""
        if self._events.now >= self._due_s:
            self._due_s = math.inf
            self._view.report()
            self._let_in()

    def _expect(self, due_s: float) -> None:
        if due_s < self._due_s:
            self._due_s = due_s
            self._events.push(due_s, ADMIT)

    def _let_in(self) -> None:
        now = self._events.now
        while self._held:
            workers = self._view.workers(now)
            free = room(workers, self._reserved)
            waiting = self._arrived_s, self._tokens, free, now, self._slo_s, self._admitted
            self.kept = kept_for_oldest(*waiting, self.kept)
            turn = next_in_turn(*waiting, self.kept)
            if turn is None:
                self._expect(self._view.reported_s + self._interval_s)
                return
            at, rows, counts = turn
            new = self._held.pop(at)
            waited_s = now - self._arrived_s.pop(at)
            del self._tokens[at]
            # It had waited itself, or has passed one that waits.
            self._admitted += counts and (waited_s > 0 or at > 0)
            self._bind(new, workers if len(rows) == len(workers) else workers.take(rows))
        self.kept = None
