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
    """What was moved. ``completed``: completed moves by rid; ``outcomes``: all, by outcome."""

    completed: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)


async def generate(client: httpx.AsyncClient, rid: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request to ``/generate``; ``ids`` instead of text, too."""
    response = await client.post("/generate", json={**body, "rid": rid}, timeout=300)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def keep_moving(
    client: httpx.AsyncClient,
    workers: list[int],
    log: MoveLog,
    done: asyncio.Event,
    seed: int,
    moves_wanted: int,
) -> None:
    """Until ``done``: move the live request that was moved least to another decode worker."""
    choice = random.Random(seed)
    while not done.is_set():
        live = (await client.get("/ares/requests")).json()
        waiting = [r for r in live if log.completed[r["rid"]] < moves_wanted and r["tokens"]]
        if not waiting:
            await asyncio.sleep(0.01)
            continue
        fewest = min(log.completed[r["rid"]] for r in waiting)
        request = choice.choice([r for r in waiting if log.completed[r["rid"]] == fewest])
        target = choice.choice([w for w in workers if w != request["worker"]])
        answer = await client.post(
            "/ares/migrate", json={"rid": request["rid"], "target": target}, timeout=60
        )
        outcome = answer.json()["outcome"]
        log.outcomes[outcome] += 1
        if outcome == "completed":
            log.completed[request["rid"]] += 1


async def run_all(
    url: str,
    bodies: dict[str, dict[str, Any]],
    *,
    at_once: int,
    move_on: list[int] | None = None,
    movers: int = 4,
    moves_wanted: int = 3,
) -> tuple[dict[str, dict[str, Any]], MoveLog]:
    """Run the requests, ``at_once`` at a time; with ``move_on``, move each between these workers.

    Returns the answers and what was moved.
    """
    log = MoveLog()
    done = asyncio.Event()
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:

        async def one(rid: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
            async with gate:
                return rid, await generate(client, rid, body)

        moving = [
            asyncio.create_task(keep_moving(client, move_on, log, done, seed, moves_wanted))
            for seed in range(movers if move_on else 0)
        ]
        answers = dict(await asyncio.gather(*(one(r, b) for r, b in bodies.items())))
        done.set()
        await asyncio.gather(*moving)
    return answers, log
