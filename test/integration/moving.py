"""Runs requests on a server while moving them between its decode workers."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class MoveLog:
    """What was moved. ``completed``: completed moves by rid; ``outcomes``: all, by outcome;
    ``reasons``: why a move did not complete."""

    completed: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


async def generate(client: httpx.AsyncClient, rid: str, body: dict[str, Any]) -> Any:
    """One request to ``/generate``."""
    response = await client.post("/generate", json={**body, "rid": rid}, timeout=300)
    assert response.status_code == 200, response.text
    return response.json()


async def migrate(client: httpx.AsyncClient, rid: str, target: int, log: MoveLog) -> bool:
    """One move; whether the request is on ``target`` now."""
    answer = await client.post("/ares/migrate", json={"rid": rid, "target": target}, timeout=60)
    document = answer.json()
    log.outcomes[document["outcome"]] += 1
    if document["outcome"] == "completed":
        log.completed[rid] += 1
    else:
        log.reasons[document["reason"]] += 1
    return document["outcome"] == "completed" or document["reason"].endswith("already")


async def move_about(
    client: httpx.AsyncClient,
    rid: str,
    workers: list[int],
    log: MoveLog,
    moves: int,
    ended: asyncio.Event,
) -> None:
    """Move one request from worker to worker until it was moved ``moves`` times or has ended."""
    choice = random.Random(rid)
    here: int | None = None
    while not ended.is_set() and log.completed[rid] < moves:
        await asyncio.sleep(choice.uniform(0.005, 0.03))
        target = choice.choice([w for w in workers if w != here])
        if await migrate(client, rid, target, log):
            here = target


async def move_others(
    client: httpx.AsyncClient,
    known: set[str],
    workers: list[int],
    log: MoveLog,
    ended: asyncio.Event,
) -> None:
    """Move the live requests that the client did not name: the samples of ``n > 1``."""
    choice = random.Random(0)
    while not ended.is_set():
        await asyncio.sleep(0.05)
        live = (await client.get("/ares/requests", timeout=60)).json()
        for request in live:
            if request["rid"] not in known:
                target = choice.choice([w for w in workers if w != request["worker"]])
                await migrate(client, request["rid"], target, log)


async def run_all(
    url: str,
    bodies: dict[str, dict[str, Any]],
    *,
    at_once: int,
    move_on: list[int] | None = None,
    moves_wanted: int = 3,
) -> tuple[dict[str, Any], MoveLog]:
    """Run the requests, ``at_once`` at a time; with ``move_on``, move each between these workers.

    Returns the answers and what was moved.
    """
    log = MoveLog()
    all_ended = asyncio.Event()
    gate = asyncio.Semaphore(at_once)
    # The server closes idle connections after 5 s; none is used twice, so none is closed in use.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:

        async def one(rid: str, body: dict[str, Any]) -> tuple[str, Any]:
            async with gate:
                ended = asyncio.Event()
                named = move_on is not None and body["sampling_params"].get("n", 1) == 1
                mover = (
                    asyncio.create_task(
                        move_about(client, rid, move_on or [], log, moves_wanted, ended)
                    )
                    if named
                    else None
                )
                try:
                    return rid, await generate(client, rid, body)
                finally:
                    ended.set()
                    if mover is not None:
                        await mover

        others = (
            asyncio.create_task(move_others(client, set(bodies), move_on, log, all_ended))
            if move_on
            else None
        )
        try:
            answers = dict(await asyncio.gather(*(one(r, b) for r, b in bodies.items())))
        finally:
            all_ended.set()
            if others is not None:
                await others
    return answers, log
