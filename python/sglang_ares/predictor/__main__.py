"""``python -m sglang_ares.predictor collect | train | evaluate | drift``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.predictor.prompts import MIXES, PromptError
from sglang_ares.srt.predictor.start import SHIPPED_HEAD


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m sglang_ares.predictor",
        description="Make and judge heads that predict remaining output lengths.",
    )
    commands = main.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, run: Callable[[argparse.Namespace], None]) -> Any:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command("collect", "run prompts, keep hidden states with their labels", collect)
    add("--out", type=Path, required=True, help="folder of the data set; goes on where it stopped")
    add("--model-path", default=str(MODEL_DIR), help="model folder or id")
    add("--prompts", default="demo", help=f"{', '.join(MIXES)}, stories, or a file")
    add("--requests", type=int, default=3000, help="prompts to run")
    add("--max-new-tokens", type=int, default=2048, help="longest output")
    add("--temperature", type=float, default=1.0, help="sampling temperature")
    add("--at-once", type=int, default=None, help="requests under way at a time: 48, offline 512")
    add("--offline", action="store_true", help="decode in this process, without a cluster: Llama")
    add("--device", default="cpu", help="with --offline: cpu or cuda")
    add("--seed", type=int, default=0, help="seed of prompts, answers and split")

    add = command("train", "train a head, and the arms it is compared with", train)
    add("--data", type=Path, required=True, help="folder that collect wrote")
    add("--out", type=Path, required=True, help="folder of the head; finished parts are kept")
    add("--seed", type=int, default=0, help="seed of weights and batches")
    add("--epochs", type=int, default=300, help="most epochs")
    add("--device", default="cpu", help="cpu or cuda")
    add("--head-only", action="store_true", help="do not train the arms it is compared with")
    add("--ship-labels", type=int, default=0, help="put so many test labels beside the head")

    add = command("evaluate", "judge a head on its test split: tables, plots", evaluate)
    add("--head", type=Path, default=SHIPPED_HEAD, help="folder that train wrote")
    add("--data", type=Path, default=None, help="data set; left out: the split beside the head")
    add("--json", type=Path, default=None, help="write the figures here")
    add("--plot", type=Path, default=None, help="write a picture (.png) here")

    add = command("drift", "judge a head on another mix, with and without correction", drift)
    add("--head", type=Path, required=True, help="head, trained on one mix")
    add("--data", type=Path, required=True, help="data set of another mix")
    add("--at-once", type=int, default=32, help="requests under way at a time")
    add("--json", type=Path, default=None, help="write the figures here")
    add("--plot", type=Path, default=None, help="write a picture (.png) here")
    return main


def collect(args: argparse.Namespace) -> None:
    """Run prompts on a cluster that records its hidden states, or in this process."""
    what: dict[str, Any] = {
        "model_path": args.model_path,
        "source": args.prompts,
        "requests": args.requests,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
    }
    if args.offline:
        import torch

        from sglang_ares.srt.predictor.offline import OfflineCollection

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        OfflineCollection(args.out, at_once=args.at_once or 512, **what).run(args.device)
    else:
        from sglang_ares.srt.predictor.collect import ClusterCollection

        collection = ClusterCollection(args.out, at_once=args.at_once or 48, **what)
        collection.run(args.out / "cluster.log")


def train(args: argparse.Namespace) -> None:
    """Train head and baselines."""
    import torch

    from sglang_ares.srt.predictor.arms import train_arms
    from sglang_ares.srt.predictor.evaluation import ship_test_split
    from sglang_ares.srt.predictor.training import OnEpoch, TrainingPlan

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plan = TrainingPlan(seed=args.seed, epochs=args.epochs, device=args.device)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, validation MAE {task.fields[best]}"),
        TimeElapsedColumn(),
    ) as progress:

        def report(arm: str) -> OnEpoch:
            bar = progress.add_task(arm, total=plan.epochs, best="")

            def on_epoch(epoch: int, best: float, now: float) -> None:
                progress.update(bar, completed=epoch + 1, best=f"{best:.1f}")

            return on_epoch

        card = train_arms(args.data, args.out, plan, report, compared=not args.head_only)
    if args.ship_labels:
        ship_test_split(args.out, args.data, args.ship_labels)
    Console().print(f"wrote {args.out}; MAE on the test split {card.metrics['test_mae']} tokens")


def evaluate(args: argparse.Namespace) -> None:
    """Print the figures of every arm; write them and a picture where asked."""
    from sglang_ares.bench.report import write_json
    from sglang_ares.predictor.tables import print_report
    from sglang_ares.srt.predictor.evaluation import evaluate as judge

    report = judge(args.head, args.data)
    print_report(report, Console())
    if args.json:
        write_json(args.json, report)
    if args.plot:
        from sglang_ares.srt.predictor.plots import plot_errors

        plot_errors(args.plot, report)


def drift(args: argparse.Namespace) -> None:
    """Print errors on another mix, uncorrected and corrected."""
    from sglang_ares.bench.report import write_json
    from sglang_ares.srt.predictor.card import load_head
    from sglang_ares.srt.predictor.drift import judge_drift

    report = judge_drift(*load_head(args.head), args.data, args.at_once)
    console = Console()
    for name in ("uncorrected", "corrected"):
        arm = report[name]
        console.print(name, "MAE", arm["mae"], "calibration", arm["calibration"])
    if args.json:
        write_json(args.json, report)
    if args.plot:
        from sglang_ares.srt.predictor.plots import plot_drift

        plot_drift(args.plot, report)


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    from sglang_ares.srt.predictor.card import PredictorError
    from sglang_ares.srt.predictor.dataset import DatasetError
    from sglang_ares.srt.predictor.identity import UnknownModelError
    from sglang_ares.srt.predictor.offline import OfflineError

    args = parser().parse_args(argv)
    # One thread is enough for layers this small, and leaves the other cores to the cluster.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        args.run(args)
    except (PredictorError, DatasetError, PromptError, OfflineError, UnknownModelError) as error:
        print(f"python -m sglang_ares.predictor: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
