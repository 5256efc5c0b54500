"""What rescheduling gains, and where: ``python benchmark/gain_surface.py --json surface.json``.

Simulated, with the policies the controller runs. A cell is a mean concurrency per decode worker, a
coefficient of variation of output lengths, and a number of workers; its KV memory is ``--kv`` times
what a worker holds and has reserved on average, so that memory runs short where load is uneven.
Every arm gets the same requests, drawn anew for each seed. Per arm: P99 TPOT at the cell's own
rate, and goodput at 90 % and 99 % attainment, on a lattice of rates that all arms share (neighbours
differ by ``--precision``). Results are written as they come; started again with the same ``--json``
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from gain_arms import ARMS, Row, cluster_under, mean_load, measure, read_rows, write_rows
from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.bench.workloads.synthetic import CAP_TOKENS, lognormal
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulator import SimulationConfig

OUTPUT_MEAN = 2000.0
# The cut lowers what a cell calls its cv; rows have the cv that was drawn. Memory holds the longest
# request in any case, so that small cells feel less pressure.
LONGEST = CAP_TOKENS
# A cell warms up for as long as its longest request lives: before, memory is still filling up, and
# a cluster serves at rates that it could not sustain. Then requests count for so many mean
# lifetimes at least, and longer if that are fewer than COUNTED: of a thousand requests, ten decide
# whether 99 % meet their SLOs, and these ten are luck.
LIFETIMES = 20
COUNTED = 4000
# A stream has requests for so many times the cell's own rate.
HIGHEST_RATE = 2.5


@dataclass(frozen=True)
class Cell:
    """``concurrency``: mean number of requests per decode worker; ``cv``: of output lengths;
    ``seed``: of the requests and of the predictions' errors."""

    concurrency: int
    cv: float
    workers: int
    seed: int

    @property
    def key(self) -> Row:
        """What its rows have in common."""
        return {
            "workers": self.workers,
            "concurrency": self.concurrency,
            "cv": self.cv,
            "seed": self.seed,
        }


def scene(cell: Cell, args: argparse.Namespace) -> tuple[SimulationConfig, RequestStream, float]:
    """The cluster and the requests of a cell, and for how long they arrive (s), at any rate."""
    drawn = partial(lognormal, output_mean=OUTPUT_MEAN, output_cv=cell.cv, cap=LONGEST)
    base = load_profile(args.profile)
    lengths = drawn(rate=100.0, duration_s=1000.0, seed=99)
    load = mean_load(lengths, cell.concurrency, base)
    warm_up = float(lengths.output_tokens.max() / lengths.output_tokens.mean())
    lifetimes = warm_up + max(LIFETIMES, COUNTED / (cell.workers * cell.concurrency))
    window_s = lifetimes * load.lifetime_s
    config = cluster_under(
        load,
        base,
        workers=cell.workers,
        kv=args.kv,
        longest=LONGEST,
        warmup_s=warm_up * load.lifetime_s,
        seed=cell.seed,
    )
    # At a higher rate the same requests come closer together, and more of them count.
    stream = drawn(
        rate=cell.workers * load.rate, duration_s=HIGHEST_RATE * window_s, seed=cell.seed
    )
    return config, stream, window_s


def run_cell(cell: Cell, arm: str, args: argparse.Namespace, near: Row | None) -> Row:
    """One arm of a cell; ``near``: a row to look for the goodput from, if there is one."""
    config, stream, window_s = scene(cell, args)
    cv = float(stream.output_tokens.std() / stream.output_tokens.mean())
    row = measure(config, stream, arm, window_s=window_s, precision=args.precision, near=near)
    return cell.key | {"cv_drawn": round(cv, 3)} | row


def cells(args: argparse.Namespace) -> Iterable[Cell]:
    """The grid, in the order of the arguments, seed by seed."""
    grid = itertools.product(args.seeds, args.workers, args.cv, args.concurrency)
    for seed, workers, cv, concurrency in grid:
        yield Cell(concurrency, cv, workers, seed)


def main() -> int:
    """Run what is missing from ``--json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--cv", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--profile", default="h200-llama2-7b")
    parser.add_argument("--kv", type=float, default=1.3, help="KV memory over the mean need")
    parser.add_argument(
        "--precision", type=float, default=0.03, help="of the goodput: ratio of rates, less 1"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows = read_rows(args.json)
    names = ("workers", "concurrency", "cv", "seed", "arm")
    done = {tuple(row[name] for name in names) for row in rows}
    todo = [
        (cell, arm)
        for cell, arm in itertools.product(cells(args), args.arms)
        if (*cell.key.values(), arm) not in done
    ]

    def like(cell: Cell, arm: str) -> Row | None:
        """A row from which to look for this arm's goodput: its own with another seed or number of
        workers, else the last one of the cell, else its own with another spread of lengths."""
        own = [r for r in rows if (r["arm"], r["concurrency"]) == (arm, cell.concurrency)]
        same = [r for r in own if r["cv"] == cell.cv]
        anew = [r for r in same if r["workers"] == cell.workers]
        here = [r for r in rows if cell.key.items() <= r.items()]
        return next((found[-1] for found in (anew, same, here, own) if found), None)

    settings = {name: getattr(args, name) for name in ("profile", "kv", "precision")} | {
        "output_mean": OUTPUT_MEAN,
        "lifetimes": LIFETIMES,
        "counted": COUNTED,
    }
    bar = tqdm(total=len(todo), unit="arm")

    def keep(new: Row) -> None:
        rows.append(new)
        write_rows(args.json, settings, rows)
        bar.update()

    if args.processes == 1:
        for cell, arm in todo:
            keep(run_cell(cell, arm, args, like(cell, arm)))
        return 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, mp_context=context) as pool:
        running = [pool.submit(run_cell, cell, arm, args, like(cell, arm)) for cell, arm in todo]
        for future in as_completed(running):
            keep(future.result())
    return 0


if __name__ == "__main__":
    sys.exit(main())
