"""``python -m sglang_ares.bench goodput``: the highest rate at which enough requests meet both
SLOs, for several policies in turn, on a running server, on servers it starts, or simulated."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_ares.bench.live import LiveError, LiveServer, replay_live, work_items
from sglang_ares.bench.rate_search import RateSearch
from sglang_ares.bench.report import machine, summarize, write_json
from sglang_ares.bench.server import ServerFailedError, running_server
from sglang_ares.bench.slo import ATTAINMENTS, Slo
from sglang_ares.bench.upstream import Processes, start_upstream
from sglang_ares.bench.workloads import RequestStream, WorkloadError, load_workload
from sglang_ares.profiles.profile import ProfileError, load_profile
from sglang_ares.simulator import SimulationConfig
from sglang_ares.simulator.config import SimulationError
from sglang_ares.simulator.goodput import Goodput, Point, goodput_of_arms
from sglang_ares.simulator.plots import plot_attainment
from sglang_ares.srt.policy.admission import ADMISSIONS, SLO, WORKER

UPSTREAM = "upstream"


@dataclass(frozen=True)
class Arm:
    """A system under test: our server under these policies, or (``rescheduling`` is
    :data:`UPSTREAM`) upstream's servers behind its router."""

    name: str
    placement: str
    admission: str
    rescheduling: str

    @classmethod
    def parse(cls, text: str, placement: str) -> Arm:
        """``star``; or ``round_robin+star``, ``slo+star``, ``round_robin+slo+star`` for a placement
        and an admission of its own."""
        *own, rescheduling = text.split("+")
        admission = own.pop() if own and own[-1] in ADMISSIONS else WORKER
        return cls(text, "+".join(own) or placement, admission, rescheduling)


@dataclass
class ArmSearch:
    """The searches of one arm, a target each, and every point that was tried for any of them."""

    arm: Arm
    searches: list[RateSearch]
    points: list[Point] = field(default_factory=list)

    @property
    def current(self) -> RateSearch | None:
        """The search that asks for the next probe."""
        return next((s for s in self.searches if not s.done), None)

    def note(self, point: Point) -> None:
        """Every search learns from every probe."""
        current = self.current
        self.points.append(point)
        for search in self.searches:
            search.note(point.rate, point.attainment, own=search is current)

    @property
    def goodput(self) -> Goodput:
        """What was found so far."""
        return Goodput(rate={s.target: s.good for s in self.searches}, points=tuple(self.points))


async def probe(
    server: LiveServer,
    arm: Arm,
    stream: RequestStream,
    rate: float,
    slo: Slo,
    options: argparse.Namespace,
    number: int,
) -> Point:
    """Replay ``stream`` at ``rate`` and judge it. Requests that have not ended when the SLOs are
    long missed count as missed."""
    ours = arm.rescheduling != UPSTREAM
    before: dict[str, Any] = {}
    if ours:
        await server.use_policies(arm.placement, arm.rescheduling, arm.admission)
        before = await server.status()
    scaled = stream.scaled(stream.rate / rate)
    longest_s = 1e-3 * (slo.ttft_ms + slo.tpot_ms * float(stream.output_tokens.max()))
    run = await replay_live(
        server,
        work_items(scaled, seed=options.seed, name=f"goodput-{number}"),
        dilation=before.get("time_dilation", 1.0),
        timeout_s=float(scaled.arrival_s[-1]) + 1.5 * longest_s + 5,
        ours=ours,
    )
    after = await server.status() if ours else {}
    summary = summarize(run, 0)
    return Point(
        rate=rate,
        attainment=slo.attainment(run, options.warmup),
        tpot_p99_ms=summary.tpot_p99_ms,
        ttft_p99_ms=summary.ttft_p99_ms,
        migrations=run.migrations,
        moved_tokens=_gain(before, after, lambda s: s["migrations"]["tokens_sent"]),
        retractions=_gain(
            before, after, lambda s: sum(w.get("retracted", 0) for w in s["workers"])
        ),
    )


def _gain(
    before: dict[str, Any], after: dict[str, Any], figure: Callable[[dict[str, Any]], int]
) -> int:
    return figure(after) - figure(before) if before and after else 0


