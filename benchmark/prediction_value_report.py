"""Tables and a picture of what ``prediction_value.py`` measured: ``python
benchmark/prediction_value_report.py FILE --plot PNG``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from gain_arms import Row, read_rows
from prediction_value import MOVING, PLACING, SCENARIOS

# Field, heading, format.
FIGURES = (
    ("tpot_p99_ms", "P99 TPOT (ms)", "{:.2f}"),
    ("gap_p99_ms", "P99 longest gap (ms)", "{:,.0f}"),
    ("attainment", "within both SLOs", "{:.1%}"),
    ("retractions", "retractions", "{:.1f}"),
    ("migrations", "moves", "{:.0f}"),
    ("moved_gb", "moved (GB)", "{:,.0f}"),
    ("imbalance_cv", "imbalance (cv)", "{:.3f}"),
)
DRAWN = ("tpot_p99_ms", "gap_p99_ms", "retractions", "moved_gb")
LAST = "other thresholds"


def mean(rows: Sequence[Row], field: str) -> float:
    """Over the seeds."""
    return fmean(row[field] for row in rows)


def of_arm(rows: Sequence[Row], arm: str, threshold: float | None) -> list[Row]:
    """The rows of an arm, one per seed."""
    return [r for r in rows if r["arm"] == arm and r.get("threshold") == threshold]


def markdown(scenario: str, rows: Sequence[Row]) -> list[str]:
    """A table: a line per arm, means over the seeds."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [f"**{scenario}** (seeds {', '.join(map(str, seeds))})", ""]
    lines.append("| arm | " + " | ".join(title for _, title, _ in FIGURES) + " |")
    lines.append("|---" * (len(FIGURES) + 1) + "|")
    for threshold in sorted({row.get("threshold") for row in rows}, key=lambda t: t or 0.0):
        for arm in (*MOVING, *PLACING):
            if found := of_arm(rows, arm, threshold):
                name = f"{arm}, threshold {threshold:g}" if scenario == LAST else arm
                figures = (text.format(mean(found, field)) for field, _, text in FIGURES)
                lines.append(f"| {name} | {' | '.join(figures)} |")
    return [*lines, ""]


def plot(rows: Sequence[Row], path: Path) -> None:
    """A row per scenario, a panel per figure, a bar per arm."""
    names = [n for n in SCENARIOS if n != LAST and not SCENARIOS[n].placing]
    names = [n for n in names if any(r["scenario"] == n for r in rows)]
    titles = {field: title for field, title, _ in FIGURES}
    figure = Figure(figsize=(13, 0.6 + 2.0 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(DRAWN), squeeze=False)
    arms = list(MOVING)
    colours = ["#999999", "#E69F00", *["#56B4E9"] * 2, *["#0072B2"] * 3, "#009E73"]
    for line, name in zip(axes, names, strict=True):
        here = [r for r in rows if r["scenario"] == name]
        present = [arm for arm in arms if of_arm(here, arm, 0.1)]
        for panel, field in zip(line, DRAWN, strict=True):
            values = [mean(of_arm(here, arm, 0.1), field) for arm in present]
            places = range(len(present))
            bars = panel.barh(
                places, values, color=[colours[arms.index(arm)] for arm in present], height=0.75
            )
            text = "{:,.1f}" if field in ("tpot_p99_ms", "retractions") else "{:,.0f}"
            panel.bar_label(bars, [text.format(v) for v in values], fontsize=7, padding=2)
            panel.set_xlim(0, 1.18 * max(*values, 1.0))
            panel.set_yticks(places, present if field == DRAWN[0] else [""] * len(present))
            panel.tick_params(labelsize=8)
            panel.invert_yaxis()
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_title(name, loc="left", fontsize=10, fontweight="bold")
    for panel, field in zip(axes[-1], DRAWN, strict=True):
        panel.set_xlabel(titles[field], fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    rows = read_rows(args.file)
    for name in SCENARIOS:
        if found := [r for r in rows if r["scenario"] == name]:
            print("\n".join(markdown(name, found)))
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
