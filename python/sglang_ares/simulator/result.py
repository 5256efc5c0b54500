"""What a simulation yields: per-request figures, load samples, and their summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.request_log import Stay
from sglang_ares.simulator.roles.history import RoleHistory
from sglang_ares.srt.policy.snapshot import Bools, Floats, Ints


@dataclass(frozen=True, eq=False)
class Result:
    """``N`` requests in order of arrival; times in seconds since the start, NaN for requests that
    were rejected (they could never fit into a worker's KV memory).

    ``longest_gap_s``: longest time between two tokens. ``retractions``, ``moves``: how often.
    ``worker``: the decode worker it ended on, -1 if rejected. ``sample_s`` ``(S,)`` and
    ``sample_tokens`` ``(S, W)``: resident tokens of the decode workers over time. ``counters``:
    migrations, their tokens, retractions, rounds. ``wall_s``, ``cpu_s``: what the simulation took.
    ``stays``: where each request was computed, if that was recorded. ``roles``: how workers changed
    their roles, if they could.
    """

    config: SimulationConfig
    workload: str
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    prefilled_s: Floats
    first_token_s: Floats
    finished_s: Floats
    longest_gap_s: Floats
    retractions: Ints
    moves: Ints
    worker: Ints
    sample_s: Floats
    sample_tokens: NDArray[np.int64]
    counters: Mapping[str, int]
    wall_s: float
    cpu_s: float
    stays: tuple[Stay, ...] | None = None
    roles: RoleHistory | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ttft_s(self) -> Floats:
        """``(N,)`` arrival to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """``(N,)`` mean time between two tokens; NaN for a single token."""
        intervals = self.output_tokens - 1
        span = self.finished_s - self.first_token_s
        return np.where(intervals > 0, span / np.maximum(intervals, 1), np.nan)

    @property
    def counted(self) -> Bools:
        """``(N,)`` requests that the statistics are about: those that arrive after the warm-up."""
        return self.arrival_s >= self.config.warmup_s

    def meets_slo(self) -> tuple[Bools, Bools]:
        """``(N,)`` each: whether TTFT and TPOT are within their SLO; a rejected request meets
        neither, one of a single token meets that for TPOT."""
        served = ~np.isnan(self.finished_s)
        ttft, tpot = self.config.ttft_slo_ms, self.config.tpot_slo_ms
        first = served & (self.ttft_s * 1e3 <= ttft) if ttft > 0 else served
        each = served & ~(self.tpot_s * 1e3 > tpot) if tpot > 0 else served
        return first, each

    def attainment(self) -> float:
        """Share of the counted requests that meet both SLOs; 1 if there are none."""
        first, each = self.meets_slo()
        counted = self.counted
        return float((first & each)[counted].mean()) if counted.any() else 1.0

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON; None where there is nothing to take a figure of."""
        counted = self.counted
        served = counted & ~np.isnan(self.finished_s)
        first, each = self.meets_slo()
        end_s = float(np.nanmax(self.finished_s)) if served.any() else 0.0
        n = int(counted.sum())
        kv_bytes = self.config.profile.kv_bytes_per_token
        return {
            "workload": self.workload,
            "requests": n,
            "rejected": int((counted & ~served).sum()),
            "makespan_s": end_s,
            "output_tokens_per_s": float(self.output_tokens[~np.isnan(self.finished_s)].sum())
            / end_s
            if end_s
            else None,
            "requests_per_s": len(self) / end_s if end_s else None,
            "ttft_ms": _distribution(self.ttft_s[served] * 1e3),
            "tpot_ms": _distribution(self.tpot_s[served] * 1e3),
            "longest_gap_ms": _distribution(self.longest_gap_s[served] * 1e3),
            "slo": {
                "ttft_ms": self.config.ttft_slo_ms,
                "tpot_ms": self.config.tpot_slo_ms,
                "ttft_attainment": float(first[counted].mean()) if n else None,
                "tpot_attainment": float(each[counted].mean()) if n else None,
                "attainment": self.attainment() if n else None,
                "goodput_per_s": float((first & each).sum()) / end_s if end_s else None,
            },
            **self.counters,
            "moved_bytes": self.counters["moved_tokens"] * kv_bytes,
            "imbalance": self._imbalance(),
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
        }

    def _imbalance(self) -> dict[str, float] | None:
        """Most over mean resident tokens, and their coefficient of variation across workers:
        means over the samples during which requests arrived and something ran."""
        last = self.arrival_s[-1] if len(self) else 0.0
        busy = (self.sample_tokens.sum(axis=1) > 0) & (self.sample_s <= last)
        busy &= self.sample_s >= self.config.warmup_s
        if not busy.any():
            return None
        tokens = self.sample_tokens[busy]
        mean = tokens.mean(axis=1)
        return {
            "max_over_mean": float((tokens.max(axis=1) / mean).mean()),
            "cv": float((tokens.std(axis=1) / mean).mean()),
        }

    def to_dict(self, *, raw: bool = False) -> dict[str, Any]:
        """Configuration and summary, with ``raw`` the columns too; ready for JSON."""
        document: dict[str, Any] = {
            "config": msgspec.to_builtins(self.config),
            "summary": self.summary(),
        }
        if self.roles is not None:
            document["roles"] = {"sample_s": self.sample_s.tolist(), **self.roles.to_dict()}
        if raw:
            names = (
                "arrival_s prompt_tokens output_tokens prefilled_s first_token_s finished_s "
                "longest_gap_s retractions moves worker sample_s sample_tokens"
            )
            document["raw"] = {name: _listed(getattr(self, name)) for name in names.split()}
        return document


def _listed(column: Any) -> list[Any]:
    """A column as JSON has it: NaN becomes null."""
    if column.dtype.kind == "f":
        return [None if np.isnan(x) else x for x in column.tolist()]
    listed: list[Any] = column.tolist()
    return listed


def _distribution(values: Floats) -> dict[str, float] | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {
        "mean": float(values.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(values.max()),
    }
