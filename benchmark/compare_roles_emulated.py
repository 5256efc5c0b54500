"""Elastic roles on an emulated cluster: real controller, schedulers, moves and flips, no model.

Every arm has a cluster of its own, started with ``--prefill-workers`` and ``--decode-workers``, and
replays the same requests; the arms follow one another in one run. Times are emulated: those of the
wall divided by ``--dilation``. Attainment is the share of requests that met both SLOs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from emulated_arms import (
    add_cluster_arguments,
    log_path,
    raw,
    replay_arm,
    server_flags,
)
from sglang_ares.bench.report import machine, write_json
from sglang_ares.bench.server import running_server
from sglang_ares.bench.workloads import RequestStream
from sglang_ares.bench.workloads.synthetic import swing

ARMS = ("static", "arrow", "ares")
SHOWN = (
    ("attainment", "within both SLOs"),
    ("ttft_p90_ms", "TTFT p90 (ms)"),
    ("tpot_p90_ms", "TPOT p90 (ms)"),
    ("output_tokens_per_s", "output tokens/s"),
    ("flips", "flips"),
    ("failed", "failed"),
    ("late_steps", "late steps"),
)
SAMPLE_S = 2.0


async def sample_pools(url: str, samples: list[dict[str, float]], dilation: float) -> None:
    """Note the sizes of both pools, every two emulated seconds, until cancelled."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{url}/ares/status") as answer:
                workers = (await answer.json())["workers"]
            roles = Counter(w["role"] for w in workers)
            at_s = (loop.time() - start) / dilation
            samples.append({"at_s": at_s, "prefill": roles["prefill"], "decode": roles["decode"]})
            await asyncio.sleep(SAMPLE_S * dilation)


async def run_arm(
    url: str, arm: str, stream: RequestStream, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one arm, its pools over time and its flips."""
    samples: list[dict[str, float]] = []
    sampler = asyncio.create_task(sample_pools(url, samples, options.dilation))
    try:
        run, figures = await replay_arm(
            url, stream, options, placement="least_tokens", rescheduling="ares", name=arm
        )
    finally:
        sampler.cancel()
    async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    flips = sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("sglang_ares:role_changes_total") and 'outcome="changed"' in line
    )
    return {**figures, "flips": flips, "pools": samples, "raw": raw(run)}


def plot(path: Path, stream: RequestStream, measured: dict[str, dict[str, Any]]) -> None:
    """The offered load above the prefill pools of the arms over time."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    edges = np.arange(0.0, float(stream.arrival_s[-1]) + 5.0, 5.0)
    for values, label, colour in (
        (stream.prompt_tokens, "prompt tokens", "#0072B2"),
        (stream.output_tokens, "output tokens", "#D55E00"),
    ):
        load, _ = np.histogram(stream.arrival_s, bins=edges, weights=values)
        top.plot(edges[:-1], load / 5.0, label=label, color=colour)
    top.set_ylabel("offered tokens/s")
    top.legend(frameon=False, fontsize=9)
    # Where arms have the same pools the later line lies upon the wider, earlier one.
    for (arm, figures), colour, width in zip(
        measured.items(), ("#888888", "#E69F00", "#009E73"), (5.0, 2.5, 1.5), strict=False
    ):
        pools = figures["pools"]
        bottom.step(
            [p["at_s"] for p in pools],
            [p["prefill"] for p in pools],
            where="post",
            label=f"{arm}: {figures['attainment']:.0%} within SLOs",
            color=colour,
            linewidth=width,
        )
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_ylabel("prefill workers")
    bottom.set_xlabel("emulated seconds")
    bottom.legend(frameon=False, fontsize=9)
    for axes in (top, bottom):
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def table(measured: dict[str, dict[str, Any]]) -> Table:
    """A row per figure, a column per arm."""
    shown = Table()
    shown.add_column("")
    for name in measured:
        shown.add_column(name, justify="right")
    for key, label in SHOWN:
        shown.add_row(label, *(f"{figures[key]:,.2f}" for figures in measured.values()))
    return shown


def main() -> None:
    """Run the arms, print, plot, and keep the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_cluster_arguments(parser)
    parser.set_defaults(
        profile="24gb-qwen2.5-7b-eighth", dilation=3.0, prefill_workers=4, decode_workers=4,
        rate=2.0, duration=160.0, ttft_slo_ms=3000.0, tpot_slo_ms=75.0, workload="swing",
    )  # fmt: skip
    parser.add_argument("--period", type=float, default=80.0, help="of the swing, emulated s")
    parser.add_argument("--longest-prompt", type=int, default=8000, help="longer ones are cut")
    parser.add_argument("--longest-output", type=int, default=2500, help="longer ones are cut")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path, default=Path("build/roles_emulated.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/roles_emulated.png"))
    options = parser.parse_args()
    stream = swing(
        rate=options.rate, duration_s=options.duration, seed=options.seed, period_s=options.period
    )
    prompts = np.minimum(stream.prompt_tokens, options.longest_prompt)
    outputs = np.minimum(stream.output_tokens, options.longest_output)
    stream = replace(stream, prompt_tokens=prompts, output_tokens=outputs)
    measured: dict[str, dict[str, Any]] = {}
    for arm in options.arms:
        flags = (
            *server_flags(options),
            "--enable-metrics",
            f"--ares-roles={arm}",
        )
        with running_server(log_path(options.json).with_suffix(f".{arm}.log"), *flags) as url:
            measured[arm] = asyncio.run(run_arm(url, arm, stream, options))
        write_json(
            options.json,
            {
                "command": "python " + " ".join(sys.argv),
                "machine": machine(),
                "seed": options.seed,
                "arms": measured,
            },
        )
    Console().print(table(measured))
    plot(options.plot, stream, measured)
    print(f"raw figures: {options.json}")


if __name__ == "__main__":
    main()
