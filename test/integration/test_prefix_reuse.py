"""A moved request sends only what the target's prefix cache does not hold."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import httpx
import pytest

from integration.moving import generate, run_all
from integration.servers import Server
from sglang_ares.srt.platforms.cpu import CPU_DEFAULTS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPT_TOKENS = 600
NEW_TOKENS = 400
MOVED = 2
PAGE = int(CPU_DEFAULTS["page_size"])


def whole_pages(tokens: float) -> int:
    """As many of the tokens as a cache can hold: it holds whole pages."""
    return int(tokens) // PAGE * PAGE


def prompt(seed: str, shared: float) -> list[int]:
    """Token ids: the first ``shared`` of them are those of every prompt."""
    common, own = random.Random("common"), random.Random(seed)
    ids = [common.randrange(10, 60) for _ in range(int(shared * PROMPT_TOKENS))]
    return ids + [own.randrange(10, 60) for _ in range(PROMPT_TOKENS - len(ids))]


def body(seed: str, shared: float, new_tokens: int = NEW_TOKENS, **fields: Any) -> dict[str, Any]:
    """A request of ``new_tokens`` greedy tokens."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": prompt(seed, shared), "sampling_params": sampling, **fields}


async def where(client: httpx.AsyncClient, rid: str) -> int:
    """The worker that decodes the request, once it has begun."""
    while True:
        for request in (await client.get("/ares/requests", timeout=30)).json():
            if request["rid"] == rid and request["tokens"] > PROMPT_TOKENS + 5:
                worker: int = request["worker"]
                return worker
        await asyncio.sleep(0.01)


async def move(client: httpx.AsyncClient, rid: str, target: int) -> dict[str, Any]:
    """One move, which must succeed."""
    answer = await client.post("/ares/migrate", json={"rid": rid, "target": target}, timeout=60)
    document: dict[str, Any] = answer.json()
    assert document["outcome"] == "completed", document
    assert document["tokens"] == document["tokens_sent"] + document["tokens_saved"]
    return document


def client_of(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_keepalive_connections=0))


async def run_and_move(
    server: Server, rid: str, request: dict[str, Any], moves: int = 1
) -> tuple[list[dict[str, Any]], Any]:
    """Run a request and move it to and fro; the moves' documents and the answer."""
    workers = server.decode_workers()
    async with client_of(server) as client:
        running = asyncio.create_task(generate(client, rid, request))
        here = await where(client, rid)
        documents = []
        for _ in range(moves):
            target = next(w for w in workers if w != here)
            documents.append(await move(client, rid, target))
            here = target
        return documents, await running


async def warm(server: Server, name: str, shared: float, **fields: Any) -> None:
    """Have the common prefix cached on every decode worker."""
    for i in range(2):
        rid = f"warm-{name}-{i}"
        await run_and_move(server, rid, body(rid, shared, new_tokens=120, **fields))


def assert_balanced(server: Server) -> dict[str, Any]:
    """Idle: all KV is free or can be evicted, nothing is locked."""
    status = server.wait_until_idle()
    for worker in status["workers"]:
        pools = worker["pools"]
        assert pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"], worker
        assert pools["kv_locked"] == 0, worker
    return status


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_tokens_sent_drop_by_the_shared_prefix(server: Server, shared: float) -> None:
    """What the prompts have in common is saved, the rest is sent; the answer stays the same."""

    async def run() -> None:
        await warm(server, f"share-{shared}", shared)
        before = server.status()["migrations"]
        for i in range(MOVED):
            seed = f"share-{shared}-{i}"
            # Not yet run: otherwise its own output would be cached as well.
            (document,), moved = await run_and_move(server, seed, body(seed, shared))
            saved = document["tokens_saved"]
            common = shared * PROMPT_TOKENS
            assert whole_pages(common) <= saved <= common + 8, document
            async with client_of(server) as client:
                unmoved = await generate(client, f"{seed}-ref", body(seed, shared))
            assert moved["output_ids"] == unmoved["output_ids"]
            assert moved["text"] == unmoved["text"]
        after = server.status()["migrations"]
        saved = after["tokens_saved"] - before["tokens_saved"]
        assert MOVED * whole_pages(shared * PROMPT_TOKENS) <= saved
        assert after["tokens_sent"] > before["tokens_sent"]

    asyncio.run(run())
    assert_balanced(server)


def test_moving_back_sends_only_what_was_written_since(server: Server) -> None:
    """The source keeps what it handed over; the second move finds it there."""
    documents, _ = asyncio.run(run_and_move(server, "back", body("back", 0.0), moves=4))
    assert documents[0]["tokens_saved"] <= 8
    for previous, document in itertools.pairwise(documents):
        assert document["tokens_saved"] == whole_pages(previous["tokens"])
        assert document["tokens_sent"] < 400
    assert_balanced(server)


def test_a_salt_separates_the_caches(server: Server) -> None:
    """Equal tokens under another ``cache_salt`` or ``extra_key`` are not shared."""

    async def run() -> None:
        await warm(server, "salt", 1.0, cache_salt="a", extra_key="k")
        for salt, key, expected in (
            ("a", "k", whole_pages(PROMPT_TOKENS)),
            ("b", "k", 0),
            ("a", "l", 0),
        ):
            request = body("salt", 1.0, cache_salt=salt, extra_key=key)
            (document,), _ = await run_and_move(server, f"salt-{salt}-{key}", request)
            assert document["tokens_saved"] >= expected, document
            if not expected:
                assert document["tokens_saved"] == 0, document

    asyncio.run(run())
    assert_balanced(server)


def test_many_moves_of_requests_with_a_common_prefix(server: Server) -> None:
    """Concurrent moves, aborts and ends on a shared tree leave nothing locked."""
    workers = server.decode_workers()
    bodies = {f"many-{i}": body(f"many-{i}", 0.75, new_tokens=150 + 40 * i) for i in range(8)}
    unmoved, _ = asyncio.run(
        run_all(server.url, {f"{r}-ref": b for r, b in bodies.items()}, at_once=4)
    )

    async def aborting() -> None:
        async with client_of(server) as client:
            for i in range(6):
                rid = f"doomed-{i}"
                doomed = asyncio.create_task(
                    client.post(
                        "/generate",
                        json={**body(rid, 0.75, new_tokens=2000), "rid": rid},
                        timeout=60,
                    )
                )
                here = await where(client, rid)
                target = next(w for w in workers if w != here)
                moving = asyncio.create_task(
                    client.post("/ares/migrate", json={"rid": rid, "target": target}, timeout=60)
                )
                await asyncio.sleep(0.004 * i)
                await client.post("/abort_request", json={"rid": rid}, timeout=60)
                await moving
                await doomed

    async def both() -> Any:
        moving = run_all(server.url, bodies, at_once=4, move_on=workers, moves_wanted=3)
        return (await asyncio.gather(moving, aborting()))[0]

    moved, log = asyncio.run(both())
    assert log.outcomes["completed"] >= 8, log
    assert not log.outcomes["failed"], log
    for rid in bodies:
        assert moved[rid]["output_ids"] == unmoved[f"{rid}-ref"]["output_ids"], rid
    assert_balanced(server)
