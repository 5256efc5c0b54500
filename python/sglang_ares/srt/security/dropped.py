"""Counts and logs what a socket did not let in; a flood of it does not flood the log."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

_BURST = 5
_INTERVAL_S = 10.0
_TEXT_CHARS = 300


class DroppedFrames:
    """What one receiver dropped. ``where`` names it in logs and metrics; at most five lines in
    ten seconds are logged, with the number of those that were not."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.total = 0
        self._untold = 0
        self._lines = 0
        self._interval_ends = 0.0

    def count(self, reason: str, *, error: BaseException | None = None) -> None:
        """One more; with ``error`` the trace is logged too."""
        self.total += 1
        now = time.monotonic()
        if now >= self._interval_ends:
            self._interval_ends = now + _INTERVAL_S
            self._lines = 0
        if self._lines >= _BURST:
            self._untold += 1
            return
        self._lines += 1
        logger.warning(
            "%s dropped a control message: %s%s",
            self.where,
            # A peer may have chosen parts of the text: one line, of bounded length.
            reason.encode("unicode_escape").decode()[:_TEXT_CHARS],
            f" (and {self._untold} more that were not logged)" if self._untold else "",
            exc_info=error,
        )
        self._untold = 0
