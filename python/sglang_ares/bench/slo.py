"""Service-level objectives, and the share of requests that meet them."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_ares.bench.replay import RequestResult, Run

# Shares of requests that must meet both SLOs for a rate to count; the first is the headline.
ATTAINMENTS = (0.9, 0.99)


@dataclass(frozen=True)
class Slo:
    """Time to first token and mean time per output token after it, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def met_by(self, result: RequestResult) -> bool:
        """Whether a request was answered within both; one token has no time between tokens."""
        if not result.completed or result.ttft_s is None:
            return False
        in_time = 1e3 * result.ttft_s <= self.ttft_ms
        return in_time and (result.tpot_s is None or 1e3 * result.tpot_s <= self.tpot_ms)

    def attainment(self, run: Run, warmup_s: float = 0.0) -> float:
        """Share of the requests sent after ``warmup_s`` that meet both; 1 if there are none."""
        counted = [r for r in run.results if r.sent_s >= warmup_s]
        return sum(map(self.met_by, counted)) / len(counted) if counted else 1.0