async def search_live(
    urls: Mapping[str, str], arms: list[Arm], stream: RequestStream, options: argparse.Namespace
) -> dict[str, Goodput]:
    """Goodput by arm; one probe of every arm in turn. ``urls``: where each arm is served. In the
    end our server has its own policies again."""
    slo = Slo(options.ttft_slo_ms, options.tpot_slo_ms)
    # The search for the stricter share starts where the other ended.
    states = [
        ArmSearch(
            arm,
            [
                RateSearch(share, stream.rate, options.precision, options.most_probes)
                for share in ATTAINMENTS
            ],
        )
        for arm in arms
    ]
    number = 0
    most = len(arms) * len(ATTAINMENTS) * options.most_probes
    async with contextlib.AsyncExitStack() as stack:
        ours = next((arm.name for arm in arms if arm.rescheduling != UPSTREAM), None)
        if ours is not None:
            served = await stack.enter_async_context(LiveServer(urls[ours]))
            await stack.enter_async_context(served.policies_kept())
        bar = stack.enter_context(tqdm(total=most, desc="probes (at most)", unit="probe"))
        while any(state.current for state in states):
            # A different arm goes first in every round.
            for state in states[number % len(states) :] + states[: number % len(states)]:
                search = state.current
                if search is None:
                    continue
                async with LiveServer(
                    urls[state.arm.name], stream_interval=options.stream_interval
                ) as server:
                    point = await probe(
                        server, state.arm, stream, search.next_rate, slo, options, number
                    )
                state.note(point)
                number += 1
                bar.update()
                bar.write(
                    f"{state.arm.name:24s} {point.rate:8.2f}/s  {point.attainment:6.1%} within SLO"
                    f"  TPOT p99 {point.tpot_p99_ms:.0f} ms  TTFT p99 {point.ttft_p99_ms:.0f} ms"
                )
    return {state.arm.name: state.goodput for state in states}


def search_simulated(
    arms: list[Arm], stream: RequestStream, options: argparse.Namespace
) -> dict[str, Goodput]:
    """Goodput by arm, in the simulator."""
    configure = partial(
        SimulationConfig,
        profile=load_profile(options.profile),
        prefill_workers=options.prefill_workers,
        decode_workers=options.decode_workers,
        ttft_slo_ms=options.ttft_slo_ms,
        tpot_slo_ms=options.tpot_slo_ms,
        warmup_s=options.warmup,
        seed=options.seed,
    )
    configs = {
        arm.name: configure(
            placement=arm.placement,
            admission=arm.admission,
            rescheduling=arm.rescheduling,
            prediction="true" if arm.rescheduling == "oracle" else options.prediction,
        )
        for arm in arms
    }
    found = goodput_of_arms(
        configs, stream, precision=options.precision, processes=options.processes
    )
    return dict(tqdm(found, total=len(configs), desc="simulated", unit="arm"))


def table(found: Mapping[str, Goodput]) -> Table:
    """One row per arm: the rates, and each over the first arm's."""
    shown = Table(title="Goodput (requests per second)", title_justify="left")
    shown.add_column("")
    first = next(iter(found.values()))
    for share in first.rate:
        shown.add_column(f"{share:.0%} within SLO", justify="right")
        shown.add_column("ratio", justify="right")
    shown.add_column("probes", justify="right")
    for name, goodput in found.items():
        cells = []
        for share, rate in goodput.rate.items():
            base = first.rate[share]
            cells += [f"{rate:.2f}", f"{rate / base:.2f}" if base else "–"]
        shown.add_row(name, *cells, str(len(goodput.points)))
    return shown


