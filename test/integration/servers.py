"""Starts and stops real servers for the process-level tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sglang_ares.srt.security.control_plane import free_ports

START_TIMEOUT_S = 240


@dataclass(frozen=True)
class Server:
    """A running server. ``pid``: its main process."""

    url: str
    pid: int
    log: Path

    def status(self) -> dict[str, Any]:
        """The document of ``GET /ares/status``."""
        document: dict[str, Any] = httpx.get(f"{self.url}/ares/status", timeout=30).json()
        return document

    def decode_workers(self) -> list[int]:
        """Ids of the decode workers."""
        return [w["id"] for w in self.status()["workers"] if w["role"] == "decode"]

    def wait_until_idle(self, timeout_s: float = 30) -> dict[str, Any]:
        """The status once every ready worker has reported that it is idle."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            ready = [w for w in status["workers"] if w["state"] == "ready"]
            if all(w["pools"]["idle"] for w in ready) and not status["requests"]:
                return status
            time.sleep(0.2)
        raise AssertionError(f"not idle after {timeout_s} s: {status}")


def start_server(log: Path, *flags: str) -> tuple[subprocess.Popen[bytes], Server]:
    """Start ``python -m sglang_ares.launch_server`` and wait until it answers."""
    port = free_ports(1)[0]
    # What one server has measured is not to change the next one's decisions.
    flags = ("--ares-profile-cache=off", *flags)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_ares.launch_server", "--port", str(port), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            # A group, not a session: Linux shares the cores between sessions first (autogroups),
            # and on few cores that starves the client of a busy server for seconds.
            process_group=0,
        )
    server = Server(f"http://127.0.0.1:{port}", process.pid, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return process, server
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    stop_server(process)
    raise AssertionError(f"the server did not start; its log ends:\n{log.read_text()[-4000:]}")


def stop_server(process: subprocess.Popen[bytes]) -> None:
    """End the server as Ctrl-C does; by force after a while."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
