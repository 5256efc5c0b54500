"""Upstream's own prefill/decode disaggregation: separate servers behind sglang-router."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
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

    def close(self) -> None:
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


def start_upstream(processes: Processes, decode_workers: int, model: str = str(MODEL_DIR)) -> int:
    """One prefill and several decode servers behind sglang-router; the router's port."""
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
    return router
