"""The controller's side of memory relief: when to ask the policy, and what it learns of moves."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from sglang_ares.srt.disaggregation.migration import COMPLETED, REFUSED
from sglang_ares.srt.policy.memory_relief import ReliefLimits, is_short, memory_relief
from sglang_ares.srt.policy.types import DECODE, Move

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.io_struct import MigrationResult, WorkerReport

logger = logging.getLogger(__name__)

# What a move is reckoned to take (s) before any was measured; how many measurements count.
_FIRST_GUESS_S = 0.5
_REMEMBERED = 32
# A target that had no memory after all is left alone for this long (s).
_CLOSED_S = 1.0


class MemoryRelief:
    """Runs the policy whenever a worker reports that its KV runs short.

    ``report_interval_s``: between two reports of a worker. ``floor``: share of a worker's KV that
    stays free. ``reserved_tokens``: upstream's ``--num-reserved-decode-tokens``.
    """

    def __init__(
        self,
        *,
        report_interval_s: float,
        floor: float,
        reserved_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report_interval_s = report_interval_s
        self._floor = floor
        self._reserved_tokens = reserved_tokens
        self._clock = clock
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._closed_until: dict[int, float] = {}

    @property
    def limits(self) -> ReliefLimits:
        """The policy's limits now: two reports may pass, and a move takes as long as it does."""
        moving_s = (
            sum(self._durations) / len(self._durations) if self._durations else _FIRST_GUESS_S
        )
        return ReliefLimits(
            horizon_s=2 * (self._report_interval_s + moving_s),
            floor=self._floor,
            reserved_tokens=self._reserved_tokens,
        )

    def plan(self, report: WorkerReport, state: ClusterState) -> tuple[Move, ...]:
        """Moves out of the worker that has just reported, and out of others that are short."""
        limits = self.limits
        if report.load.role != DECODE or not is_short(report.load, limits):
            return ()
        now = self._clock()
        full = {worker for worker, until in self._closed_until.items() if now < until}
        moves = memory_relief(state.loads(DECODE), limits, full | state.closed)
        for move in moves:
            logger.info("memory relief: %s leaves %d for %d", move.rid, move.source, move.target)
        return moves

    def note_result(self, result: MigrationResult) -> None:
        """How long moves take, and which target had no memory."""
        if result.outcome == COMPLETED:
            self._durations.append(result.duration_s)
        elif result.outcome == REFUSED and result.reason.startswith("no KV memory"):
            self._closed_until[result.target] = self._clock() + _CLOSED_S
