"""Simulates a cluster: ``python -m sglang_ares.simulate --workload reasoning --rate 2 ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sglang_ares.bench.workloads import BUILT_IN, RequestStream, WorkloadError, load_workload
from sglang_ares.profiles.profile import ProfileError, load_profile, shipped_profiles
from sglang_ares.simulator.config import ORACLE, SimulationConfig, SimulationError
from sglang_ares.simulator.prediction import PREDICTIONS, ErrorModel, load_error_model
from sglang_ares.simulator.result import Result
from sglang_ares.simulator.roles import COLOCATED, RolesConfig
from sglang_ares.simulator.roles.config import EMPTY, RELABEL
from sglang_ares.simulator.roles.simulation import RolesSimulation
from sglang_ares.simulator.simulation import Simulation
from sglang_ares.srt.policy.admission import ADMISSIONS, WORKER
from sglang_ares.srt.policy.elastic.decisions import REQUEST_SCHEDULING, ROLES
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ares.simulate",
        description="Simulate prefill and decode workers under the policies of the controller.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--prefill-workers", type=int, default=1, metavar="P")
    cluster.add_argument("--decode-workers", type=int, default=4, metavar="D")
    cluster.add_argument(
        "--profile",
        default="24gb-qwen2.5-7b",
        help=f"kind of worker: a JSON file or one of {', '.join(shipped_profiles())}",
    )
    load = parser.add_argument_group("workload")
    load.add_argument(
        "--workload",
        default="reasoning",
        metavar="NAME|PATH",
        help=f"{', '.join(BUILT_IN)}, or a trace: Azure .csv[.gz], Mooncake .jsonl[.gz], "
        "ServeGen .tar.gz",
    )
    load.add_argument("--duration", type=float, metavar="S", help="seconds in which requests come")
    load.add_argument("--rate", type=float, metavar="R", help="requests per second")
    load.add_argument("--start", type=float, default=0.0, metavar="S", help="where a trace begins")
    load.add_argument("--prompt-mean", type=float, help="of lognormal: mean prompt tokens")
    load.add_argument("--output-mean", type=float, help="of lognormal: mean output tokens")
    load.add_argument("--output-cv", type=float, help="of lognormal: their variation coefficient")
    load.add_argument("--warmup", type=float, default=0.0, metavar="S", help="left out of figures")
    load.add_argument("--seed", type=int, default=0)
    policy = parser.add_argument_group("policies")
    policy.add_argument("--placement", default="least_tokens", choices=PLACEMENT.names())
    policy.add_argument(
        "--admission",
        default=WORKER,
        choices=ADMISSIONS,
        help="where requests wait for KV memory: at the worker they are placed on, or in the "
        "controller, those first that can still meet --ttft-slo-ms",
    )
    policy.add_argument("--rescheduling", default="none", choices=RESCHEDULING.names())
    policy.add_argument("--reschedule-interval", type=float, default=1.0, metavar="S")
    policy.add_argument("--max-moves", type=int, default=0, help="per round; 0: D / 2, at least 2")
    policy.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        help="what policies are told of remaining lengths; default: none, true for the oracle",
    )
    policy.add_argument(
        "--predictor-error",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="multiplies the error of --prediction noisy",
    )
    policy.add_argument("--error-model", metavar="FILE", help="that error, as JSON")
    policy.add_argument(
        "--roles",
        choices=(*ROLES.names(), COLOCATED),
        help="let workers change their roles; needs both SLOs; without it, pools are fixed and "
        "requests are placed by --placement",
    )
    policy.add_argument(
        "--request-scheduling",
        choices=REQUEST_SCHEDULING.names(),
        help="with --roles: where requests run; default: as --roles, minimal_load for fixed ones",
    )
    policy.add_argument(
        "--role-change",
        choices=(RELABEL, EMPTY),
        help="with --roles: how a worker changes; default: relabel for arrow, else empty",
    )
    policy.add_argument("--ttft-slo-ms", type=float, default=0.0, help="0: none")
    policy.add_argument("--tpot-slo-ms", type=float, default=0.0, help="0: none")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="configuration and figures")
    output.add_argument("--raw", action="store_true", help="with every request in --json")
    output.add_argument("--trace", type=Path, metavar="FILE", help="for chrome://tracing, Perfetto")
    output.add_argument("--plot", type=Path, metavar="FILE", help="load per worker over time")
    return parser


def configuration(args: argparse.Namespace) -> SimulationConfig:
    """What the command line asks for. Raises :class:`SimulationError` and the errors of files."""
    oracle = args.rescheduling == ORACLE
    roles = None
    if args.roles:
        if not (args.ttft_slo_ms and args.tpot_slo_ms):
            raise SimulationError(
                f"--roles {args.roles} weighs loads against both SLOs; set --ttft-slo-ms and "
                "--tpot-slo-ms."
            )
        roles = RolesConfig(
            policy=args.roles,
            scheduling=args.request_scheduling or "",
            change=args.role_change or "",
        )
    elif args.request_scheduling or args.role_change:
        raise SimulationError("--request-scheduling and --role-change are of --roles; set it.")
    return SimulationConfig(
        prefill_workers=args.prefill_workers,
        decode_workers=args.decode_workers,
        profile=load_profile(args.profile),
        placement=args.placement,
        admission=args.admission,
        rescheduling=args.rescheduling,
        prediction=args.prediction or ("true" if oracle else "none"),
        error=load_error_model(args.error_model) if args.error_model else ErrorModel(),
        error_scale=args.predictor_error,
        reschedule_interval_s=args.reschedule_interval,
        max_moves=args.max_moves,
        ttft_slo_ms=args.ttft_slo_ms,
        tpot_slo_ms=args.tpot_slo_ms,
        warmup_s=args.warmup,
        seed=args.seed,
        record_stays=args.trace is not None,
        roles=roles,
    )


def workload(args: argparse.Namespace) -> RequestStream:
    """The requests the command line asks for."""
    names = ("prompt_mean", "output_mean", "output_cv")
    parameters = {name: value for name in names if (value := getattr(args, name)) is not None}
    if parameters and args.workload != "lognormal":
        raise WorkloadError(
            "--prompt-mean, --output-mean and --output-cv are of --workload lognormal"
        )
    built_in = args.workload in BUILT_IN
    return load_workload(
        args.workload,
        seed=args.seed,
        rate=args.rate if args.rate is not None or not built_in else 1.0,
        duration_s=args.duration if args.duration is not None or not built_in else 600.0,
        start_s=args.start,
        **parameters,
    )


def simulate_with_progress(
    config: SimulationConfig, stream: RequestStream, console: Console
) -> Result:
    """Run, with a bar over the requests that have ended."""
    bar = Progress(
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=len(stream))
        kind = Simulation if config.roles is None else RolesSimulation
        return kind(config, stream).run(lambda done: bar.update(task, completed=done))


def table(result: Result) -> Table:
    """The figures for people."""
    summary = result.summary()
    shown = Table(title=summary["workload"], title_justify="left", show_header=True)
    for column in ("", "mean", "p50", "p90", "p99", "max"):
        shown.add_column(column, justify="left" if not column else "right")
    for name in ("ttft_ms", "tpot_ms", "longest_gap_ms"):
        figures: dict[str, float] = summary[name] or {}
        shown.add_row(name, *(f"{v:,.1f}" for v in figures.values()))
    return shown


def lines(result: Result) -> list[str]:
    """The figures that are no distributions."""
    summary: dict[str, Any] = result.summary()
    slo = summary["slo"]
    imbalance = summary["imbalance"] or {}
    throughput = summary["output_tokens_per_s"] or 0
    moves = ("refused", "cancelled")
    parts = [
        f"requests {summary['requests']:,}, rejected {summary['rejected']:,}",
        f"{throughput:,.0f} output tokens/s until the last ended ({summary['makespan_s']:,.0f} s)",
        f"retractions {summary['retractions']:,}",
        f"migrations {summary['migrations']:,}, {summary['moved_bytes'] / 1e9:,.2f} GB; "
        + ", ".join(f"{name} {summary[f'migrations_{name}']:,}" for name in moves),
    ]
    if result.roles is not None:
        flips = result.roles.flips
        parts.append(f"changes of role {len(flips):,}, refused {result.roles.refused or 'none'}")
    if imbalance:
        parts.append(
            f"resident tokens per worker: most over mean {imbalance['max_over_mean']:.2f}, "
            f"cv {imbalance['cv']:.2f}"
        )
    if slo["ttft_ms"] or slo["tpot_ms"]:
        parts.append(
            f"SLOs met: TTFT {slo['ttft_attainment'] or 0:.1%}, TPOT "
            f"{slo['tpot_attainment'] or 0:.1%}, both {slo['attainment'] or 0:.1%}"
        )
    parts.append(f"simulated in {summary['wall_s']:.1f} s ({summary['cpu_s']:.1f} s of CPU)")
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    args = arguments().parse_args(argv)
    console = Console(stderr=True)
    try:
        config, stream = configuration(args), workload(args)
    except (SimulationError, WorkloadError, ProfileError, ValueError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    result = simulate_with_progress(config, stream, console)
    out = Console()
    out.print(table(result))
    for line in lines(result):
        out.print(line, highlight=False)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result.to_dict(raw=args.raw), indent=1) + "\n")
    if args.trace:
        from sglang_ares.simulator.trace import write_trace

        write_trace(args.trace, result)
    if args.plot and config.roles is not None:
        from sglang_ares.simulator.roles.plot import plot_roles

        plot_roles(args.plot, {config.roles.policy: result})
    elif args.plot:
        from sglang_ares.simulator.plots import plot_load

        plot_load(args.plot, {config.rescheduling: result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
