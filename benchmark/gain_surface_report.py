"""Tables and a picture of a gain surface: ``python benchmark/gain_surface_report.py surface.json
--plot surface.png``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, Any]
# The arms of one seed.
Arms = dict[str, Row]
Cells = dict[tuple[int, int, float], list[Arms]]
Figure = Callable[[list[Arms], str, str], float]
BASE = "round_robin"
SHARES = ("90", "99")
# Cells whose binary logarithm is beyond this are so dark that their figure has to be white.
_DARK = 1.4


def by_cell(rows: list[Row]) -> Cells:
    """Rows by (workers, concurrency, cv), seed and arm; seeds that lack the base are left out."""
    cells: dict[tuple[int, int, float], dict[int, Arms]] = {}
    for row in rows:
        key = (row["workers"], row["concurrency"], row["cv"])
        cells.setdefault(key, {}).setdefault(row["seed"], {})[row["arm"]] = row
    found = {
        key: [arms for _, arms in sorted(seeds.items()) if BASE in arms]
        for key, seeds in sorted(cells.items())
    }
    return {key: seeds for key, seeds in found.items() if seeds}


def off_the_lattice(row: Row, share: str) -> bool:
    """Whether the search ended at the highest rate that the stream could feed: the goodput may be
    higher."""
    return bool(row[f"exponent_{share}"] == row["top"])


def both(seeds: list[Arms], arm: str, other: str) -> list[tuple[Row, Row]]:
    """The rows of two arms, of the seeds that have both."""
    return [(arms[arm], arms[other]) for arms in seeds if {arm, other} <= arms.keys()]


def goodput(share: str) -> Figure:
    """One arm's goodput over that of another, the geometric mean over the seeds; NaN where there
    is none, or one is off the lattice."""

    def of(seeds: list[Arms], arm: str, other: str) -> float:
        pairs = both(seeds, arm, other)
        if any(off_the_lattice(row, share) for pair in pairs for row in pair):
            return math.nan
        rates = [(a[f"goodput_{share}"], b[f"goodput_{share}"]) for a, b in pairs]
        return (
            geometric_mean(a / b for a, b in rates) if rates and all(map(min, rates)) else math.nan
        )

    return of


def tpot(seeds: list[Arms], arm: str, other: str) -> float:
    """One arm's P99 TPOT over that of another, the geometric mean over the seeds; NaN without."""
    pairs = both(seeds, arm, other)
    return (
        geometric_mean(a["tpot_p99_ms"] / b["tpot_p99_ms"] for a, b in pairs) if pairs else math.nan
    )


def steps(seeds: list[Arms], arm: str, other: str, share: str) -> list[int]:
    """By how many steps of the lattice one arm's goodput is above another's, seed by seed."""
    return [
        a[f"exponent_{share}"] - b[f"exponent_{share}"]
        for a, b in both(seeds, arm, other)
        if not off_the_lattice(a, share) and not off_the_lattice(b, share)
    ]


GOODPUT_90, GOODPUT_99 = map(goodput, SHARES)


def table(cells: Cells, arms: list[str]) -> Table:
    """Per cell and arm, relative to round robin: goodput at 90 % and 99 %, and P99 TPOT."""
    out = Table(title="goodput 90 % / goodput 99 % / P99 TPOT, relative to static round robin")
    for column in ("workers", "concurrency", "cv", "seeds", *arms):
        out.add_column(column, justify="right")
    for (workers, concurrency, cv), seeds in cells.items():
        shown = [
            " / ".join(
                f"{figure(seeds, arm, BASE):.2f}" for figure in (GOODPUT_90, GOODPUT_99, tpot)
            )
            for arm in arms
        ]
        out.add_row(str(workers), str(concurrency), f"{cv:g}", str(len(seeds)), *shown)
    return out


def against_in_words(cells: Cells, other: str) -> list[str]:
    """Ours and another arm: in how many cells which is ahead, and by how much over all."""
    lines = []
    for share in SHARES:
        ahead = {key: steps(seeds, "ares", other, share) for key, seeds in cells.items()}
        means = {key: mean(values) for key, values in ahead.items() if values}
        if not means:
            continue
        behind = sorted((value, key) for key, value in means.items() if value < 0)
        surely = [
            key
            for _, key in behind
            if len(ahead[key]) > 1
            and means[key] < -2 * stdev(ahead[key]) / math.sqrt(len(ahead[key]))
        ]
        singly = [value for values in ahead.values() for value in values]
        ratios = [goodput(share)(seeds, "ares", other) for seeds in cells.values()]
        lines.append(
            f"goodput at {share} %, ours against {other}, {len(means)} cells: ahead in "
            f"{sum(m > 0 for m in means.values())}, level in {sum(m == 0 for m in means.values())},"
            f" behind in {len(behind)} (by more than two standard errors in {len(surely)}), by "
            f"{-behind[0][0] if behind else 0:.1f} steps at most; mean {mean(means.values()):+.2f} "
            f"steps; single runs: ahead {sum(v > 0 for v in singly)}, level "
            f"{singly.count(0)}, behind {sum(v < 0 for v in singly)}; ratio "
            f"{median(r for r in ratios if r == r):.3f} in the median"
        )
    ratios = [tpot(seeds, "ares", other) for seeds in cells.values()]
    found = [r for r in ratios if r == r]
    if found:
        lines.append(
            f"P99 TPOT, ours over {other}: {median(found):.3f} in the median, {min(found):.3f} to "
            f"{max(found):.3f}, above 1.005 in {sum(r > 1.005 for r in found)} of {len(found)}"
        )
    return lines


