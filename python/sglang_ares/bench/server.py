"""A server of ours for as long as a block runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from sglang_ares.srt.security.control_plane import free_ports

START_TIMEOUT_S = 600


class ServerFailedError(RuntimeError):
    """The server did not start; the text names its log."""


@contextlib.contextmanager
def running_server(log: Path, *flags: str) -> Iterator[str]:
    """Start ``python -m sglang_ares.launch_server`` with ``flags`` and its output in ``log``; its
    URL. It is ended when the block is left. Nothing that an earlier one has measured is taken over,
    unless the flags say so."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "sglang_ares.launch_server", "--port", str(port)]
    command += ["--ares-profile-cache", "off", *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        # A group, not a session: Linux shares the cores between sessions first (autogroups).
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, process_group=0)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailedError(f"the server did not start; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        _end(process)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    # Children of a server that was ended while it started may not have noticed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
