"""What the emulated comparisons share: one replay under given policies, as a JSON document."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_ares.bench.live import LiveServer, replay_live, work_items
from sglang_ares.bench.replay import Run
from sglang_ares.bench.report import percentile, series
from sglang_ares.bench.slo import Slo
from sglang_ares.bench.workloads import RequestStream, load_workload
from sglang_ares.srt.policy.admission import WORKER

DRAIN_POLL_S = 0.5


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Cluster, workload and time."""
    parser.add_argument("--profile", default="24gb-qwen2.5-7b")
    parser.add_argument("--dilation", type=float, default=4.0, help="--ares-time-dilation")
    parser.add_argument("--prefill-workers", type=int, default=1)
    parser.add_argument("--decode-workers", type=int, default=8)
    parser.add_argument("--workload", default="lognormal", help="built-in, or a trace file")
    parser.add_argument("--rate", type=float, default=8.0, help="requests per emulated second")
    parser.add_argument("--duration", type=float, default=60.0, help="emulated seconds")
    parser.add_argument("--prompt-mean", type=float, help="of lognormal: mean prompt tokens")
    parser.add_argument("--output-mean", type=float, help="of lognormal: mean output tokens")
    parser.add_argument("--output-cv", type=float, help="of lognormal: variation coefficient")
    parser.add_argument("--stream-interval", type=int, default=16, help="tokens per piece")
    parser.add_argument("--ttft-slo-ms", type=float, default=2000.0)
    parser.add_argument("--tpot-slo-ms", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)


def server_flags(options: argparse.Namespace) -> tuple[str, ...]:
    """The cluster of ``options``: emulated, or ``real``, with the embedded model."""
    emulated = (f"--ares-emulate={options.profile}", f"--ares-time-dilation={options.dilation}")
    return (
        *(() if getattr(options, "real", False) else emulated),
        f"--ares-prefill-workers={options.prefill_workers}",
        f"--ares-decode-workers={options.decode_workers}",
        f"--ares-ttft-slo-ms={options.ttft_slo_ms}",
        f"--ares-tpot-slo-ms={options.tpot_slo_ms}",
        "--incremental-streaming-output",
    )


def workload_of(options: argparse.Namespace) -> RequestStream:
    """The requests of ``options``."""
    names = ("prompt_mean", "output_mean", "output_cv")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return load_workload(
        options.workload,
        seed=options.seed,
        rate=options.rate,
        duration_s=options.duration,
        **given,
    )


async def replay_arm(
    url: str,
    stream: RequestStream,
    options: argparse.Namespace,
    *,
    placement: str,
    rescheduling: str,
    name: str,
    admission: str = WORKER,
) -> tuple[Run, dict[str, Any]]:
    """Replay ``stream`` under these policies on an idle cluster; the run, and its figures. All
    times are emulated ones."""
    async with LiveServer(url, stream_interval=options.stream_interval) as server:
        await _idle(server)
        await server.use_policies(placement, rescheduling, admission)
        before = await server.status()
        with tqdm(total=len(stream), desc=name, unit="request") as bar:

            def progress(run: Run) -> None:
                bar.update(run.done - bar.n)

            run = await replay_live(
                server,
                work_items(stream, seed=options.seed, name=name),
                dilation=before["time_dilation"],
                timeout_s=options.duration * 20,
                on_progress=progress,
            )
        after = await server.status()
    figures = figures_of(run, Slo(options.ttft_slo_ms, options.tpot_slo_ms))
    for key in ("attempted", "completed", "tokens_sent"):
        figures[f"moves_{key}"] = after["migrations"][key] - before["migrations"][key]
    for key, label in (("retracted", "retractions"), ("late_steps", "late_steps")):
        figures[label] = sum(w.get(key, 0) for w in after["workers"]) - sum(
            w.get(key, 0) for w in before["workers"]
        )
    return run, figures


async def _idle(server: LiveServer) -> None:
    while (status := await server.status())["requests"] or any(
        not w["pools"]["idle"] for w in status["workers"]
    ):
        await asyncio.sleep(DRAIN_POLL_S)


def figures_of(run: Run, slo: Slo) -> dict[str, Any]:
    """Means and percentiles in milliseconds, tokens per second, attainment, goodput."""
    done = [r for r in run.results if r.completed]
    columns = {
        "tpot": [1e3 * r.tpot_s for r in done if r.tpot_s is not None],
        "ttft": [1e3 * r.ttft_s for r in done if r.ttft_s is not None],
    }
    last = max((r.last_token_s for r in done), default=0.0)
    met = sum(map(slo.met_by, run.results))
    figures: dict[str, Any] = {
        "requests": len(run.results),
        "failed": len(run.results) - len(done),
        "output_tokens_per_s": run.tokens / last if last else 0.0,
        "attainment": slo.attainment(run),
        "goodput_per_s": met / last if last else 0.0,
        "makespan_s": last,
    }
    for name, values in columns.items():
        figures[f"{name}_mean_ms"] = sum(values) / len(values) if values else 0.0
        for q in (50, 90, 99):
            figures[f"{name}_p{q}_ms"] = percentile(values, q) if values else 0.0
    return figures


def raw(run: Run) -> dict[str, Any]:
    """Every request's times (s), in the stream's order, and the samples of the workers."""
    rows = [asdict(r) | {"tokens": len(r.token_ids)} for r in run.results]
    names = ("sent_s", "first_token_s", "last_token_s", "tokens")
    columns = {n: [round(row[n], 4) for row in rows] for n in names}
    return {**columns, "errors": [r.error for r in run.results if r.error], **series(run.samples)}


def log_path(json_path: Path) -> Path:
    """Where the server's output goes."""
    return json_path.with_suffix(".server.log")
