"""What ``bench_migration.py`` drives: a server of ours, token streams with their times, moves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sglang_ares.srt.security.control_plane import free_ports

START_TIMEOUT_S = 600


@contextlib.contextmanager
def running_server(log: Path, *flags: str) -> Iterator[str]:
    """A cluster of one prefill and two decode workers; its URL. Ended when the block is left."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "sglang_ares.launch_server", "--port", str(port)]
    command += ["--ares-rescheduling=none", "--ares-report-interval=0.05", "--log-level=info"]
    command += ["--ares-profile-cache=off"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *flags], stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@dataclass
class Stream:
    """A streamed request. ``times``: when each token arrived here (s, monotonic)."""

    rid: str
    times: list[float] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Client:
    """Requests and moves on one server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, limits=httpx.Limits(max_keepalive_connections=0), timeout=600
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def start(self, rid: str, input_ids: list[int], new_tokens: int) -> Stream:
        """Begin a request; its tokens are read in the background."""
        stream = Stream(rid)
        stream.task = asyncio.create_task(self._read(stream, input_ids, new_tokens))
        return stream

    async def _read(self, stream: Stream, input_ids: list[int], new_tokens: int) -> None:
        body = {
            "rid": stream.rid,
            "input_ids": input_ids,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": new_tokens,
                "ignore_eos": True,
            },
        }
        async with self._http.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    stream.times.append(time.monotonic())
                    if '"error"' in line[:40]:
                        raise RuntimeError(line)

    async def requests(self) -> list[dict[str, Any]]:
        """The live requests."""
        listing: list[dict[str, Any]] = (await self._http.get("/ares/requests")).json()
        return listing

    async def decode_workers(self) -> list[int]:
        """Ids of the decode workers."""
        status = (await self._http.get("/ares/status")).json()
        return [w["id"] for w in status["workers"] if w["role"] == "decode"]

    async def where(self, stream: Stream) -> int:
        """The worker that decodes the request, once a few tokens have come."""
        while len(stream.times) < 8:
            if stream.task is not None and stream.task.done():
                stream.task.result()
                raise RuntimeError(f"{stream.rid} ended before it was moved")
            await asyncio.sleep(0.01)
        while True:
            for request in await self.requests():
                if request["rid"] == stream.rid:
                    worker: int = request["worker"]
                    return worker
            await asyncio.sleep(0.02)

    async def move(self, stream: Stream, target: int) -> dict[str, Any]:
        """One move; what the server answered."""
        body = {"rid": stream.rid, "target": target}
        answer: dict[str, Any] = (await self._http.post("/ares/migrate", json=body)).json()
        return answer

    async def end(self, *streams: Stream) -> None:
        """Abort requests and wait until they have ended."""
        for stream in streams:
            await self._http.post("/abort_request", json={"rid": stream.rid})
        for stream in streams:
            if stream.task is not None:
                with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                    await stream.task
