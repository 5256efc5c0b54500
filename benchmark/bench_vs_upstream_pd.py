"""ARES without moves against upstream's own prefill/decode disaggregation, on one machine.

Both serve the same model with the same number of workers: upstream as separate servers behind
sglang-router, ARES as one server. Both are up at the same time and idle workers sleep; unmodified
``sglang.bench_serving`` drives them in turn (A B B A …), so that a machine that grows slower hits
both. Reported is the ratio of their output throughput, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_ares.bench.upstream import MAX_TOKENS, Processes, start_upstream, wait_for
from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.security.control_plane import free_ports


@dataclass(frozen=True)
class Arm:
    """One system under test, as ``bench_serving`` sees it."""

    name: str
    port: int
    bench_flags: tuple[str, ...] = ()


def start_ares(processes: Processes, model: str, decode_workers: int) -> Arm:
    """One ARES server of the same size, placing in turn as the router does, without moves."""
    port = free_ports(1)[0]
    processes.start(
        "ares",
        *(sys.executable, "-m", "sglang_ares.launch_server", "--model-path", model),
        *("--port", str(port), "--max-total-tokens", str(MAX_TOKENS)),
        *("--ares-decode-workers", str(decode_workers)),
        *("--ares-placement", "round_robin", "--ares-rescheduling", "none"),
        *("--ares-profile-cache", "off"),
    )
    wait_for("ARES", f"http://127.0.0.1:{port}/health")
    return Arm("ares", port)


def bench(arm: Arm, model: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One run of ``bench_serving``; its result document."""
    out.unlink(missing_ok=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"),
            *("--host", "127.0.0.1", "--port", str(arm.port), "--model", model),
            *("--dataset-name", "random-ids", "--seed", str(options.seed)),
            *("--random-input-len", "64", "--random-output-len", "200"),
            *("--random-range-ratio", "0.5", "--num-prompts", str(options.requests)),
            *("--request-rate", str(options.rate), "--output-file", str(out)),
            *arm.bench_flags,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=900,
    )
    result: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    if result["completed"] != options.requests:
        raise SystemExit(f"{arm.name}: {result['completed']} of {options.requests} completed")
    return result


def rounds(count: int) -> Iterator[tuple[int, bool]]:
    """Round number and whether ARES goes first."""
    for i in range(count):
        yield i, i % 2 == 0


def main() -> None:
    """Measure, print a table and keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", default=str(MODEL_DIR))
    parser.add_argument("--decode-workers", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", default="inf", help="Requests per second. Default: %(default)s.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/vs_upstream_pd.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log_dir = options.out.parent / "vs_upstream_pd_logs"
    log_dir.mkdir(exist_ok=True)
    processes = Processes(log_dir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    measured: dict[str, list[dict[str, Any]]] = {"ares": [], "upstream": []}
    try:
        print("starting both systems …", flush=True)
        arms = [
            start_ares(processes, options.model_path, options.decode_workers),
            Arm(
                "upstream",
                start_upstream(processes, options.decode_workers, options.model_path),
                ("--pd-separated",),
            ),
        ]
        for arm in arms:
            bench(arm, options.model_path, options, log_dir / "warm-up.json")
        for number, ares_first in rounds(options.rounds):
            for arm in arms if ares_first else arms[::-1]:
                result = bench(arm, options.model_path, options, log_dir / "result.json")
                measured[arm.name].append(result)
                print(
                    f"  round {number + 1}/{options.rounds} {arm.name:9s}"
                    f" {result['output_throughput']:8.1f} tok/s"
                    f"  TPOT p50 {result['median_tpot_ms']:6.1f} ms"
                    f"  TTFT p50 {result['median_ttft_ms']:7.1f} ms",
                    flush=True,
                )
    finally:
        processes.close()
    report(measured, options)


def report(measured: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """The ratios, pair by pair, and the file with everything."""
    keys = ("output_throughput", "median_tpot_ms", "p99_tpot_ms", "median_ttft_ms")
    ratios = {
        key: [a[key] / u[key] for a, u in zip(measured["ares"], measured["upstream"], strict=True)]
        for key in keys
    }
    document = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "seed": options.seed,
        "ratios_ares_over_upstream": ratios,
        "runs": {
            name: [{key: run[key] for key in (*keys, "completed", "duration")} for run in runs]
            for name, runs in measured.items()
        },
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print("\nARES / upstream (median of pairs; min … max)")
    for key, values in ratios.items():
        middle = statistics.median(values)
        print(f"  {key:18s} {middle:6.3f}   {min(values):6.3f} … {max(values):6.3f}")
    print(f"raw figures: {options.out}")


if __name__ == "__main__":
    main()
