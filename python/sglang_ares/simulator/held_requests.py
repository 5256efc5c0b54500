"""Requests that wait in the controller until a decode worker has room for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.events import ADMIT, EventQueue
from sglang_ares.simulator.view import DecodeView
from sglang_ares.srt.policy.admission import has_room, next_in_turn
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest


class HeldRequests:
    """``bind`` places a request on one of the given workers. The controller learns from the
    workers' reports that there is room, and so does this."""

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
        self._admitted = 0
        self._reports_due = False

    def arrive(self, new: NewRequest) -> None:
        """A request arrives: it is bound now if there is room and nobody goes before."""
        self._held.append(new)
        self._arrived_s.append(self._events.now)
        self._let_in()

    def on_reports(self) -> None:
        """The workers have reported."""
        self._reports_due = False
        self._let_in()

    def _let_in(self) -> None:
        now = self._events.now
        while self._held:
            workers = self._view.workers(now)
            at = next_in_turn(self._arrived_s, now, self._slo_s, self._admitted)
            new = self._held[at]
            rows = np.flatnonzero(has_room(new.prompt_tokens, workers, self._reserved))
            if not len(rows):
                if not self._reports_due:
                    self._reports_due = True
                    self._events.push(now + self._interval_s, ADMIT)
                return
            del self._held[at]
            self._admitted += self._arrived_s.pop(at) < now
            self._bind(new, workers if len(rows) == len(workers) else workers.take(rows))
