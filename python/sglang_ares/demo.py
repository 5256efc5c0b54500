"""``make demo``: one workload on a small cluster, without and with moves, and what differs.

Starts the cluster twice, replays the same seeded requests, checks that both runs gave the same
tokens, and writes ``demo.json`` and ``demo.png``; ``demo_predictions.png`` shows the predicted
against the true remaining length of a few requests over time. What the workers print goes to
``demo.log``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sglang_ares.bench.compare import Mismatch, mismatches
from sglang_ares.bench.embedded import (
    ClusterFailedError,
    engine_stream,
    failing_with_the_cluster,
    output_to,
    start_engine,
)
from sglang_ares.bench.plot import plot_kv_over_time
from sglang_ares.bench.predictions import PredictionWatch
from sglang_ares.bench.replay import Run, replay
from sglang_ares.bench.report import (
    RunSummary,
    comparison_table,
    machine,
    series,
    summarize,
    write_json,
)
from sglang_ares.bench.workload import WorkItem, poisson_workload
from sglang_ares.demo_model.tasks import sample_prompts
from sglang_ares.srt.predictor.plots import plot_trajectories

if TYPE_CHECKING:
    from sglang_ares.engine import Engine

STATIC = "static"
RESCHEDULED = "rescheduled"
PLOTTED = 6
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class DemoArgs:
    """What can be chosen on the command line."""

    requests: int
    seed: int
    rate: float
    max_new_tokens: int
    timeout: float
    out: Path
    ares_decode_workers: int
    ares_placement: str
    ares_reschedule_interval: float
    ares_min_gap_tokens: int
    ares_move_cooldown: float
    ares_max_moves: int

    def ares_kwargs(self) -> dict[str, Any]:
        """The engine's keyword arguments that both runs share."""
        return {k: v for k, v in vars(self).items() if k.startswith("ares_")}


def parse_args(argv: list[str]) -> DemoArgs:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ares.demo",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--requests", type=int, default=300, help="requests to replay, in each of two runs")
    add("--seed", type=int, default=0, help="seed of prompts, arrival times and answers")
    add("--rate", type=float, default=12.0, help="mean arrivals per second (Poisson)")
    add("--max-new-tokens", type=int, default=1000, help="longest answer")
    add("--timeout", type=float, default=300.0, help="seconds until a run is given up")
    add("--out", type=Path, default=Path("build"), help="folder for what is written")
    add("--ares-decode-workers", type=int, default=2, help="decode workers")
    add("--ares-placement", default="round_robin", help="how new requests are placed")
    add("--ares-reschedule-interval", type=float, default=0.2, help="seconds between rounds")
    add("--ares-move-cooldown", type=float, default=0.5, help="seconds before it moves again")
    add("--ares-min-gap-tokens", type=int, default=128, help="no move for a smaller gap")
    add("--ares-max-moves", type=int, default=2, help="most moves in a round")
    args = DemoArgs(**vars(parser.parse_args(argv)))
    if args.requests < 1 or args.rate <= 0 or args.max_new_tokens < 1 or args.timeout <= 0:
        parser.error("--requests, --rate, --max-new-tokens and --timeout must be above 0")
    return args


class Demo:
    """The two runs and what is said about them."""

    def __init__(self, args: DemoArgs, console: Console) -> None:
        self.args = args
        self.console = console
        self.log = args.out / "demo.log"
        self.watch = PredictionWatch()
        self.workload = poisson_workload(
            sample_prompts(args.requests, args.seed),
            rate=args.rate,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
        )

    def run(self, name: str, rescheduling: str) -> Run:
        """One run on a cluster of its own.

        Raises ``asyncio.CancelledError`` after Ctrl-C and :class:`ClusterFailedError` when a
        process of the cluster dies.
        """
        with self._cluster(name, rescheduling) as engine:
            loop = engine.loop
            task = loop.create_task(self._replay(engine, name))
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            try:
                run: Run = loop.run_until_complete(failing_with_the_cluster(engine, task))
            finally:
                loop.remove_signal_handler(signal.SIGINT)
            return run

    @contextmanager
    def _cluster(self, name: str, rescheduling: str) -> Iterator[Engine]:
        started = time.monotonic()
        with self.console.status(f"{name}: starting the cluster …"):
            engine = start_engine(
                self.log,
                ares_report_interval=0.1,
                ares_rescheduling=rescheduling,
                **self.args.ares_kwargs(),
            )
        self.console.print(
            f"{name}: 1 prefill and {self.args.ares_decode_workers} decode workers "
            f"ready after {time.monotonic() - started:.0f} s",
            highlight=False,
        )
        try:
            yield engine
        finally:
            with output_to(self.log):
                engine.shutdown()

    async def _replay(self, engine: Engine, name: str) -> Run:
        stream = engine_stream(engine)
        # The first requests connect the workers; both runs measure what comes after.
        warm_up = [
            WorkItem(f"warm-up-{i}", 0.0, "json 7\n", {"max_new_tokens": 4, "temperature": 0})
            for i in range(2 * self.args.ares_decode_workers)
        ]
        await replay(warm_up, stream, timeout_s=60)
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} requests, {task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self.console,
        ) as progress:
            bar = progress.add_task(name, total=len(self.workload), detail="")

            def show(run: Run) -> None:
                detail = f"{run.tokens:,} tokens, {run.migrations} moves"
                progress.update(bar, completed=run.done, detail=detail)

            self.watch = PredictionWatch()
            async with self.watch.over(engine.async_ares_requests):
                return await replay(
                    self.workload,
                    stream,
                    engine.async_ares_status,
                    timeout_s=self.args.timeout,
                    on_progress=show,
                )

    def plot_predictions(self, run: Run) -> None:
        """``demo_predictions.png``, of the requests watched in the last run."""
        prompts = {item.rid: item.prompt for item in self.workload}
        watched = self.watch.trajectories(run, prompts, PLOTTED)
        if watched:
            plot_trajectories(
                self.args.out / "demo_predictions.png",
                watched,
                "Predicted and true remaining length of running requests",
            )