def moves_in_words(cells: Cells) -> list[str]:
    """What ours and STAR move, both with our admission, and the retractions."""
    lines = []
    for name, field in (("moves", "migrations"), ("tokens copied", "moved_tokens")):
        pairs = [both(seeds, "ares", "star_slo") for seeds in cells.values()]
        sums = [
            [sum(row[field] for row in side) for side in zip(*p, strict=True)] for p in pairs if p
        ]
        ratios = [ours / stars for ours, stars in sums if stars]
        if ratios:
            lines.append(
                f"{name}, ours over star_slo: {median(ratios):.2f} in the median, "
                f"{min(ratios):.2f} to {max(ratios):.2f}, below 1 in "
                f"{sum(r < 1 for r in ratios)} of {len(ratios)} cells"
            )
    names = ("least_tokens", "star", "ares_worker", "least_tokens_slo", "star_slo", "ares")
    complete = [arms for seeds in cells.values() for arms in seeds if set(names) <= arms.keys()]
    counts = ", ".join(f"{n} {sum(arms[n]['retractions'] for arms in complete)}" for n in names)
    return [*lines, f"retractions over all runs: {counts}"]


def summary(cells: Cells) -> list[str]:
    """What the acceptance asks: ours against STAR, against the oracle, against round robin."""
    lines = []
    for name, figure in (("90 %", GOODPUT_90), ("99 %", GOODPUT_99)):
        gain = [g for seeds in cells.values() if (g := figure(seeds, "ares", BASE)) == g]
        if gain:
            lines.append(
                f"goodput at {name}, ours over round robin: {median(gain):.2f} in the median, "
                f"{max(gain):.2f} at most, 2.63 or more in {sum(g >= 2.63 for g in gain)} of "
                f"{len(gain)} cells"
            )
    for other in (
        BASE,
        "least_tokens",
        "star",
        "oracle",
        "least_tokens_slo",
        "star_slo",
        "ares_worker",
    ):
        lines += against_in_words(cells, other)
    return lines + moves_in_words(cells)


def gain_shown(seeds: list[Arms]) -> str:
    """Ours against round robin: both goodputs, and by how much P99 TPOT falls."""
    falls = 100 * (1 - tpot(seeds, "ares", BASE))
    gains = [
        "–" if math.isnan(gain := figure(seeds, "ares", BASE)) else f"{gain:.2f}"
        for figure in (GOODPUT_90, GOODPUT_99)
    ]
    return " / ".join([*gains, f"-{falls:.0f} %"])


def against(other: str) -> Callable[[list[Arms]], str]:
    """Ours against another arm: steps of the lattice between both goodputs, the mean over the
    seeds, and P99 TPOT."""

    def shown(seeds: list[Arms]) -> str:
        ahead = [steps(seeds, "ares", other, share) for share in SHARES]
        means = [f"{mean(values):+.1f}" if values else "–" for values in ahead]
        zero = ("+0.0", "-0.0")
        return " / ".join(
            [*("0" if m in zero else m for m in means), f"{tpot(seeds, 'ares', other):.2f}"]
        )

    return shown


def markdown(cells: Cells) -> str:
    """For each question a table: a line per number of workers and concurrency, a column per cv."""
    cvs = sorted({k[2] for k in cells})
    lines = []
    for title, shown, needed in (
        ("Over static round robin: goodput 90 % / goodput 99 % / P99 TPOT", gain_shown, BASE),
        ("Against STAR: steps at 90 % / at 99 % / P99 TPOT", against("star"), "star"),
        (
            "Against STAR with our admission: steps at 90 % / at 99 % / P99 TPOT",
            against("star_slo"),
            "star_slo",
        ),
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
            found = [cells.get((workers, concurrency, cv), []) for cv in cvs]
            row = [shown(seeds) if both(seeds, "ares", needed) else "" for seeds in found]
            lines.append(f"| {workers} x {concurrency} | {' | '.join(row)} |")
    return "\n".join(lines)


def plot(cells: Cells, arms: list[str], path: Path) -> None:
    """A row per number of workers and figure, a column per arm, a square per cell."""
    workers = sorted({k[0] for k in cells})
    figures = (
        ("goodput, 90 %", GOODPUT_90),
        ("goodput, 99 %", GOODPUT_99),
        ("P99 TPOT", tpot),
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
                [[figure(cells.get((w, c, cv), []), arm, BASE) for cv in cvs] for c in concurrency]
            )
            better = np.log2(values) * (-1 if figure is tpot else 1)
            axis.imshow(better, cmap="RdYlGn", vmin=-2, vmax=2, origin="lower", aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if value == value:
                    color = "white" if abs(better[y, x]) > _DARK else "black"
                    shown = f"{value:.2f}"
                    axis.text(x, y, shown, ha="center", va="center", fontsize=7, color=color)
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
    order = ["least_tokens", "reactive", "star", "star_slo", "ares", "oracle"]
    arms = [arm for arm in order if arm in present]
    console = Console(width=140)
    if args.markdown:
        print(markdown(cells))
    else:
        console.print(table(cells, arms))
    for line in summary(cells):
        print(line, file=sys.stderr)
    if args.plot:
        plot(cells, arms, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
