"""A decode worker whose KV runs out: requests leave for one with room before any is retracted."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from integration.moving import MoveLog, generate, migrate
from integration.servers import Server, start_server, stop_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

REQUESTS = 10
TOKENS = 900
# One worker cannot hold what the requests grow to; two can.
KV_TOKENS = 6000
FLAGS = (
    "--enable-metrics",
    "--ares-rescheduling=none",
    "--ares-report-interval=0.1",
    f"--max-total-tokens={KV_TOKENS}",
    # Upstream keeps this much free for each running request when it admits one more.
    "--num-reserved-decode-tokens=64",
)
assert KV_TOKENS < REQUESTS * TOKENS < 2 * KV_TOKENS

FAMILIES: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "frequency_penalty": 0.3, "presence_penalty": 0.2},
)


def bodies() -> dict[str, dict[str, Any]]:
    """Greedy, seeded and penalised requests of the same length, by rid."""
    return {
        f"r{i}": {
            "text": f"walk {5 + i}\n",
            "sampling_params": {
                "max_new_tokens": TOKENS,
                "ignore_eos": True,
                "sampling_seed": i,
                **FAMILIES[i % len(FAMILIES)],
            },
        }
        for i in range(REQUESTS)
    }


async def crowd(server: Server, suffix: str) -> dict[str, Any]:
    """Run all requests at once, gathered on one worker as soon as they decode; the answers."""
    home, away = server.decode_workers()
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:
        runs = [
            asyncio.create_task(generate(client, f"{rid}-{suffix}", body))
            for rid, body in bodies().items()
        ]
        gathered = 0
        while gathered < REQUESTS:
            live = (await client.get("/ares/requests", timeout=60)).json()
            strays = [r["rid"] for r in live if r["worker"] == away]
            gathered = len(live) - len(strays)
            await asyncio.gather(*(migrate(client, rid, home, MoveLog()) for rid in strays))
        answers = await asyncio.gather(*runs)
    return dict(zip(bodies(), answers))


async def few_at_a_time(server: Server) -> dict[str, Any]:
    """The answers with memory to spare."""
    gate = asyncio.Semaphore(4)
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:

        async def one(rid: str, body: dict[str, Any]) -> Any:
            async with gate:
                return await generate(client, f"{rid}-ref", body)

        answers = await asyncio.gather(*(one(r, b) for r, b in bodies().items()))
    return dict(zip(bodies(), answers))


def retractions(server: Server) -> float:
    """The sum of ``sglang_ares:retractions_total`` over the workers."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(
        float(v) for v in re.findall(r"^sglang_ares:retractions_total\{.*\} (\S+)$", text, re.M)
    )


def assert_equal(answers: dict[str, Any], expected: dict[str, Any]) -> None:
    """No request lost, and every answer as with memory to spare."""
    for rid in expected:
        for key in ("output_ids", "text"):
            assert answers[rid][key] == expected[rid][key], rid
        for key in ("finish_reason", "completion_tokens"):
            assert answers[rid]["meta_info"][key] == expected[rid]["meta_info"][key], (rid, key)


def assert_balanced(server: Server) -> None:
    """Everything is free again."""
    for worker in server.wait_until_idle()["workers"]:
        pools = worker["pools"]
        assert pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"], worker
    assert "integrity check failed" not in server.log.read_text()


def test_requests_leave_before_they_are_retracted(tmp_path: Path) -> None:
    """Without relief the crowded worker retracts, with it none is; either way all answers equal
    the ones given with memory to spare, and status and metrics tell why requests moved."""
    process, server = start_server(tmp_path / "without.log", *FLAGS, "--no-ares-memory-relief")
    try:
        expected = asyncio.run(few_at_a_time(server))
        assert retractions(server) == 0
        answers = asyncio.run(crowd(server, "crowded"))
        assert_equal(answers, expected)
        assert_balanced(server)
        without = retractions(server)
        assert without > 0, "the worker was not crowded enough: nothing was tested"
        assert server.status()["migrations"]["causes"]["memory"] == 0
    finally:
        stop_server(process)

    process, server = start_server(tmp_path / "with.log", *FLAGS)
    try:
        answers = asyncio.run(crowd(server, "relieved"))
        assert_equal(answers, expected)
        assert_balanced(server)
        assert retractions(server) < without
        assert server.status()["migrations"]["causes"]["memory"] > 0
        metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
        assert re.search(
            r'^sglang_ares:migrations_total\{cause="memory",.*outcome="completed"', metrics, re.M
        )
    finally:
        stop_server(process)
