"""Policies on an emulated cluster: real controller, schedulers and moves, no model.

One server; the arms take turns on it (``POST /ares/policy``), each replays the same requests, the
order reversed every round. Times are emulated: those of the wall divided by ``--dilation``.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from emulated_arms import (
    add_cluster_arguments,
    log_path,
    raw,
    replay_arm,
    server_flags,
    workload_of,
)
from sglang_ares.bench.report import machine, write_json
from sglang_ares.bench.server import running_server

# Name: placement, admission, rescheduling.
ARMS = {
    "round robin": ("round_robin", "worker", "none"),
    "least tokens": ("least_tokens", "worker", "none"),
    "reactive": ("least_tokens", "worker", "reactive"),
    "STAR": ("least_tokens", "worker", "star"),
    "ours (worker)": ("least_tokens", "worker", "ares"),
    "ours": ("least_tokens", "slo", "ares"),
}
SHOWN = (
    ("tpot_p99_ms", "TPOT p99 (ms)"),
    ("tpot_mean_ms", "TPOT mean (ms)"),
    ("ttft_p99_ms", "TTFT p99 (ms)"),
    ("goodput_per_s", "goodput (1/s)"),
    ("attainment", "within both SLOs"),
    ("moves_completed", "moves"),
    ("retractions", "retractions"),
    ("late_steps", "late steps"),
)


async def compare(url: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Figures of every round, by arm."""
    stream = workload_of(options)
    measured: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(options.rounds):
        names = options.arms if number % 2 == 0 else options.arms[::-1]
        for name in names:
            placement, admission, rescheduling = ARMS[name]
            run, figures = await replay_arm(
                url,
                stream,
                options,
                placement=placement,
                admission=admission,
                rescheduling=rescheduling,
                name=f"{name} {number + 1}/{options.rounds}".replace(" ", "-"),
            )
            measured[name].append({**figures, "raw": raw(run)})
    return measured


def medians(measured: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Over the rounds."""
    return {
        name: {key: median(f[key] for f in rounds) for key in rounds[0] if key != "raw"}
        for name, rounds in measured.items()
    }


def table(middle: dict[str, dict[str, float]]) -> Table:
    """A row per figure, a column per arm."""
    shown = Table()
    shown.add_column("")
    for name in middle:
        shown.add_column(name, justify="right")
    for key, label in SHOWN:
        shown.add_row(label, *(f"{figures[key]:,.2f}" for figures in middle.values()))
    return shown


def plot(path: Path, middle: dict[str, dict[str, float]], title: str) -> None:
    """Bars per arm: P99 TPOT, goodput, moves."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 3), (SHOWN[0], SHOWN[3], SHOWN[5]), strict=True
    ):
        axes.bar(list(middle), [figures[key] for figures in middle.values()], color="#0072B2")
        axes.set_title(label, loc="left", fontsize=11)
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, plot, and keep the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_cluster_arguments(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--url", help="an emulated server that runs already")
    parser.add_argument("--json", type=Path, default=Path("build/policies_emulated.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/policies_emulated.png"))
    options, more_flags = parser.parse_known_args()
    if options.url:
        measured = asyncio.run(compare(options.url, options))
    else:
        flags = (*server_flags(options), *more_flags)
        with running_server(log_path(options.json), *flags) as url:
            measured = asyncio.run(compare(url, options))
    middle = medians(measured)
    Console().print(table(middle))
    plot(
        options.plot,
        middle,
        f"{options.prefill_workers} prefill and {options.decode_workers} decode workers "
        f"({options.profile}, emulated), {options.workload} at {options.rate:g}/s",
    )
    write_json(
        options.json,
        {
            "command": "python " + " ".join(sys.argv),
            "machine": machine(),
            "seed": options.seed,
            "medians": middle,
            "rounds": {
                name: {str(i): figures for i, figures in enumerate(rounds)}
                for name, rounds in measured.items()
            },
        },
    )
    print(f"raw figures: {options.json}")


if __name__ == "__main__":
    main()
