"""Tables and a picture of a gain surface: ``python benchmark/gain_surface_report.py surface.json
--plot surface.png``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

from sglang_ares.simulator.lattice import MOST_STEPS

mpl.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, Any]
Cells = dict[tuple[int, int, float], dict[str, Row]]
BASE = "round_robin"


def by_cell(rows: list[Row]) -> Cells:
    """Rows by (workers, concurrency, cv) and arm; cells that lack the base are left out."""
    cells: Cells = {}
    for row in rows:
        key = (row["workers"], row["concurrency"], row["cv"])
        cells.setdefault(key, {})[row["arm"]] = row
    return {key: arms for key, arms in sorted(cells.items()) if BASE in arms}


def off_the_lattice(row: Row, goodput: str) -> bool:
    """Whether the search ended at its highest rate: that compressed the run until it was shorter
    than its long requests, so that nothing could fill up. Such a goodput is none."""
    return bool(row[goodput.replace("goodput", "exponent")] == MOST_STEPS)


def ratio(field: str) -> Callable[[dict[str, Row], str, str], float]:
    """``field`` of one arm over that of another; NaN where either is missing or zero, or a goodput
    off the lattice."""

    def of(arms: dict[str, Row], arm: str, base: str) -> float:
        if arm not in arms or base not in arms or not arms[base][field]:
            return float("nan")
        if "goodput" in field and any(off_the_lattice(arms[a], field) for a in (arm, base)):
            return float("nan")
        return float(arms[arm][field] / arms[base][field])

    return of


GOODPUT_90, GOODPUT_99, TPOT = ratio("goodput_90"), ratio("goodput_99"), ratio("tpot_p99_ms")


def table(cells: Cells, arms: list[str]) -> Table:
    """Per cell and arm, relative to round robin: goodput at 90 % and 99 %, and P99 TPOT."""
    out = Table(title="goodput 90 % / goodput 99 % / P99 TPOT, relative to static round robin")
    for column in ("workers", "concurrency", "cv", *arms):
        out.add_column(column, justify="right")
    for (workers, concurrency, cv), found in cells.items():
        shown = [
            " / ".join(f"{r(found, arm, BASE):.2f}" for r in (GOODPUT_90, GOODPUT_99, TPOT))
            for arm in arms
        ]
        out.add_row(str(workers), str(concurrency), f"{cv:g}", *shown)
    return out


def summary(cells: Cells) -> list[str]:
    """What the acceptance asks: ours against STAR, against the oracle, against round robin."""
    lines = []
    for name, goodput in (("90 %", GOODPUT_90), ("99 %", GOODPUT_99)):
        star = [goodput(arms, "ares", "star") for arms in cells.values()]
        oracle = [goodput(arms, "ares", "oracle") for arms in cells.values()]
        gain = [goodput(arms, "ares", BASE) for arms in cells.values()]
        star, oracle, gain = ([x for x in v if x == x] for v in (star, oracle, gain))
        if not (star and oracle and gain):
            continue
        lines.append(
            f"goodput at {name}: ours over STAR {min(star):.2f} at least, {median(star):.2f} in "
            f"the median, below 1 in {sum(x < 1 for x in star)} of {len(star)} cells; over the "
            f"oracle {median(oracle):.2f} in the median; over round robin {median(gain):.2f} in "
            f"the median, {max(gain):.2f} at most"
        )
    tpot = [TPOT(arms, "ares", BASE) for arms in cells.values() if "ares" in arms]
    if tpot:
        lines.append(
            f"P99 TPOT at equal rate: ours over round robin {median(tpot):.2f} in the median, "
            f"{min(tpot):.2f} at best"
        )
    return lines


def gain_shown(arms: dict[str, Row]) -> str:
    """Ours against round robin: both goodputs, and by how much P99 TPOT falls."""
    falls = 100 * (1 - TPOT(arms, "ares", BASE))
    gains = [
        "–" if np.isnan(gain := goodput(arms, "ares", BASE)) else f"{gain:.2f}"
        for goodput in (GOODPUT_90, GOODPUT_99)
    ]
    return " / ".join([*gains, f"-{falls:.0f} %"])


def against(other: str) -> Callable[[dict[str, Row]], str]:
    """Ours against another arm: steps of the lattice between both goodputs, and P99 TPOT."""

    def shown(arms: dict[str, Row]) -> str:
        steps = []
        for share, goodput in (("90", GOODPUT_90), ("99", GOODPUT_99)):
            ahead = arms["ares"][f"exponent_{share}"] - arms[other][f"exponent_{share}"]
            known = not np.isnan(goodput(arms, "ares", other))
            steps.append((f"{ahead:+d}" if ahead else "0") if known else "–")
        return " / ".join([*steps, f"{TPOT(arms, 'ares', other):.2f}"])

    return shown


def markdown(cells: Cells) -> str:
    """For each question a table: a line per number of workers and concurrency, a column per cv."""
    cvs = sorted({k[2] for k in cells})
    lines = []
    for title, shown, needed in (
        ("Over static round robin: goodput 90 % / goodput 99 % / P99 TPOT", gain_shown, BASE),
        ("Against STAR: steps at 90 % / at 99 % / P99 TPOT", against("star"), "star"),
        ("Against the oracle: steps at 90 % / at 99 % / P99 TPOT", against("oracle"), "oracle"),
    ):
        lines += [
            "",
            title,
            "",
            f"| workers x requests | {' | '.join(f'cv {cv:g}' for cv in cvs)} |",
        ]
        lines.append("|---" * (len(cvs) + 1) + "|")
        for workers, concurrency in sorted({k[:2] for k in cells}):
            found = [cells.get((workers, concurrency, cv), {}) for cv in cvs]
            row = [shown(arms) if {"ares", needed} <= arms.keys() else "" for arms in found]
            lines.append(f"| {workers} x {concurrency} | {' | '.join(row)} |")
    return "\n".join(lines)


def plot(cells: Cells, arms: list[str], path: Path) -> None:
    """A row per number of workers and figure, a column per arm, a square per cell."""
    workers = sorted({k[0] for k in cells})
    figures = (
        ("goodput, 90 %", GOODPUT_90),
        ("goodput, 99 %", GOODPUT_99),
        ("P99 TPOT", TPOT),
    )
    rows = [(w, title, figure) for w in workers for title, figure in figures]
    canvas, axes = plt.subplots(
        len(rows),
        len(arms),
        figsize=(2.6 * len(arms) + 1, 2.2 * len(rows) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    concurrency, cvs = sorted({k[1] for k in cells}), sorted({k[2] for k in cells})
    for line, (w, title, figure) in zip(axes, rows, strict=True):
        for axis, arm in zip(line, arms, strict=True):
            values = np.array(
                [[figure(cells.get((w, c, cv), {}), arm, BASE) for cv in cvs] for c in concurrency]
            )
            better = np.log2(values) * (-1 if figure is TPOT else 1)
            axis.imshow(better, cmap="RdYlGn", vmin=-2, vmax=2, origin="lower", aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if value == value:
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(cvs)), [f"{cv:g}" for cv in cvs], fontsize=7)
            axis.set_yticks(range(len(concurrency)), [str(c) for c in concurrency], fontsize=7)
            axis.set_title(f"{arm}: {title}, {w} workers", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("cv of output lengths", fontsize=7)
    for line in axes:
        line[0].set_ylabel("requests per worker", fontsize=7)
    canvas.suptitle("Relative to static round robin (green: better)", fontsize=9)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


def main() -> int:
    """Print the table and the summary, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("surface", type=Path, nargs="+", help="what gain_surface.py wrote")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="tables of ours against others")
    args = parser.parse_args()
    rows = [row for path in args.surface for row in json.loads(path.read_text())["rows"]]
    cells = by_cell(rows)
    present = {row["arm"] for row in rows}
    order = ["least_tokens", "reactive", "star", "ares", "oracle"]
    arms = [arm for arm in order if arm in present]
    console = Console(width=140)
    if args.markdown:
        print(markdown(cells))
    else:
        console.print(table(cells, arms))
    for line in summary(cells):
        console.print(line)
    if args.plot:
        plot(cells, arms, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
