"""Pictures of simulations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sglang_ares.simulator.goodput import Point
from sglang_ares.simulator.result import Result

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Up to so many workers, each has a line; beyond, only their range is drawn.
_MOST_LINES = 16


def plot_load(path: Path, results: Mapping[str, Result]) -> None:
    """Resident tokens of the decode workers over time: one panel per result, titled with its key,
    the capacity dashed, the range between the least and the most loaded worker shaded."""
    figure = Figure(figsize=(10, 1 + 2.8 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        times, tokens = result.sample_s, result.sample_tokens
        workers = tokens.shape[1]
        axes.fill_between(
            times,
            tokens.min(axis=1),
            tokens.max(axis=1),
            color="#999999",
            alpha=0.3,
            linewidth=0,
            label="least to most loaded",
        )
        if workers <= _MOST_LINES:
            for worker in range(workers):
                axes.plot(times, tokens[:, worker], color=COLOURS[worker % 6], linewidth=0.9)
        axes.plot(times, tokens.mean(axis=1), color="black", linewidth=1.6, label="mean")
        capacity = result.config.profile.kv_capacity_tokens
        axes.axhline(capacity, color="#D55E00", linestyle="--", linewidth=1, label="KV capacity")
        axes.set_title(f"{name} ({workers} decode workers)", loc="left", fontsize=11)
        axes.set_ylabel("resident tokens")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", fontsize=9, ncols=3
    )
    panels[-1].set_xlabel("time (seconds)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def plot_attainment(path: Path, points: Mapping[str, Sequence[Point]], *, title: str = "") -> None:
    """Share of requests within both SLOs against the request rate, a line per arm."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, tried) in enumerate(points.items()):
        ordered = sorted(tried, key=lambda p: p.rate)
        axes.plot(
            [p.rate for p in ordered],
            [100 * p.attainment for p in ordered],
            color=COLOURS[index % len(COLOURS)],
            marker="o",
            markersize=4,
            label=name,
        )
    for share in (90, 99):
        axes.axhline(share, color="#999999", linestyle=":", linewidth=1)
    rates = [p.rate for tried in points.values() for p in tried]
    if rates:
        axes.set_xlim(0, 1.05 * float(np.max(rates)))
    axes.set_ylim(0, 101)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("requests within both SLOs (%)")
    axes.set_title(title, loc="left")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
