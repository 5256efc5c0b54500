"""Pictures of an evaluation, and of predictions over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from sglang_ares.srt.policy.types import LEVELS

_COLORS: Final = {
    "mean": "#bbbbbb",
    "survival": "#999933",
    "prompt_only": "#cc6677",
    "l1": "#4477aa",
    "ours": "#117733",
}
_LABELS: Final = {
    "mean": "mean",
    "survival": "survival prior",
    "prompt_only": "prompt-only transformer",
    "l1": "L1 head (paper)",
    "ours": "ours",
}


def plot_errors(path: Path, report: Mapping[str, Any]) -> None:
    """MAE by tokens generated so far, and by the output's length; one line an arm."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, key, text in (
        (axes[0], "by_generated", "output tokens generated when predicted"),
        (axes[1], "by_length", "output tokens in all"),
    ):
        for name, arm in report["arms"].items():
            bins = arm[key]
            places = range(len(bins))
            axis.plot(
                places, [b["mae"] for b in bins], "o-", color=_COLORS[name], label=_LABELS[name]
            )
            axis.set_xticks(places, [_range(b) for b in bins], rotation=30, ha="right")
        axis.set_xlabel(text)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MAE of the remaining length (tokens)")
    axes[0].legend(frameon=False, fontsize=9)
    test = report["test"]
    figure.suptitle(
        f"Remaining length on {report['model']}: {test['requests']} test requests, "
        f"{test['labels']} labels",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


_DRIFT: Final = (("uncorrected", "#cc6677"), ("corrected", "#117733"))


def plot_drift(path: Path, report: Mapping[str, Any]) -> None:
    """MAE with and without the online correction: over the requests' order, and by tokens
    generated so far."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9))
    parts = report["in_order"]
    bins = report["corrected"]["by_generated"]
    for name, color in _DRIFT:
        ends = [part["below"] for part in parts]
        left.plot(ends, [part[f"mae_{name}"] for part in parts], "o-", color=color, label=name)
        errors = [b["mae"] for b in report[name]["by_generated"]]
        right.plot(range(len(bins)), errors, "o-", color=color, label=name)
    left.set_xlabel("requests that have come so far")
    right.set_xticks(range(len(bins)), [_range(b) for b in bins], rotation=30, ha="right")
    right.set_xlabel("output tokens generated when predicted")
    for axis in (left, right):
        axis.set_ylabel("MAE of the remaining length (tokens)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    trained, tested = report["trained_on"], report["tested_on"]
    figure.suptitle(
        f"Head trained on {trained!r}, {report['requests']} requests of {tested!r}", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _range(b: Mapping[str, Any]) -> str:
    return f"{b['from']}–{b['below'] - 1}" if b["below"] < 1 << 30 else f"{b['from']}–"


def plot_trajectories(
    path: Path, requests: Sequence[tuple[str, int, Sequence[Sequence[float]]]], title: str
) -> None:
    """Predicted against true remaining length over time; ``requests``: a name, the output's
    length, and rows of output tokens so far and the quantiles at ``LEVELS``."""
    columns = min(3, len(requests))
    lines = -(-len(requests) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.1 * lines), squeeze=False)
    for axis, (name, length, rows) in zip(axes.flat, requests):
        table = np.array(rows, dtype=float)
        produced = table[:, 0]
        axis.plot(produced, length - produced, color="black", lw=1.3, label="true")
        axis.plot(produced, table[:, 1 + LEVELS.index(0.5)], color="#117733", label="median")
        axis.fill_between(
            produced,
            table[:, 1 + LEVELS.index(0.25)],
            table[:, 1 + LEVELS.index(0.9)],
            color="#117733",
            alpha=0.2,
            lw=0,
            label="25 % to 90 %",
        )
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(requests) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("output tokens so far")
    for row in axes:
        row[0].set_ylabel("tokens still to come")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
