"""Requests that find no memory wait in the controller, and go where there is room."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from integration.fault_world import PROMPTS, FaultWorld, Stream, kill
from integration.servers import start_server, stop_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

SLO_S = 2.0
# Each decode worker has room for five requests.
FLAGS = (
    "--max-total-tokens=2000",
    "--num-reserved-decode-tokens=350",
    "--ares-admission=slo",
    f"--ares-ttft-slo-ms={1e3 * SLO_S:g}",
    "--ares-rescheduling=none",
    "--ares-report-interval=0.1",
)
CROWD = 24


@dataclass
class World(FaultWorld):
    """``process`` is the server's."""

    process: subprocess.Popen[bytes] | None = None

    def crowd(self, name: str, count: int = CROWD) -> list[Stream]:
        """More requests than there is room for. No rid is another's beginning: aborts match by
        prefix, as upstream's do."""
        return [Stream(f"{name}-{i:02d}", PROMPTS[i % len(PROMPTS)]) for i in range(count)]

    async def status(self, client: httpx.AsyncClient) -> dict[str, Any]:
        document: dict[str, Any] = (await client.get("/ares/status", timeout=30)).json()
        return document

    async def wait_until_some_wait(self, client: httpx.AsyncClient, least: int) -> None:
        deadline = time.monotonic() + 30
        while (await self.status(client))["waiting"] < least:
            assert time.monotonic() < deadline, await self.status(client)
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    log = tmp_path_factory.mktemp("admission") / "server.log"
    process, server = start_server(log, *FLAGS)
    world = World(server, process=process)
    try:
        asyncio.run(world.learn_references())
        yield world
        assert "integrity check failed" not in log.read_text()
    finally:
        stop_server(process)


def test_those_that_can_be_in_time_go_before_those_that_are_late(world: World) -> None:
    """A crowd waits in the controller until it is late; who comes then does not stand behind it."""

    async def scenario() -> None:
        async with world.client() as client:
            old = world.crowd("old")
            tasks = [asyncio.create_task(s.run(client)) for s in old]
            await world.wait_until_some_wait(client, CROWD // 3)
            live = (await client.get("/ares/requests", timeout=30)).json()
            waiting = [r["rid"] for r in live if r["worker"] is None]
            assert waiting
            move = {"rid": waiting[-1], "target": world.server.decode_workers()[0]}
            refused = await client.post("/ares/migrate", json=move, timeout=30)
            assert refused.status_code == 409, refused.text
            assert "waits for a worker" in refused.json()["reason"]
            await asyncio.sleep(SLO_S)
            fresh: list[Stream] = []
            while not any(s.output_ids for s in fresh):
                assert any(not s.output_ids for s in old), "nobody had to wait long enough"
                fresh.append(Stream(f"fresh-{len(fresh):02d}", PROMPTS[0]))
                tasks.append(asyncio.create_task(fresh[-1].run(client)))
                await asyncio.sleep(0.2)
            assert any(not s.output_ids for s in old), "the late ones went first"
            await asyncio.gather(*tasks)
            for stream in [*old, *fresh]:
                world.assert_exact(stream)
            assert (await world.status(client))["waiting"] == 0
            await world.assert_balanced(client)

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_waits(world: World) -> None:
    async def scenario() -> None:
        async with world.client() as client:
            crowd = world.crowd("left")
            tasks = [asyncio.create_task(s.run(client)) for s in crowd]
            await world.wait_until_some_wait(client, CROWD // 3)
            while not any(s.output_ids for s in crowd):
                await asyncio.sleep(0.02)
            gone = [i for i, s in enumerate(crowd) if not s.output_ids]
            for i in gone:
                tasks[i].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            stayed = [s for i, s in enumerate(crowd) if i not in gone]
            assert gone and stayed
            for stream in stayed:
                world.assert_exact(stream)
            await world.assert_balanced(client)
            status = await world.status(client)
            assert (status["waiting"], status["requests"]) == (0, 0)

    asyncio.run(scenario())


def test_a_policy_command_lets_them_wait_at_the_workers(world: World) -> None:
    async def scenario() -> None:
        async with world.client() as client:

            async def use(admission: str) -> httpx.Response:
                return await client.post("/ares/policy", json={"admission": admission}, timeout=30)

            assert (await use("nobodys")).status_code == 400
            answer = await use("worker")
            assert answer.status_code == 200 and answer.json()["admission"] == "worker"
            crowd = world.crowd("bound")
            tasks = [asyncio.create_task(s.run(client)) for s in crowd]
            queued = 0
            while queued < CROWD // 3:
                assert not all(t.done() for t in tasks), "nobody was seen waiting at a worker"
                status = await world.status(client)
                assert status["waiting"] == 0
                queued = sum(w["queued"] for w in status["workers"] if w["role"] == "decode")
                await asyncio.sleep(0.05)
            assert (await use("slo")).status_code == 200
            for stream in await asyncio.gather(*tasks):
                world.assert_exact(stream)

    asyncio.run(scenario())


def test_a_worker_dies_while_requests_wait(world: World) -> None:
    """Those on it are recovered, those that wait go to the other one; none is lost."""

    async def scenario() -> None:
        async with world.client() as client:
            crowd = world.crowd("death", 16)
            tasks = [asyncio.create_task(s.run(client)) for s in crowd]
            await world.wait_until_some_wait(client, 4)
            status = await world.status(client)
            victim = next(w for w in status["workers"] if w["role"] == "decode")
            kill(victim, signal.SIGKILL)
            for stream in await asyncio.gather(*tasks):
                world.assert_exact(stream)

    asyncio.run(scenario())


def test_sigterm_lets_those_that_wait_have_their_turn(world: World) -> None:
    """The last test of this server: it ends."""
    assert world.process is not None
    process = world.process

    async def scenario() -> None:
        async with world.client() as client:
            crowd = world.crowd("leaving", 16)
            tasks = [asyncio.create_task(s.run(client)) for s in crowd]
            await world.wait_until_some_wait(client, 4)
            process.send_signal(signal.SIGTERM)
            for stream in await asyncio.gather(*tasks):
                world.assert_exact(stream)

    asyncio.run(scenario())
    assert process.wait(60) == 0