def write_csv(path: Path, found: Mapping[str, Goodput]) -> None:
    """Every probe, a row each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", *Point.__dataclass_fields__])
        for name, goodput in found.items():
            for point in goodput.points:
                writer.writerow([name, *asdict(point).values()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags; those it does not know are the server's."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--url", help="a running server of ours, which keeps its own policies; else one is started"
    )
    where.add_argument("--simulate", action="store_true", help="in the simulator")
    parser.add_argument(
        "--arms",
        default="none,reactive,star,ares",
        help="rescheduling policies, each with --placement or as PLACEMENT+RESCHEDULING, and with "
        f"requests let in by --ttft-slo-ms as {SLO}+RESCHEDULING or PLACEMENT+{SLO}+RESCHEDULING; "
        f"{UPSTREAM}: upstream's servers behind its router",
    )
    parser.add_argument("--placement", default="least_tokens")
    parser.add_argument("--workload", default="lognormal", help="built-in, or a trace file")
    parser.add_argument("--prompt-mean", type=float, help="of lognormal: mean prompt tokens")
    parser.add_argument("--output-mean", type=float, help="of lognormal: mean output tokens")
    parser.add_argument("--output-cv", type=float, help="of lognormal: variation coefficient")
    parser.add_argument("--rate", type=float, default=4.0, help="of the first probe, per second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds at that rate")
    parser.add_argument("--warmup", type=float, default=0.0, help="seconds left out of figures")
    parser.add_argument("--ttft-slo-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-slo-ms", type=float, default=50.0)
    parser.add_argument("--precision", type=float, default=0.05, help="of the rate, relative")
    parser.add_argument("--most-probes", type=int, default=12, help="per arm and share")
    parser.add_argument("--stream-interval", type=int, default=8, help="tokens per piece")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/goodput"), help="folder")
    simulated = parser.add_argument_group("with --simulate")
    simulated.add_argument("--profile", default="24gb-qwen2.5-7b")
    simulated.add_argument("--prefill-workers", type=int, default=1)
    simulated.add_argument("--decode-workers", type=int, default=8)
    simulated.add_argument("--prediction", default="prior")
    simulated.add_argument("--processes", type=int, default=1)


def measure(
    arms: list[Arm], stream: RequestStream, options: argparse.Namespace, server_flags: list[str]
) -> dict[str, Goodput]:
    """Goodput by arm, wherever the options say."""
    if options.simulate:
        return search_simulated(arms, stream, options)
    with contextlib.ExitStack() as stack:
        urls: dict[str, str] = {}
        ours = [arm for arm in arms if arm.rescheduling != UPSTREAM]
        if ours:
            # Which admission is used is every arm's own.
            slos = (
                f"--ares-ttft-slo-ms={options.ttft_slo_ms}",
                f"--ares-tpot-slo-ms={options.tpot_slo_ms}",
            )
            url = options.url or stack.enter_context(
                running_server(options.out / "server.log", *slos, *server_flags)
            )
            urls = {arm.name: url for arm in ours}
        if len(ours) < len(arms):
            processes = stack.enter_context(contextlib.closing(Processes(options.out)))
            port = start_upstream(processes, options.decode_workers)
            urls |= {arm.name: f"http://127.0.0.1:{port}" for arm in arms if arm not in ours}
        return asyncio.run(search_live(urls, arms, stream, options))


def main(options: argparse.Namespace, server_flags: list[str]) -> int:
    """Measure, and write table, CSV, JSON and picture; the exit status."""
    arms = [Arm.parse(text, options.placement) for text in options.arms.split(",")]
    upstream = any(arm.rescheduling == UPSTREAM for arm in arms)
    if upstream and (options.simulate or any("--ares-emulate" in f for f in server_flags)):
        print(f"goodput: the arm {UPSTREAM} is for real servers with a model", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("prompt_mean", "output_mean", "output_cv")
    lengths = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    try:
        stream = load_workload(
            options.workload,
            seed=options.seed,
            rate=options.rate,
            duration_s=options.duration,
            **lengths,
        )
        found = measure(arms, stream, options, server_flags)
    except (WorkloadError, ProfileError, SimulationError) as error:
        print(f"goodput: {error}", file=sys.stderr)
        return 2
    except (LiveError, ServerFailedError, OSError) as error:
        print(f"goodput: {error}", file=sys.stderr)
        return 1
    Console().print(table(found))
    write_csv(options.out / "goodput.csv", found)
    write_json(
        options.out / "goodput.json",
        {
            "command": "python -m sglang_ares.bench " + " ".join(sys.argv[1:]),
            "machine": machine(),
            "workload": stream.origin,
            "slo": {"ttft_ms": options.ttft_slo_ms, "tpot_ms": options.tpot_slo_ms},
            "goodput": {
                name: {f"{share:.0%}": rate for share, rate in goodput.rate.items()}
                for name, goodput in found.items()
            },
        },
    )
    points = {name: goodput.points for name, goodput in found.items()}
    plot_attainment(options.out / "goodput.png", points, title=stream.name)
    print(f"written: {options.out}/goodput.csv, .json, .png")
    return 0
