"""Workers of two tensor-parallel ranks: requests move, answers stay, the ranks go in step."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from integration.moving import MoveLog, generate, migrate, run_all
from integration.servers import Server, start_server, stop_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

TOKENS = 450
_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"values": {"type": "array", "items": {"type": "integer"}, "minItems": 60}},
        "required": ["values"],
        "additionalProperties": False,
    }
)
_TRANSITION = re.compile(r"TP(\d)\] migration (\d+) rid=\S+ \S+: (\w+ → \w+ at [\d.]+)$")


def bodies() -> dict[str, dict[str, Any]]:
    """Greedy, seeded, penalised and grammar-bound requests, by rid."""
    families: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0, "ignore_eos": True},
        "seeded": {"temperature": 1.0, "ignore_eos": True},
        "penalties": {"temperature": 0.8, "frequency_penalty": 0.4, "ignore_eos": True},
        "json": {"temperature": 1.0, "json_schema": _SCHEMA},
    }
    counts = {"greedy": 5, "seeded": 5, "penalties": 2, "json": 2}
    return {
        f"{family}-{i}": {
            "text": f"walk {5 + i}\n",
            "sampling_params": {"max_new_tokens": TOKENS, "sampling_seed": 70 + i, **sampling},
        }
        for family, sampling in families.items()
        for i in range(counts[family])
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A cluster whose workers have two ranks each."""
    process, server = start_server(
        tmp_path_factory.mktemp("tp") / "server.log",
        "--tp-size=2",
        "--ares-rescheduling=none",
        "--ares-report-interval=0.1",
        "--log-level=debug",
    )
    try:
        yield server
    finally:
        stop_server(process)


def test_two_ranks_move_requests_in_step(server: Server) -> None:
    """Moved answers equal unmoved ones, an abort on the way leaves nothing behind, and both ranks
    of every worker log the same transitions at the same (rank 0's) time."""
    assert all(len(w["pids"]) == 2 for w in server.status()["workers"])
    unmoved, _ = asyncio.run(
        run_all(server.url, {f"{r}-ref": b for r, b in bodies().items()}, at_once=5)
    )
    moved, log = asyncio.run(
        run_all(server.url, bodies(), at_once=5, move_on=server.decode_workers())
    )
    for rid, answer in moved.items():
        before = unmoved[f"{rid}-ref"]
        assert answer["output_ids"] == before["output_ids"], rid
        assert answer["text"] == before["text"], rid
        for key in ("finish_reason", "prompt_tokens", "completion_tokens"):
            assert answer["meta_info"][key] == before["meta_info"][key], (rid, key)
    assert sum(log.completed[rid] >= 3 for rid in bodies()) >= 10, log
    assert any(log.completed[rid] for rid in bodies() if rid.startswith("json")), log
    assert not log.outcomes["failed"], log

    aborted = asyncio.run(abort_while_moving(server))
    assert aborted >= 4

    status = server.wait_until_idle()
    for worker in status["workers"]:
        pools = worker["pools"]
        assert pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"], worker
        if worker["role"] == "decode":
            assert pools["metadata_slots_free"] == 2 * pools["request_slots_free"], worker
    text = server.log.read_text()
    assert "integrity check failed" not in text
    assert_ranks_in_step(text, at_least=status["migrations"]["completed"])


async def abort_while_moving(server: Server) -> int:
    """Requests aborted the moment a move of theirs is commanded; how many ended by the abort."""
    sampling = {"max_new_tokens": 3000, "temperature": 0, "ignore_eos": True}
    workers = server.decode_workers()
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, limits=limits) as client:

        async def one(i: int) -> bool:
            rid = f"aborted-{i}"
            body = {"text": f"walk {5 + i}\n", "sampling_params": sampling}
            answer = asyncio.create_task(generate(client, rid, body))
            while not (here := await worker_of(client, rid)):
                await asyncio.sleep(0.01)
            target = next(w for w in workers if w != here)
            move = asyncio.create_task(migrate(client, rid, target, MoveLog()))
            await asyncio.sleep(0.004 * i)
            await client.post("/abort_request", json={"rid": rid})
            await move
            return (await answer)["meta_info"]["finish_reason"]["type"] == "abort"

        return sum(await asyncio.gather(*(one(i) for i in range(6))))


async def worker_of(client: httpx.AsyncClient, rid: str) -> int:
    """The worker on which the request decodes, 0 if it does not yet."""
    live = (await client.get("/ares/requests", timeout=60)).json()
    return next((r["worker"] for r in live if r["rid"] == rid and r["tokens"] > 20), 0)


def assert_ranks_in_step(log: str, *, at_least: int) -> None:
    """Both ranks logged the same transitions of every migration, at the same time."""
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in log.splitlines():
        if match := _TRANSITION.search(line):
            rank, migration, transition = match.groups()
            seen[rank, migration].append(transition)
    first = {m: sorted(t) for (rank, m), t in seen.items() if rank == "0"}
    second = {m: sorted(t) for (rank, m), t in seen.items() if rank == "1"}
    assert first == second
    assert len(first) >= at_least > 0
