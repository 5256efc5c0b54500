"""The figures of a run: percentiles, a table for the terminal, a document for JSON."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sglang_ares.bench.replay import LoadSample, Run


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-th percentile (0–100), linear between neighbours; NaN of nothing."""
    return float(np.percentile(values, q)) if values else math.nan


def imbalance(samples: Sequence[LoadSample]) -> float:
    """Mean over time of the largest decode worker's KV tokens over the workers' mean.

    1 is even, the number of workers is all on one; samples of an empty cluster do not count.
    NaN without any other.
    """
    ratios = [
        max(loads) * len(loads) / sum(loads)
        for loads in (list(sample.kv_tokens.values()) for sample in samples)
        if sum(loads) > 0
    ]
    return sum(ratios) / len(ratios) if ratios else math.nan


def mean_gap_tokens(samples: Sequence[LoadSample]) -> float:
    """Mean over time of the KV tokens between the most and the least loaded decode worker."""
    gaps = [max(s.kv_tokens.values()) - min(s.kv_tokens.values()) for s in samples if s.kv_tokens]
    return sum(gaps) / len(gaps) if gaps else math.nan


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run. TPOT and TTFT are over the completed requests, in milliseconds."""

    completed: int
    failed: int
    migrations: int
    mismatches: int
    duration_s: float
    output_tokens: int
    tokens_per_s: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    peak_kv_tokens: dict[int, int]
    imbalance: float
    mean_gap_tokens: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rounded; NaN becomes null."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def summarize(run: Run, mismatches: int) -> RunSummary:
    """The figures of ``run``, of which ``mismatches`` answers differ from the reference's."""
    completed = [r for r in run.results if r.completed]
    tpot_ms = [1e3 * r.tpot_s for r in completed if r.tpot_s is not None]
    ttft_ms = [1e3 * r.ttft_s for r in completed if r.ttft_s is not None]
    workers = sorted({w for sample in run.samples for w in sample.kv_tokens})
    return RunSummary(
        completed=len(completed),
        failed=len(run.results) - len(completed),
        migrations=run.migrations,
        mismatches=mismatches,
        duration_s=run.duration_s,
        output_tokens=run.tokens,
        tokens_per_s=run.tokens / run.duration_s if run.duration_s > 0 else math.nan,
        tpot_p50_ms=percentile(tpot_ms, 50),
        tpot_p99_ms=percentile(tpot_ms, 99),
        ttft_p50_ms=percentile(ttft_ms, 50),
        ttft_p99_ms=percentile(ttft_ms, 99),
        peak_kv_tokens={w: max(s.kv_tokens.get(w, 0) for s in run.samples) for w in workers},
        imbalance=imbalance(run.samples),
        mean_gap_tokens=mean_gap_tokens(run.samples),
    )


def series(samples: Sequence[LoadSample]) -> dict[str, Any]:
    """The samples as columns: seconds, KV tokens by worker, migrations so far."""
    workers = sorted({w for sample in samples for w in sample.kv_tokens})
    return {
        "time_s": [round(s.time_s, 2) for s in samples],
        "kv_tokens": {str(w): [s.kv_tokens.get(w, 0) for s in samples] for w in workers},
        "migrations": [s.migrations for s in samples],
    }


def comparison_table(runs: Mapping[str, RunSummary], title: str = "") -> Table:
    """One column per run, one row per figure."""
    rows: list[tuple[str, list[str]]] = [
        ("completed", [str(s.completed) for s in runs.values()]),
        ("failed", [str(s.failed) for s in runs.values()]),
        ("migrations", [str(s.migrations) for s in runs.values()]),
        ("mismatches", [str(s.mismatches) for s in runs.values()]),
        ("tok/s", [f"{s.tokens_per_s:.0f}" for s in runs.values()]),
        ("TPOT p50 / p99", [_pair_ms(s.tpot_p50_ms, s.tpot_p99_ms) for s in runs.values()]),
        ("TTFT p50 / p99", [_pair_ms(s.ttft_p50_ms, s.ttft_p99_ms) for s in runs.values()]),
    ]
    for worker in sorted({w for s in runs.values() for w in s.peak_kv_tokens}):
        peaks = [f"{s.peak_kv_tokens.get(worker, 0):,} tokens" for s in runs.values()]
        rows.append((f"peak KV, decode worker {worker}", peaks))
    rows.append(("mean KV gap", [f"{s.mean_gap_tokens:,.0f} tokens" for s in runs.values()]))
    rows.append(("max/mean KV, over time", [f"{s.imbalance:.2f}" for s in runs.values()]))
    table = Table(title=title or None, title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "sglang": version("sglang"),
    }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document``, each list of numbers on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dump(document, "") + "\n")


def _dump(value: Any, indent: str) -> str:
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    items = [f"{inner}{json.dumps(str(key))}: {_dump(v, inner)}" for key, v in value.items()]
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def _pair_ms(p50: float, p99: float) -> str:
    return f"{p50:.0f} / {p99:.0f} ms"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}
    return value
