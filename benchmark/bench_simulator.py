"""How fast the simulator is: ``python benchmark/bench_simulator.py --workload PATH``.

An hour of arrivals on 8 to 1,024 decode workers at the same load per worker, without rescheduling,
and with a round every simulated second. Times are of one core; on a machine that does other things
look at the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_ares.bench.workloads import load_workload
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulate import simulate_with_progress
from sglang_ares.simulator import SimulationConfig


def main() -> int:
    """Run all cells, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="lognormal", help="a ServeGen archive, say")
    parser.add_argument("--rate-per-worker", type=float, default=0.55, metavar="R")
    parser.add_argument("--duration", type=float, default=3600.0, metavar="S")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 256, 1024], metavar="D")
    parser.add_argument("--rescheduling", nargs="+", default=["none", "ares"])
    parser.add_argument("--prediction", default="noisy", help="in arms that reschedule")
    parser.add_argument("--profile", default="24gb-qwen2.5-7b")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    rows = []
    for workers in args.workers:
        stream = load_workload(
            args.workload,
            rate=args.rate_per_worker * workers,
            duration_s=args.duration,
            seed=args.seed,
        )
        for rescheduling in args.rescheduling:
            config = SimulationConfig(
                prefill_workers=max(1, workers // 4),
                decode_workers=workers,
                profile=load_profile(args.profile),
                placement="least_tokens",
                rescheduling=rescheduling,
                prediction="none" if rescheduling == "none" else args.prediction,
                seed=args.seed,
            )
            result = simulate_with_progress(config, stream, Console(stderr=True))
            rows.append(
                {
                    "workers": workers,
                    "rescheduling": rescheduling,
                    "requests": len(result),
                    "output_tokens": int(result.output_tokens.sum()),
                    "rounds": result.counters["rounds"],
                    "migrations": result.counters["migrations"],
                    "retractions": result.counters["retractions"],
                    "wall_s": result.wall_s,
                    "cpu_s": result.cpu_s,
                    "cpu_us_per_request": 1e6 * result.cpu_s / len(result),
                }
            )
    table = Table(title=f"{args.workload}, {args.rate_per_worker:g} requests/s per worker")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    if args.json:
        command = ["python", "benchmark/bench_simulator.py", *sys.argv[1:]]
        machine = f"{platform.machine()}, Python {platform.python_version()}"
        document = {"command": " ".join(command), "machine": machine, "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
