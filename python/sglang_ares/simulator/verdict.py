"""Whether enough requests meet their SLOs, known as soon as it is certain."""

from __future__ import annotations

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.request_log import RequestLog


class Verdict:
    """Counts, of the requests that the statistics are about, those that are known to meet both
    SLOs and those that are known to miss one.

    ``decided``: whether ``share`` of them do, or cannot any more, whatever becomes of the rest.
    """

    def __init__(self, config: SimulationConfig, stream: RequestStream, share: float) -> None:
        self._config = config
        counted = int((stream.arrival_s >= config.warmup_s).sum())
        self._counted = counted
        self._share = share
        self._met = 0
        self._missed = 0
        self.decided = not counted

    def rejected(self, arrival_s: float) -> None:
        """A request that arrived at ``arrival_s`` was rejected."""
        self._count(arrival_s, met=False)

    def ended(self, request: int, log: RequestLog) -> None:
        """``request`` has ended (:meth:`Result.meets_slo` for a single one)."""
        config = self._config
        arrival_s, first_s = log.arrival_s[request], log.first_token_s[request]
        intervals = log.wanted[request] - 1
        met = not config.ttft_slo_ms > 0 or (first_s - arrival_s) * 1e3 <= config.ttft_slo_ms
        if met and intervals > 0 and config.tpot_slo_ms > 0:
            met = (log.finished_s[request] - first_s) / intervals * 1e3 <= config.tpot_slo_ms
        self._count(arrival_s, met=met)

    @property
    def most(self) -> float:
        """The highest attainment that is still possible."""
        return 1 - self._missed / self._counted if self._counted else 1.0

    def _count(self, arrival_s: float, *, met: bool) -> None:
        if arrival_s >= self._config.warmup_s:
            self._met += met
            self._missed += not met
            self.decided = self._met / self._counted >= self._share or self.most < self._share
