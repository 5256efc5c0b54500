"""The simulator against an emulated or a real cluster: same requests, profile and policies.

Signed errors, simulated over measured minus 1, for the means and percentiles of TPOT and TTFT and
for the throughput. What handing a prompt's KV over takes on this host is no part of the profile:
it is measured first, on the idle cluster, and given to the simulator (``--no-host-delays``: not).
An emulated cluster holds moves to the profile's link, but not hand-overs; the simulator holds both,
so without moves its link is given no limit.

``--real``: against real workers with the embedded model; ``--profile`` is then a file written by
``python -m sglang_ares.bench calibrate`` on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
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
from sglang_ares.bench.replay import Run
from sglang_ares.bench.report import machine, write_json
from sglang_ares.bench.server import running_server
from sglang_ares.bench.workloads import RequestStream
from sglang_ares.profiles.profile import Profile, load_profile
from sglang_ares.simulator import Result, Simulation, SimulationConfig

NO_LIMIT_BYTES_PER_S = 1e15
# What the errors may be, for the figures that have a target.
TARGETS = {"tpot_mean_ms": 0.05, "tpot_p99_ms": 0.10, "output_tokens_per_s": 0.03}
IDLE_REQUESTS, IDLE_GAP_S, IDLE_PROMPT = 20, 1.5, 256


def simulate(stream: RequestStream, profile: Profile, options: argparse.Namespace) -> Result:
    """The simulator's run."""
    config = SimulationConfig(
        prefill_workers=options.prefill_workers,
        decode_workers=options.decode_workers,
        profile=profile,
        placement=options.placement,
        prefill_placement=options.placement,
        rescheduling=options.rescheduling,
        prediction=options.prediction,
        ttft_slo_ms=options.ttft_slo_ms,
        tpot_slo_ms=options.tpot_slo_ms,
        seed=options.seed,
    )
    return Simulation(config, stream).run()


def figures_of(result: Result) -> dict[str, float]:
    """The same figures as of an emulated run."""
    served = ~np.isnan(result.finished_s)
    last = float(np.nanmax(result.finished_s))
    figures = {
        "output_tokens_per_s": float(result.output_tokens[served].sum()) / last,
        "attainment": result.attainment(),
        "moves_completed": float(result.counters["migrations"]),
        "retractions": float(result.counters["retractions"]),
    }
    for name, column in (("tpot", result.tpot_s), ("ttft", result.ttft_s)):
        values = 1e3 * column[~np.isnan(column)]
        figures[f"{name}_mean_ms"] = float(values.mean())
        for q in (50, 90, 99):
            figures[f"{name}_p{q}_ms"] = float(np.percentile(values, q))
    return figures


async def host_delay_ms(url: str, profile: Profile, options: argparse.Namespace) -> float:
    """What an idle cluster's TTFT is above the prefill's own time (median, emulated ms)."""
    stream = RequestStream(
        name="idle",
        origin="single requests",
        arrival_s=np.arange(IDLE_REQUESTS) * IDLE_GAP_S,
        prompt_tokens=np.full(IDLE_REQUESTS, IDLE_PROMPT),
        output_tokens=np.full(IDLE_REQUESTS, 2),
    )
    run, _ = await replay_arm(
        url, stream, options, placement="round_robin", rescheduling="none", name="idle"
    )
    ttft = median(1e3 * r.ttft_s for r in run.results if r.ttft_s is not None)
    first_step = profile.decode.ms(1, IDLE_PROMPT)
    return max(0.0, ttft - profile.prefill.ms(IDLE_PROMPT) - options.first_step * first_step)


async def measure(
    url: str, stream: RequestStream, profile: Profile, options: argparse.Namespace
) -> tuple[Run, dict[str, Any], float]:
    """The cluster's run, its figures, and the host's delay of a prompt's hand-over (ms)."""
    delay = await host_delay_ms(url, profile, options) if options.host_delays else 0.0
    run, figures = await replay_arm(
        url,
        stream,
        options,
        placement=options.placement,
        rescheduling=options.rescheduling,
        name="real" if options.real else "emulated",
    )
    return run, figures, delay


