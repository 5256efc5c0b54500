"""What rescheduling gains on published traces: ``python benchmark/gain_traces.py --traces PATH ...
--json FILE``.

As ``gain_surface.py``, with the lengths and arrivals of traces (docs/simulator.md says where they
come from) scaled to the rate that fills the workers to ``--concurrency`` on average. A seed decides
what is sampled or jittered, and the predictions' errors. Started again with the same ``--json`` it
goes on where it stopped; in the end it prints a table of means over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from gain_arms import ARMS, Row, cluster_under, mean_load, measure, read_rows, write_rows
from sglang_ares.bench.workloads import RequestStream, load_workload
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulator import SimulationConfig

# As in gain_surface.py a run warms up for as long as the longest request lives, and then counts
# requests for so many mean lifetimes; for so many seconds at least, as some outputs are short.
LIFETIMES = 40
LEAST_S, LEAST_WARM_UP_S = 150.0, 15.0
# What is taken of a trace is enough for so many times the mean load's rate, if the trace has it.
HIGHEST_RATE = 2.5
# Prompts of Mooncake's trace are long (mean 12,000 tokens, up to 126,000): prefill workers per
# decode worker, and the SLO for TTFT.
PREFILL_SHARE = {"mooncake": 2.0}
TTFT_SLO_MS = {"mooncake": 20_000.0}


def add_scene_arguments(parser: argparse.ArgumentParser) -> None:
    """What :func:`scene` reads, and the traces."""
    parser.add_argument("--traces", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--concurrency", type=float, default=16.0)
    parser.add_argument("--profile", default="h200-llama2-7b")
    parser.add_argument("--kv", type=float, default=1.3, help="KV memory over the mean need")


def scene(
    path: str, seed: int, args: argparse.Namespace
) -> tuple[SimulationConfig, RequestStream, float]:
    """Cluster and requests of one trace, and for how long they arrive (s), at any rate."""
    base = load_profile(args.profile)
    probe = load_workload(path, seed=99, rate=10.0, duration_s=1000.0)
    load = mean_load(probe, args.concurrency, base)
    longest_s = float(probe.output_tokens.max()) * load.step_ms / 1e3
    warmup_s = max(LEAST_WARM_UP_S, longest_s)
    window_s = warmup_s + max(LEAST_S, LIFETIMES * load.lifetime_s)
    stream = load_workload(
        path, seed=seed, rate=args.workers * load.rate, duration_s=HIGHEST_RATE * window_s
    )
    settings: dict[str, object] = {"warmup_s": warmup_s, "seed": seed}
    if probe.name in PREFILL_SHARE:
        settings["prefill_workers"] = round(args.workers * PREFILL_SHARE[probe.name])
        settings["ttft_slo_ms"] = TTFT_SLO_MS[probe.name]
    longest = int((stream.prompt_tokens + stream.output_tokens).max())
    config = cluster_under(
        load, base, workers=args.workers, kv=args.kv, longest=longest, **settings
    )
    return config, stream, window_s


def table(rows: list[Row]) -> Table:
    """A line per trace and arm: means over the seeds."""
    shown = Table(title="relative to static round robin")
    for column in ("trace", "arm"):
        shown.add_column(column)
    for column in ("goodput 90 %", "goodput 99 %", "P99 TPOT", "moves", "retractions"):
        shown.add_column(column, justify="right")
    for trace, arm in dict.fromkeys((r["trace"], r["arm"]) for r in rows):
        own = {r["seed"]: r for r in rows if (r["trace"], r["arm"]) == (trace, arm)}
        base = {r["seed"]: r for r in rows if (r["trace"], r["arm"]) == (trace, "round_robin")}
        ratios = (
            f"{mean(own[seed][name] / base[seed][name] for seed in own):.3f}"
            if all(base[seed][name] for seed in own)
            else "-"
            for name in ("goodput_90", "goodput_99", "tpot_p99_ms")
        )
        counts = (f"{mean(r[n] for r in own.values()):.1f}" for n in ("migrations", "retractions"))
        shown.add_row(trace, arm, *ratios, *counts)
    return shown


def main() -> int:
    """Run what is missing from ``--json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_scene_arguments(parser)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--precision", type=float, default=0.03)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    names = ("profile", "kv", "precision", "seeds", "workers", "concurrency")
    settings = {name: getattr(args, name) for name in names}
    rows = read_rows(args.json)
    bar = tqdm(total=len(args.traces) * len(args.seeds) * len(args.arms), unit="arm")
    for path, seed in itertools.product(args.traces, args.seeds):
        config, stream, window_s = scene(path, seed, args)
        here = [r for r in rows if (r["trace"], r["seed"]) == (stream.name, seed)]
        near = here[-1] if here else None
        for arm in args.arms:
            if not any(r["arm"] == arm for r in here):
                near = measure(
                    config, stream, arm, window_s=window_s, precision=args.precision, near=near
                )
                of = {"trace": stream.name, "origin": stream.origin, "seed": seed}
                rows.append(of | near)
                write_rows(args.json, settings, rows)
            bar.update()
    bar.close()
    Console(width=120).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
