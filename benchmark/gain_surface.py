"""What rescheduling gains, and where: ``python benchmark/gain_surface.py --json surface.json``.

Simulated, with the policies the controller runs. A cell is a mean concurrency per decode worker, a
coefficient of variation of output lengths, and a number of workers; its KV memory is ``--kv`` times
what a worker holds on average, so that memory runs short where load is uneven. Every arm gets the
same requests. Per arm: P99 TPOT at the cell's own rate, and goodput at 90 % and 99 % attainment by
bisection over the rate. Results are appended cell by cell; started again with the same ``--json``
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.bench.workloads.synthetic import CAP_TOKENS, lognormal
from sglang_ares.profiles.profile import Profile, load_profile
from sglang_ares.simulator import SimulationConfig
from sglang_ares.simulator.goodput import goodput, try_rate

# Name: placement, rescheduling, prediction.
ARMS = {
    "round_robin": ("round_robin", "none", "none"),
    "least_tokens": ("least_tokens", "none", "none"),
    "reactive": ("least_tokens", "reactive", "none"),
    "star": ("least_tokens", "star", "noisy"),
    "ares": ("least_tokens", "ares", "noisy"),
    "oracle": ("least_tokens", "oracle", "true"),
}
OUTPUT_MEAN = 2000.0
# The cut lowers what a cell calls its cv; rows have the cv that was drawn. Memory holds the longest
# request in any case, so that small cells feel less pressure.
LONGEST = CAP_TOKENS
# A cell simulates this many mean lifetimes of a request, the first of them to warm up.
LIFETIMES, WARM_UP = 14, 4


@dataclass(frozen=True)
class Cell:
    """``concurrency``: mean number of requests per decode worker; ``cv``: of output lengths."""

    concurrency: int
    cv: float
    workers: int


def scene(
    cell: Cell, base: Profile, kv: float, seed: int
) -> tuple[SimulationConfig, RequestStream]:
    """The cluster and the requests of a cell; placement and rescheduling are the arm's.

    By Little's law ``rate = workers * concurrency / (mean length * step time)``. The TPOT SLO is
    1.5 times the step at mean load, the TTFT SLO 2 s.
    """
    probe = lognormal(
        rate=100.0, duration_s=1000.0, seed=99, output_mean=OUTPUT_MEAN, output_cv=cell.cv,
        cap=LONGEST,
    )  # fmt: skip
    lengths = probe.output_tokens.astype(float)
    # Seen at a random moment, a request of length L is there with probability ~ L, half done.
    resident = float((lengths * (probe.prompt_tokens.mean() + lengths / 2)).sum() / lengths.sum())
    tokens = cell.concurrency * resident
    step_ms = base.decode.ms(cell.concurrency, tokens)
    lifetime_s = lengths.mean() * step_ms / 1000
    capacity = int(max(kv * tokens, 1.1 * LONGEST))
    config = SimulationConfig(
        prefill_workers=max(2, cell.workers // 2),
        decode_workers=cell.workers,
        profile=msgspec.structs.replace(base, kv_capacity_tokens=capacity),
        ttft_slo_ms=2000.0,
        tpot_slo_ms=1.5 * step_ms,
        warmup_s=WARM_UP * lifetime_s,
        seed=seed,
    )
    stream = lognormal(
        rate=cell.workers * cell.concurrency / lifetime_s,
        duration_s=LIFETIMES * lifetime_s,
        seed=seed,
        output_mean=OUTPUT_MEAN,
        output_cv=cell.cv,
        cap=LONGEST,
    )
    return config, stream


def run_arm(cell: Cell, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm of one cell."""
    placement, rescheduling, prediction = ARMS[arm]
    config, stream = scene(cell, load_profile(args.profile), args.kv, args.seed)
    config = replace(config, placement=placement, rescheduling=rescheduling, prediction=prediction)
    equal = try_rate(config, stream, stream.rate)
    found = goodput(config, stream, precision=args.precision)
    return {
        "concurrency": cell.concurrency,
        "cv": cell.cv,
        "workers": cell.workers,
        "arm": arm,
        "requests": len(stream),
        "cv_drawn": float(stream.output_tokens.std() / stream.output_tokens.mean()),
        "rate": stream.rate,
        "tpot_slo_ms": config.tpot_slo_ms,
        "tpot_p99_ms": equal.tpot_p99_ms,
        "attainment": equal.attainment,
        "migrations": equal.migrations,
        "moved_tokens": equal.moved_tokens,
        "retractions": equal.retractions,
        "goodput_90": found.rate[0.9],
        "goodput_99": found.rate[0.99],
    }


def cells(args: argparse.Namespace) -> Iterable[Cell]:
    """The grid, small cells first."""
    for workers in args.workers:
        for concurrency in args.concurrency:
            for cv in args.cv:
                yield Cell(concurrency, cv, workers)


def main() -> int:
    """Run what is missing from ``--json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--cv", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--profile", default="h200-qwen2.5-7b")
    parser.add_argument("--kv", type=float, default=1.3, help="KV memory over mean resident tokens")
    parser.add_argument("--precision", type=float, default=0.03, help="of the goodput, as a ratio")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    done = {(r["concurrency"], r["cv"], r["workers"], r["arm"]) for r in rows}
    todo = [
        (cell, arm)
        for cell in cells(args)
        for arm in args.arms
        if (cell.concurrency, cell.cv, cell.workers, arm) not in done
    ]
    settings = {name: getattr(args, name) for name in ("profile", "kv", "precision", "seed")} | {
        "output_mean": OUTPUT_MEAN
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        running = [pool.submit(run_arm, cell, arm, args) for cell, arm in todo]
        for future in tqdm(as_completed(running), total=len(running), unit="arm"):
            rows.append(future.result())
            args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
