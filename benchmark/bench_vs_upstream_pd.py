"""ARES without moves against upstream's own prefill/decode disaggregation, on one machine.

Both serve the same model with the same number of workers: upstream as separate servers behind
sglang-router, ARES as one server. Both are up at the same time and idle workers sleep; unmodified
``sglang.bench_serving`` drives them in turn (A B B A …), so that a machine that grows slower hits
both. Reported is the ratio of their output throughput, pair by pair.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.security.control_plane import free_ports

START_TIMEOUT_S = 300
MAX_TOKENS = 32768
UPSTREAM_FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--disable-cuda-graph"),
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--mem-fraction-static", "0.1", "--skip-server-warmup", "--sleep-on-idle"),
    *("--disaggregation-transfer-backend", "nixl"),
    *("--disaggregation-decode-retraction-backup", "cpu_tensor"),
)


@dataclass(frozen=True)
class Arm:
    """One system under test, as ``bench_serving`` sees it."""

    name: str
    port: int
    bench_flags: tuple[str, ...] = ()


class Processes:
    """Servers started here; all are ended, by process group, when the block is left."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str) -> None:
        """Start ``command`` with its output in ``name``.log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self._log_dir / f"{name}.log").open("wb") as log:
            self._started.append(
                subprocess.Popen(command, stdout=log, stderr=log, process_group=0, env=environment)
            )

    def stop(self) -> None:
        """End everything."""
        for sig in (signal.SIGTERM, signal.SIGKILL):
            for process in self._started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sig)
            time.sleep(3)
        for process in self._started:
            process.wait(30)


def wait_for(what: str, url: str, body: dict[str, Any] | None = None) -> None:
    """Until ``url`` answers 200."""
    data = None if body is None else json.dumps(body).encode()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(url, data, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=10) as answer:
                if answer.status == 200:
                    print(f"  {what} is up", flush=True)
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(1)
    raise SystemExit(f"{what} did not answer at {url} within {START_TIMEOUT_S} s; see its log")


def start_upstream(processes: Processes, model: str, decode_workers: int) -> Arm:
    """One prefill and several decode servers behind sglang-router."""
    ports = free_ports(decode_workers + 2)
    prefill, router, *decodes = ports
    bootstrap = free_ports(1)[0]
    common = (
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", model),
        *UPSTREAM_FLAGS,
        *("--max-total-tokens", str(MAX_TOKENS), "--host", "127.0.0.1"),
    )
    processes.start(
        "upstream-prefill",
        *common,
        *("--port", str(prefill), "--disaggregation-mode", "prefill"),
        *("--disaggregation-bootstrap-port", str(bootstrap)),
    )
    wait_for("upstream prefill server", f"http://127.0.0.1:{prefill}/health")
    for i, port in enumerate(decodes):
        processes.start(
            f"upstream-decode-{i}",
            *common,
            *("--port", str(port), "--disaggregation-mode", "decode"),
        )
    for port in decodes:
        wait_for("upstream decode server", f"http://127.0.0.1:{port}/health")
    decode_flags = [f for port in decodes for f in ("--decode", f"http://127.0.0.1:{port}")]
    processes.start(
        "upstream-router",
        *(sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"),
        *("--prefill", f"http://127.0.0.1:{prefill}", str(bootstrap)),
        *decode_flags,
        *("--policy", "round_robin", "--host", "127.0.0.1", "--port", str(router)),
        *("--prometheus-port", str(free_ports(1)[0])),
    )
    wait_for(
        "upstream router",
        f"http://127.0.0.1:{router}/generate",
        {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    )
    return Arm("upstream", router, ("--pd-separated",))


def start_ares(processes: Processes, model: str, decode_workers: int) -> Arm:
    """One ARES server of the same size, placing in turn as the router does, without moves."""
    port = free_ports(1)[0]
    processes.start(
        "ares",
        *(sys.executable, "-m", "sglang_ares.launch_server", "--model-path", model),
        *("--port", str(port), "--max-total-tokens", str(MAX_TOKENS)),
        *("--ares-decode-workers", str(decode_workers)),
        *("--ares-placement", "round_robin", "--ares-rescheduling", "none"),
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
            start_upstream(processes, options.model_path, options.decode_workers),
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
        processes.stop()
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
