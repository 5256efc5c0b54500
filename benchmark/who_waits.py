"""Who waits under which admission: ``python benchmark/who_waits.py --traces PATH ... --json FILE``.

Goodput counts what is in time; this looks at the rest. The clusters and requests of
``gain_traces.py``, each at a few multiples of its own rate: how many are in time, of all and of the
tenth with the longest prompts, and how long the first token takes. Means over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from statistics import mean

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from gain_arms import ARMS, Row, configured, write_rows
from gain_traces import add_scene_arguments, scene
from sglang_ares.bench.workloads import RequestStream
from sglang_ares.simulator import Simulation, SimulationConfig

SHOWN = {
    "attainment": ("in time", "{:.1%}"),
    "attainment_long": ("… longest 10 % of prompts", "{:.1%}"),
    "ttft_p50_s": ("TTFT p50", "{:.2f} s"),
    "ttft_p90_s": ("p90", "{:.2f} s"),
    "ttft_p99_s": ("p99", "{:.1f} s"),
    "ttft_max_s": ("max", "{:.1f} s"),
    "retractions": ("retractions", "{:.1f}"),
}


def waits(config: SimulationConfig, stream: RequestStream) -> Row:
    """One run; requests count as in ``gain_traces.py``."""
    result = Simulation(config, stream).run()
    counted = result.counted
    first, each = result.meets_slo()
    in_time = (first & each)[counted]
    prompts = result.prompt_tokens[counted]
    p50, p90, p99, longest = np.nanpercentile(result.ttft_s[counted], (50, 90, 99, 100))
    return {
        "attainment": float(in_time.mean()),
        "attainment_long": float(in_time[prompts >= np.quantile(prompts, 0.9)].mean()),
        "ttft_p50_s": float(p50),
        "ttft_p90_s": float(p90),
        "ttft_p99_s": float(p99),
        "ttft_max_s": float(longest),
        "retractions": result.counters["retractions"],
    }


def table(rows: list[Row]) -> Table:
    """A line per trace, rate and arm."""
    shown = Table(title="means over the seeds")
    for name in ("trace", "rate", "arm", *(title for title, _ in SHOWN.values())):
        shown.add_column(name, justify="left" if name in ("trace", "arm") else "right")
    keys = ("trace", "times", "arm")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        own = [row for row in rows if tuple(row[k] for k in keys) == key]
        figures = (form.format(mean(r[name] for r in own)) for name, (_, form) in SHOWN.items())
        shown.add_row(key[0], f"{mean(r['rate'] for r in own):.2f}/s", key[2], *figures)
    return shown


def main() -> int:
    """Run all and show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_scene_arguments(parser)
    parser.add_argument("--times", type=float, nargs="+", default=[1.0, 1.25, 1.5])
    parser.add_argument("--arms", nargs="+", default=["star", "ares"], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows: list[Row] = []
    runs = list(itertools.product(args.traces, args.times, args.arms, args.seeds))
    for path, times, arm, seed in tqdm(runs, unit="run"):
        config, stream, window_s = scene(path, seed, args)
        own = {"trace": stream.name, "times": times, "arm": arm, "seed": seed}
        own["rate"] = round(stream.rate * times, 4)
        requests = stream.scaled(1 / times).between(0, window_s)
        rows.append(own | waits(configured(config, arm), requests))
    names = ("profile", "kv", "workers", "concurrency", "times", "seeds")
    write_rows(args.json, {name: getattr(args, name) for name in names}, rows)
    Console(width=140).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