def write_results(
    args: DemoArgs,
    argv: list[str],
    runs: dict[str, Run],
    summaries: dict[str, RunSummary],
    found: list[Mismatch],
) -> None:
    """``demo.json`` and ``demo.png``."""
    document: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", "-m", "sglang_ares.demo", *argv]),
        "seed": args.seed,
        "requests": args.requests,
        "rate_per_s": args.rate,
        "max_new_tokens": args.max_new_tokens,
        "ares": args.ares_kwargs(),
        "first_mismatches": [m.to_dict() for m in found[:10]],
    }
    for name, run in runs.items():
        document[name] = summaries[name].to_dict() | {"series": series(run.samples)}
    write_json(args.out / "demo.json", document)
    same = not found and all(s.failed == 0 for s in summaries.values())
    static, moved = summaries[STATIC], summaries[RESCHEDULED]
    plot_kv_over_time(
        args.out / "demo.png",
        {
            "Static: every request stays where it started. "
            f"Mean gap {static.mean_gap_tokens:,.0f} tokens": runs[STATIC],
            f"Rescheduled: {moved.migrations} moves of running requests. "
            f"Mean gap {moved.mean_gap_tokens:,.0f} tokens": runs[RESCHEDULED],
        },
        title=f"KV cache on the decode workers: the same {args.requests} requests"
        + (", the same answers" if same else ""),
        note=f"Placement of new requests: {args.ares_placement}. {args.rate:g} requests/s "
        f"(Poisson), at most {args.max_new_tokens} output tokens, seed {args.seed}.",
    )


def report_problems(console: Console, runs: dict[str, Run], found: list[Mismatch]) -> int:
    """Print what went wrong; returns the exit status."""
    failed = [(name, r) for name, run in runs.items() for r in run.results if not r.completed]
    for name, result in failed[:5]:
        console.print(f"FAILED in the {name} run: {result.rid}: {result.error}", markup=False)
    for mismatch in found[:5]:
        console.print(f"MISMATCH: {mismatch}", markup=False)
    return 1 if failed or found else 0


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    # The console keeps the terminal while the workers' output goes to the log.
    console = Console(file=os.fdopen(os.dup(1), "w"))
    demo = Demo(args, console)
    demo.log.write_text("")
    console.print(f"the workers' own output goes to {demo.log}", highlight=False)
    started = time.monotonic()
    try:
        runs = {STATIC: demo.run(STATIC, "none"), RESCHEDULED: demo.run(RESCHEDULED, "reactive")}
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted")
        return INTERRUPTED
    except ClusterFailedError as error:
        console.print(f"FAILED: {error}; the end of {demo.log}:", style="red", markup=False)
        console.print(*demo.log.read_text().splitlines()[-12:], sep="\n", markup=False)
        return 1
    finally:
        _end_children()
    found = mismatches(runs[STATIC].results, runs[RESCHEDULED].results)
    summaries = {
        STATIC: summarize(runs[STATIC], 0),
        RESCHEDULED: summarize(runs[RESCHEDULED], len(found)),
    }
    write_results(args, argv, runs, summaries, found)
    demo.plot_predictions(runs[RESCHEDULED])
    console.print(comparison_table(summaries))
    status = report_problems(console, runs, found)
    console.print(
        f"wrote demo.json, demo.png and demo_predictions.png in {args.out}; "
        f"{time.monotonic() - started:.0f} s in all",
        highlight=False,
    )
    return status


def _end_children() -> None:
    from sglang.srt.utils import kill_process_tree

    kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    sys.exit(main())
