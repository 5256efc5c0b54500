"""A worker is emptied by moving its requests, and used again afterwards."""

from __future__ import annotations

import asyncio
import time

import pytest

from integration.fault_world import PROMPTS, FaultWorld, Stream
from integration.servers import Server

pytestmark = pytest.mark.integration


def test_drain_and_undrain(server: Server) -> None:
    """Running requests leave the worker without their clients noticing; new ones avoid it."""
    world = FaultWorld(server)
    asyncio.run(world.learn_references())

    async def scenario() -> None:
        async with world.client() as client:
            streams = [Stream(f"drain-{i}", p) for i, p in enumerate([*PROMPTS, *PROMPTS])]
            tasks = [asyncio.create_task(s.run(client)) for s in streams]
            await asyncio.gather(*(s.has(20) for s in streams))
            answer = await client.post("/ares/drain", json={"worker": 1}, timeout=30)
            assert answer.status_code == 200, answer.text
            refused = await client.post("/ares/drain", json={"worker": 2}, timeout=30)
            assert refused.status_code == 409, refused.text
            assert "last decode worker" in refused.json()["reason"]
            deadline = time.monotonic() + 30
            while (state := await state_of(1)) != "drained":
                assert state == "draining" and time.monotonic() < deadline, state
                await asyncio.sleep(0.05)
            # Emptied by moving, not by waiting for the requests to end.
            assert not all(t.done() for t in tasks)
            late = Stream("drain-late", PROMPTS[0])
            late_task = asyncio.create_task(late.run(client))
            await late.has(5)
            assert await world.worker_of(client, "drain-late") == 2
            for stream in await asyncio.gather(*tasks, late_task):
                world.assert_exact(stream)
            assert (await client.post("/ares/undrain", json={"worker": 1})).status_code == 200
            assert await state_of(1) == "ready"
            await world.assert_balanced(client)

    async def state_of(worker: int) -> str:
        async with world.client() as client:
            workers = (await client.get("/ares/status", timeout=30)).json()["workers"]
        return str(next(w["state"] for w in workers if w["id"] == worker))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "status"), [({"worker": 77}, 404), ({"worker": "x"}, 400), ({}, 400)]
)
def test_bad_drains_are_refused(server: Server, body: dict[str, object], status: int) -> None:
    """Unknown workers and bodies that make no sense."""

    async def ask() -> int:
        async with FaultWorld(server).client() as client:
            return (await client.post("/ares/drain", json=body, timeout=30)).status_code

    assert asyncio.run(ask()) == status
