"""Figures of single moves: how long the moved request paused, what the others' steps took."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sglang_ares.bench.report import percentile

# The pause may take this many decode steps, or this many milliseconds, whichever is more.
P50_STEPS, P50_MS = 2, 20.0
P99_STEPS, P99_MS = 4, 50.0
_LANDED = re.compile(r"rid=(\S+?)(?:#\d+)? landed on=(\d+) pause_ms=([\d.]+) steps=(\d+)")


@dataclass(frozen=True)
class Landing:
    """A worker's log line about a moved request: ``pause_ms`` from its last token on the source to
    its first on the target, ``steps`` that the target ended in that time."""

    rid: str
    worker: int
    pause_ms: float
    steps: int


@dataclass(frozen=True)
class Move:
    """One completed move. ``length``: context (tokens) that was asked for; ``duration_ms``: from
    the command to the end; ``step_ms``: what a decode step of the moved request took around it."""

    arm: str
    length: int
    pause_ms: float
    steps: int
    duration_ms: float
    step_ms: float
    tokens_sent: int
    tokens_saved: int


@dataclass(frozen=True)
class PauseSummary:
    """The moves of one arm at one length; times in milliseconds."""

    moves: int
    pause_p50_ms: float
    pause_p99_ms: float
    steps_p50: float
    steps_p99: float
    step_ms: float
    duration_p50_ms: float
    within_target: bool


def parse_landings(log: str) -> list[Landing]:
    """All landings that a server's log tells of, in order."""
    return [
        Landing(m[1], int(m[2]), float(m[3]), int(m[4]))
        for m in map(_LANDED.search, log.split("\n"))
        if m
    ]


def summarize_pauses(moves: Sequence[Move]) -> PauseSummary:
    """Percentiles over ``moves``, and whether they meet the target."""
    pauses = [m.pause_ms for m in moves]
    p50, p99 = percentile(pauses, 50), percentile(pauses, 99)
    step_ms = percentile([m.step_ms for m in moves], 50)
    return PauseSummary(
        moves=len(moves),
        pause_p50_ms=round(p50, 2),
        pause_p99_ms=round(p99, 2),
        steps_p50=percentile([m.steps for m in moves], 50),
        steps_p99=percentile([m.steps for m in moves], 99),
        step_ms=round(step_ms, 2),
        duration_p50_ms=round(percentile([m.duration_ms for m in moves], 50), 1),
        within_target=p50 <= p50_target_ms(step_ms) and p99 <= max(P99_STEPS * step_ms, P99_MS),
    )


def p50_target_ms(step_ms: float) -> float:
    """The longest median pause that is on target where a decode step takes ``step_ms``."""
    return max(P50_STEPS * step_ms, P50_MS)


def gaps_ending_within(times: Sequence[float], start: float, end: float) -> list[float]:
    """Seconds between neighbouring ``times`` (ascending), of those gaps that end within
    [start, end]."""
    return [b - a for a, b in pairwise(times) if start <= b <= end]


def longest_gap(times: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """Beginning and end of the longest gap that ends within [start, end]; ``start`` twice if there
    is none."""
    gaps = [(b - a, a, b) for a, b in pairwise(times) if start <= b <= end]
    if not gaps:
        return start, start
    _, a, b = max(gaps)
    return a, b


@dataclass(frozen=True)
class StepRatio:
    """Mean step while something happens over the mean without, with the 95 % bootstrap interval."""

    ratio: float
    low: float
    high: float


def step_ratio(
    during: Sequence[Sequence[float]], without: Sequence[Sequence[float]], seed: int = 0
) -> StepRatio:
    """Over several loads: ``during[i]`` and ``without[i]`` are the gaps (seconds) under load i.
    Each gap counts relative to its own load's mean without, so that loads with slower steps do not
    weigh more, nor do those with more copies look slower. Gaps are resampled as if independent.
    NaN without gaps."""
    pairs = [
        (np.asarray(d), np.asarray(b))
        for d, b in zip(during, without, strict=True)
        if len(d) and len(b)
    ]
    if not pairs:
        return StepRatio(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(1000):
        drawn = [(rng.choice(d, len(d)), rng.choice(b, len(b)).mean()) for d, b in pairs]
        draws.append(np.concatenate([d / b for d, b in drawn]).mean())
    low, high = np.percentile(draws, [2.5, 97.5])
    ratio = np.concatenate([d / b.mean() for d, b in pairs]).mean()
    return StepRatio(float(ratio), float(low), float(high))


def plot_pauses(path: Path, arms: Mapping[str, Mapping[int, PauseSummary]], *, title: str) -> None:
    """Write a PNG: pause over context length, p50 as line and p99 as dashed line for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for (arm, by_length), colour in zip(arms.items(), ("#0072B2", "#D55E00"), strict=False):
        lengths = sorted(by_length)
        for field, style in (("pause_p50_ms", "-"), ("pause_p99_ms", "--")):
            axes.plot(
                lengths,
                [getattr(by_length[n], field) for n in lengths],
                color=colour,
                linestyle=style,
                marker="o",
                label=f"{arm}, {field[6:9]}",
            )
    lengths = sorted({n for by_length in arms.values() for n in by_length})
    steps = {n: max(a[n].step_ms for a in arms.values() if n in a) for n in lengths}
    axes.plot(
        lengths,
        [p50_target_ms(steps[n]) for n in lengths],
        color="#999999",
        linewidth=1,
        label=f"target p50: {P50_MS:.0f} ms, or {P50_STEPS} decode steps",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("context of the moved request (tokens)")
    axes.set_ylabel("pause (ms)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    axes.set_title(title, loc="left", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def as_document(arms: Mapping[str, Mapping[int, PauseSummary]]) -> dict[str, Any]:
    """For JSON."""
    return {
        arm: {str(n): asdict(s) for n, s in by_length.items()} for arm, by_length in arms.items()
    }
