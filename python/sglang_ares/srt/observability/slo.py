"""SLO attainment: the share of requests that were served as promised, over sliding windows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_ares.srt.policy.elastic.instances import Slo

# Lengths of the windows, seconds.
WINDOWS_S = (60, 600)
# What a share is told of: either promise, and all that was promised.
KINDS = ("ttft", "tpot", "both")


class Served(NamedTuple):
    """A request that has ended, as its client saw it: seconds to the first token, seconds from
    there to the last, and output tokens."""

    ttft_s: float
    decode_s: float
    tokens: int

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; 0 if there is none."""
        return self.decode_s / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass
class _Second:
    """Requests that ended within a second, and those of them that met each promise."""

    at: int
    requests: int = 0
    ttft: int = 0
    tpot: int = 0
    both: int = 0


class SloAttainment:
    """Counts requests as they end, by the second. A promise of 0 ms is none: it is met by all,
    and no share of it is told. ``dilation``: how much slower than real time an emulated cluster
    runs; its windows are that much longer, ``slo`` is as the wall has it. Times are monotonic
    seconds."""

    def __init__(self, slo: Slo, dilation: float = 1.0) -> None:
        self.slo = slo
        self._dilation = dilation
        self._seconds: deque[_Second] = deque()

    def served(self, request: Served, now: float) -> None:
        """A request came to its end."""
        ttft = not self.slo.ttft_ms or 1e3 * request.ttft_s <= self.slo.ttft_ms
        tpot = not self.slo.tpot_ms or 1e3 * request.tpot_s <= self.slo.tpot_ms
        self._count(now, ttft, tpot)

    def failed(self, now: float) -> None:
        """A request was answered with an error of the cluster's: no promise was kept."""
        self._count(now, ttft=False, tpot=False)

    def _count(self, now: float, ttft: bool, tpot: bool) -> None:
        at = self._second(now)
        if not self._seconds or self._seconds[-1].at != at:
            self._seconds.append(_Second(at))
            while self._seconds[0].at <= at - max(WINDOWS_S):
                self._seconds.popleft()
        second = self._seconds[-1]
        second.requests += 1
        second.ttft += ttft
        second.tpot += tpot
        second.both += ttft and tpot

    def _second(self, now: float) -> int:
        return int(now / self._dilation)

    def window(self, window_s: int, now: float) -> dict[str, float | int | None]:
        """Requests that ended within the last ``window_s`` seconds, and the shares (0 to 1) of
        :data:`KINDS`; None without a request, or for a promise that was not made."""
        since = self._second(now) - window_s
        counted = [second for second in self._seconds if second.at > since]
        requests = sum(second.requests for second in counted)
        promised = {"ttft": self.slo.ttft_ms, "tpot": self.slo.tpot_ms, "both": 1.0}
        shares: dict[str, float | int | None] = {
            kind: sum(getattr(second, kind) for second in counted) / requests
            if requests and promised[kind]
            else None
            for kind in KINDS
        }
        return {"requests": requests, **shares}

    def status(self, now: float) -> dict[str, Any]:
        """The member ``slo`` of ``GET /ares/status``."""
        return {
            "ttft_slo_ms": self.slo.ttft_ms or None,
            "tpot_slo_ms": self.slo.tpot_ms or None,
            "windows": {str(window_s): self.window(window_s, now) for window_s in WINDOWS_S},
        }
