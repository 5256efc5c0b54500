"""A cluster to break: 2 prefill and 4 decode workers, quick to notice a death."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from integration.servers import Server

PROMPTS = [f"walk {n}\n" for n in (9, 14, 19, 24)]
TOKENS = 320
# No name twice: two seconds after a stream has ended upstream aborts whoever bears its name then.
_numbers = itertools.count()
NO_KEEPALIVE = httpx.Limits(max_keepalive_connections=0)


@dataclass
class Stream:
    """One streamed request: what it has received, and its longest pause (s)."""

    rid: str
    prompt: str
    max_new_tokens: int | None = TOKENS
    custom_params: dict[str, Any] | None = None
    output_ids: list[int] = field(default_factory=list)
    text: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    pause_s: float = 0.0
    error: str = ""

    def body(self) -> dict[str, Any]:
        """What is posted to ``/generate``."""
        return {
            "rid": self.rid,
            "text": self.prompt,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self.max_new_tokens,
                # One that may become as long as it likes ends by itself.
                "ignore_eos": self.max_new_tokens is not None,
                "custom_params": self.custom_params,
            },
        }

    async def run(self, client: httpx.AsyncClient) -> Stream:
        """Send it and read the stream to its end."""
        last = time.monotonic()
        try:
            async with client.stream("POST", "/generate", json=self.body(), timeout=120) as answer:
                if answer.status_code != 200:
                    self.error = (await answer.aread()).decode()
                    return self
                async for line in answer.aiter_lines():
                    if not line.startswith("data:") or "[DONE]" in line:
                        continue
                    chunk = json.loads(line[5:])
                    if "error" in chunk:
                        self.error = str(chunk["error"])
                        return self
                    now = time.monotonic()
                    if self.output_ids:
                        self.pause_s = max(self.pause_s, now - last)
                    last = now
                    assert chunk["output_ids"][: len(self.output_ids)] == self.output_ids, (
                        f"{self.rid}: the stream took back or repeated tokens"
                    )
                    self.output_ids = chunk["output_ids"]
                    self.text, self.meta = chunk["text"], chunk["meta_info"]
                    ending = self.meta["finish_reason"] or {}
                    if ending.get("type") == "abort":
                        self.error = str(ending["message"])
        except httpx.HTTPError as error:
            self.error = repr(error)
        return self

    async def has(self, tokens: int, timeout_s: float = 30) -> None:
        """Wait until ``tokens`` tokens have arrived."""
        deadline = time.monotonic() + timeout_s
        while len(self.output_ids) < tokens and not self.error:
            assert time.monotonic() < deadline, f"{self.rid} has {len(self.output_ids)} tokens"
            await asyncio.sleep(0.005)


@dataclass
class FaultWorld:
    """The cluster, and the outputs its requests should have."""

    server: Server
    references: dict[str, Stream] = field(default_factory=dict)

    async def learn_references(self) -> None:
        """Run every prompt once, undisturbed."""
        async with self.client() as client:
            streams = await asyncio.gather(
                *(Stream(f"reference-{next(_numbers)}", p).run(client) for p in PROMPTS)
            )
        self.references = {s.prompt: s for s in streams}

    def client(self) -> httpx.AsyncClient:
        """A client that never meets a connection the server has just closed."""
        return httpx.AsyncClient(base_url=self.server.url, limits=NO_KEEPALIVE)

    def assert_exact(self, stream: Stream) -> None:
        """The stream equals the undisturbed one, as far as it was asked for."""
        reference = self.references[stream.prompt]
        assert not stream.error, f"{stream.rid}: {stream.error}"
        assert len(stream.output_ids) == stream.max_new_tokens, stream.rid
        assert stream.output_ids == reference.output_ids[: stream.max_new_tokens], stream.rid
        if stream.max_new_tokens == TOKENS:
            assert stream.text == reference.text, stream.rid
            for key in ("finish_reason", "prompt_tokens", "completion_tokens"):
                assert stream.meta[key] == reference.meta[key], (stream.rid, key)

    async def wait_for(
        self, client: httpx.AsyncClient, prefill: int, decode: int, timeout_s: float = 120
    ) -> dict[str, list[dict[str, Any]]]:
        """The ready workers by role, once there are so many."""
        deadline = time.monotonic() + timeout_s
        while True:
            workers = (await client.get("/ares/status", timeout=30)).json()["workers"]
            ready = {
                role: [w for w in workers if w["role"] == role and w["state"] == "ready"]
                for role in ("prefill", "decode")
            }
            if len(ready["prefill"]) >= prefill and len(ready["decode"]) >= decode:
                return ready
            assert time.monotonic() < deadline, f"not ready after {timeout_s} s: {workers}"
            await asyncio.sleep(0.1)

    async def noticed(
        self, client: httpx.AsyncClient, worker: dict[str, Any], timeout_s: float = 30
    ) -> None:
        """Wait until the cluster knows of the death of ``worker`` (as it was): until then a hung
        worker is still called ready, and would be lost in the middle of the next test."""
        deadline = time.monotonic() + timeout_s
        while True:
            workers = (await client.get("/ares/status", timeout=30)).json()["workers"]
            if not any(
                w["id"] == worker["id"] and w["state"] == "ready" and w["pids"] == worker["pids"]
                for w in workers
            ):
                return
            assert time.monotonic() < deadline, f"the death of {worker} was not noticed"
            await asyncio.sleep(0.1)

    async def worker_of(self, client: httpx.AsyncClient, rid: str) -> int:
        """The decode worker that owns the request."""
        for _ in range(400):
            for request in (await client.get("/ares/requests", timeout=30)).json():
                if request["rid"] == rid:
                    return int(request["worker"])
            await asyncio.sleep(0.01)
        raise AssertionError(f"{rid} is not live")

    async def arm(self, client: httpx.AsyncClient, worker: int, point: str, **fields: Any) -> None:
        """Arm a fault."""
        body = {"worker": worker, "point": point, **fields}
        answer = await client.post("/ares/fault", json=body, timeout=30)
        assert answer.status_code == 200, answer.text

    async def struck(self, client: httpx.AsyncClient, timeout_s: float = 20) -> None:
        """Wait until the armed fault has struck."""
        deadline = time.monotonic() + timeout_s
        while not (await client.get("/ares/fault", timeout=30)).json()["struck"]:
            assert time.monotonic() < deadline, "the migration never came to the armed point"
            await asyncio.sleep(0.01)

    async def assert_balanced(self, client: httpx.AsyncClient, timeout_s: float = 40) -> None:
        """Every ready worker has given back what its requests held."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = (await client.get("/ares/status", timeout=30)).json()
            ready = [w for w in status["workers"] if w["state"] == "ready" and "pools" in w]
            wrong = [w for w in ready if not self._balanced(w)]
            if not wrong and not status["requests"]:
                return
            assert time.monotonic() < deadline, (wrong, status["requests"])
            await asyncio.sleep(0.2)

    @staticmethod
    def _balanced(worker: dict[str, Any]) -> bool:
        pools = worker["pools"]
        metadata = pools["request_slots_free"] * (2 if worker["role"] == "decode" else 1)
        return (
            pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"]
            and pools["requests"] == 0
            and (worker["role"] == "prefill" or pools["metadata_slots_free"] == metadata)
            and worker["migrations_in"] == worker["migrations_out"] == 0
        )


def kill(worker: dict[str, Any], sig: signal.Signals) -> None:
    """Send ``sig`` to all processes of a worker."""
    for pid in worker["pids"]:
        os.kill(pid, sig)
