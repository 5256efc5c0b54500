"""The picture of two or more runs: KV tokens of each decode worker over time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sglang_ares.bench.replay import Run

# Okabe and Ito's colours, told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLES = ("-", "--", "-.", ":")


def migration_times(run: Run) -> list[float]:
    """When migrations were seen to complete, one entry each; seconds since the start."""
    times: list[float] = []
    for before, after in pairwise(run.samples):
        times += [after.time_s] * (after.migrations - before.migrations)
    return times


def plot_kv_over_time(path: Path, runs: Mapping[str, Run], *, title: str, note: str = "") -> None:
    """Write a PNG: one panel per run, titled with its key, one line per decode worker.

    The gap between the most and the least loaded worker is shaded; migrations are marked.
    """
    figure = Figure(figsize=(10, 1.2 + 2.9 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)
    panels = [row[0] for row in grid]
    all_samples = [sample for run in runs.values() for sample in run.samples]
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        _panel(axes, run)
        axes.set_title(name, loc="left", fontsize=12)
        axes.set_ylabel("KV tokens held", fontsize=11)
    # Room below zero for the marks.
    highest = max((max(s.kv_tokens.values(), default=0) for s in all_samples), default=0)
    panels[0].set_ylim(-0.09 * max(highest, 1), 1.08 * max(highest, 1))
    panels[0].set_xlim(
        0, max((r.samples[-1].time_s for r in runs.values() if r.samples), default=1)
    )
    panels[-1].set_xlabel("time since the first request (seconds)", fontsize=11)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    if note:
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Any, run: Run) -> None:
    times = [s.time_s for s in run.samples]
    workers = sorted({w for s in run.samples for w in s.kv_tokens})
    held = {w: [s.kv_tokens.get(w, 0) for s in run.samples] for w in workers}
    for index, worker in enumerate(workers):
        axes.plot(
            times,
            held[worker],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_STYLES[index // len(_COLOURS) % len(_STYLES)],
            linewidth=1.8,
            label=f"decode worker {worker}",
        )
    if len(workers) > 1:
        columns = list(zip(*held.values(), strict=True))
        axes.fill_between(
            times,
            [min(c) for c in columns],
            [max(c) for c in columns],
            color="#999999",
            alpha=0.3,
            linewidth=0,
            label="gap between them",
        )
    moved = migration_times(run)
    if moved:
        axes.plot(
            moved,
            [0.035] * len(moved),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker="|",
            markersize=10,
            markeredgewidth=1.3,
            color="black",
            label="a request was moved",
        )
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if workers:
        axes.legend(loc="upper left", fontsize=10, frameon=True, framealpha=0.9, edgecolor="none")
