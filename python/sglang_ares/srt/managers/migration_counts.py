"""How migrations ended so far, and why they were commanded."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sglang_ares.srt.disaggregation.migration import CANCELLED, COMPLETED, REFUSED
from sglang_ares.srt.managers.cluster_views import CAUSES
from sglang_ares.srt.managers.io_struct import MigrationResult


class MigrationCounts:
    """``attempted``: all that were commanded; of those that have ended ``completed`` or, by reason,
    ``refused``, ``failed`` and ``cancelled``."""

    def __init__(self) -> None:
        self.attempted = 0
        self.completed = 0
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self._tokens_sent = 0
        self._tokens_saved = 0
        self._by_cause: Counter[str] = Counter()

    def started(self, cause: str) -> None:
        """One was commanded."""
        self.attempted += 1
        self._by_cause[cause] += 1

    def ended(self, result: MigrationResult) -> None:
        """One ended, either way."""
        self._tokens_sent += result.tokens_sent
        self._tokens_saved += result.tokens_saved
        if result.outcome == COMPLETED:
            self.completed += 1
            return
        counter = {REFUSED: self.refused, CANCELLED: self.cancelled}.get(
            result.outcome, self.failed
        )
        # The stable part of a reason is what stands before its explanation.
        counter[result.reason.split(":", 1)[0]] += 1

    def document(self, in_flight: int) -> dict[str, Any]:
        """What ``GET /ares/status`` says of migrations."""
        return {
            "attempted": self.attempted,
            "completed": self.completed,
            "refused": dict(self.refused),
            "failed": dict(self.failed),
            "cancelled": dict(self.cancelled),
            "in_flight": in_flight,
            "tokens_sent": self._tokens_sent,
            "tokens_saved": self._tokens_saved,
            "causes": {cause: self._by_cause[cause] for cause in CAUSES},
        }