def compare(
    kind: str, measured: dict[str, Any], simulated: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Both figures, the signed error, and whether it is within the target, by name. ``kind``: of
    the cluster."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in simulated.items():
        other = float(measured[name])
        error = value / other - 1 if other else None
        target = TARGETS.get(name)
        rows[name] = {kind: other, "simulated": value, "error": error, "target": target}
        if target is not None and error is not None:
            rows[name]["within"] = abs(error) <= target
    return rows


def table(kind: str, rows: dict[str, dict[str, Any]]) -> Table:
    """For the terminal."""
    shown = Table()
    for column in ("", kind, "simulated", "error", "target"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        error = "–" if row["error"] is None else f"{row['error']:+.1%}"
        target = "" if row["target"] is None else f"±{row['target']:.0%}"
        if row.get("within") is False:
            target += " missed"
        shown.add_row(name, f"{row[kind]:,.2f}", f"{row['simulated']:,.2f}", error, target)
    return shown


def plot(path: Path, kind: str, run: Run, result: Result) -> None:
    """Distributions of TPOT and TTFT, measured and simulated."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    columns = (
        ("TPOT", [r.tpot_s for r in run.results], result.tpot_s),
        ("TTFT", [r.ttft_s for r in run.results], result.ttft_s),
    )
    for axes, (name, measured, simulated) in zip(figure.subplots(1, 2), columns, strict=True):
        for label, values, colour in (
            (kind, [v for v in measured if v is not None], "#0072B2"),
            ("simulated", simulated[~np.isnan(simulated)], "#D55E00"),
        ):
            ordered = 1e3 * np.sort(np.asarray(values, np.float64))
            share = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.plot(ordered, share, color=colour, label=label)
        axes.set_xlabel(f"{name} (ms)")
        axes.set_ylabel("share of requests at most")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run both, print the errors, plot, and keep the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_cluster_arguments(parser)
    parser.add_argument("--placement", default="least_tokens")
    parser.add_argument("--rescheduling", default="none")
    parser.add_argument("--prediction", default="none", help="what the simulated policy is told")
    parser.add_argument("--host-delays", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--first-step",
        type=float,
        default=0.0,
        help="decode steps that pass before a request's first token reaches the client",
    )
    parser.add_argument("--real", action="store_true", help="real workers, the embedded model")
    parser.add_argument("--url", help="such a server that runs already")
    parser.add_argument("--json", type=Path, default=Path("build/simulator_validation.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/simulator_validation.png"))
    options, more_flags = parser.parse_known_args()
    kind = "real" if options.real else "emulated"
    stream, profile = workload_of(options), load_profile(options.profile)
    if options.url:
        run, measured, delay = asyncio.run(measure(options.url, stream, profile, options))
    else:
        flags = (*server_flags(options), *more_flags)
        with running_server(log_path(options.json), *flags) as url:
            run, measured, delay = asyncio.run(measure(url, stream, profile, options))
    if options.host_delays:
        profile = msgspec.structs.replace(profile, transfer_fixed_ms=delay)
        if options.rescheduling == "none":
            profile = msgspec.structs.replace(profile, link_bytes_per_s=NO_LIMIT_BYTES_PER_S)
    # The cluster saw the requests when they were sent, not when they were due.
    sent = replace(stream, arrival_s=np.array([r.sent_s for r in run.results]))
    result = simulate(sent, profile, options)
    rows = compare(kind, measured, figures_of(result))
    Console().print(table(kind, rows))
    plot(options.plot, kind, run, result)
    write_json(
        options.json,
        {
            "command": "python " + " ".join(sys.argv),
            "machine": machine(),
            "seed": options.seed,
            "profile": msgspec.to_builtins(profile),
            "host_delay_ms": delay,
            "late_steps": measured["late_steps"],
            "figures": rows,
            kind: raw(run),
            "simulated": result.to_dict(raw=True),
        },
    )
    print(f"raw figures: {options.json}")


if __name__ == "__main__":
    main()
