"""Workers change between prefill and decode while they are busy, and when they are killed."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from integration.fault_world import PROMPTS, FaultWorld, Stream, kill
from integration.servers import Server, start_server, stop_server

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultWorld]:
    """Two prefill and two decode workers, and what their outputs should be."""
    log = tmp_path_factory.mktemp("roles") / "server.log"
    process, server = start_server(
        log,
        "--ares-prefill-workers=2",
        "--ares-decode-workers=2",
        "--ares-rescheduling=none",
        "--ares-report-interval=0.1",
        "--ares-worker-timeout=20",
        "--log-level=info",
    )
    try:
        world = FaultWorld(server)
        asyncio.run(world.learn_references())
        yield world
        assert "integrity check failed" not in log.read_text()
    finally:
        stop_server(process)


async def workers_of(server: Server, client: httpx.AsyncClient) -> dict[str, list[dict[str, Any]]]:
    """The workers by role."""
    workers = (await client.get("/ares/status", timeout=30)).json()["workers"]
    return {role: [w for w in workers if w["role"] == role] for role in ("prefill", "decode")}


async def change(client: httpx.AsyncClient, worker: int, role: str) -> httpx.Response:
    """One order, answered when the change is over."""
    return await client.post("/ares/role", json={"worker": worker, "role": role}, timeout=120)


async def changing(client: httpx.AsyncClient, state: str) -> None:
    """Wait until a change is in ``state``."""
    for _ in range(600):
        roles = (await client.get("/ares/status", timeout=30)).json()["roles"]
        if [c["state"] for c in roles["changing"]] == [state]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"no change is {state}: {roles}")


async def back_to_two_and_two(world: FaultWorld, client: httpx.AsyncClient) -> None:
    """The split that every test begins with."""
    by_role = await workers_of(world.server, client)
    for role, other in (("prefill", "decode"), ("decode", "prefill")):
        for worker in by_role[role][2:]:
            answer = await change(client, worker["id"], other)
            assert answer.status_code == 200, answer.text
    await world.wait_for(client, prefill=2, decode=2)


def test_busy_workers_change_both_ways(world: FaultWorld) -> None:
    """Streams go on, exactly, while every worker has the other role for a while."""

    async def scenario() -> None:
        async with world.client() as client:
            streams = [Stream(f"flip-{i}", p) for i, p in enumerate(3 * PROMPTS)]
            tasks = [asyncio.create_task(s.run(client)) for s in streams]
            await asyncio.gather(*(s.has(20) for s in streams))
            by_role = await workers_of(world.server, client)
            (p0, p1), (d2, d3) = ([w["id"] for w in ws] for ws in by_role.values())
            for worker, role in ((d2, "prefill"), (p0, "decode"), (d3, "prefill"), (p1, "decode")):
                answer = await change(client, worker, role)
                assert answer.status_code == 200, answer.text
                assert answer.json()["outcome"] == "changed"
                late = Stream(f"flip-late-{worker}", PROMPTS[0], max_new_tokens=60)
                tasks.append(asyncio.create_task(late.run(client)))
            done = [t.done() for t in tasks[: len(streams)]]
            assert not all(done), "emptied by moving, not by waiting for the requests to end"
            for stream in await asyncio.gather(*tasks):
                world.assert_exact(stream)
            roles = {w["id"]: r for r, ws in (await workers_of(world.server, client)).items()
                     for w in ws}  # fmt: skip
            assert roles == {p0: "decode", p1: "decode", d2: "prefill", d3: "prefill"}
            await world.assert_balanced(client)

    asyncio.run(scenario())


def test_orders_that_are_refused(world: FaultWorld) -> None:
    """The last worker of a role, an unknown one, a repeated order, nonsense."""

    async def scenario() -> None:
        async with world.client() as client:
            await back_to_two_and_two(world, client)
            by_role = await workers_of(world.server, client)
            (p0, _), (d2, d3) = ([w["id"] for w in ws] for ws in by_role.values())
            for worker, role, status, why in (
                (77, "decode", 404, "no worker"),
                (p0, "prefill", 409, "already"),
            ):
                answer = await change(client, worker, role)
                assert answer.status_code == status and why in answer.json()["reason"]
            assert (await change(client, p0, "colocated")).status_code == 400
            stream = Stream("flip-twice", PROMPTS[1])
            task = asyncio.create_task(stream.run(client))
            await stream.has(5)
            answers = await asyncio.gather(
                change(client, d2, "prefill"), change(client, d2, "prefill")
            )
            assert sorted(a.status_code for a in answers) == [200, 409]
            last = await change(client, d3, "prefill")
            assert last.status_code == 409 and "last decode worker" in last.json()["reason"]
            world.assert_exact(await task)

    asyncio.run(scenario())


def test_a_worker_is_killed_while_it_is_emptied(world: FaultWorld) -> None:
    """The order is answered with the reason; its requests go on elsewhere."""

    async def scenario() -> None:
        async with world.client() as client:
            await back_to_two_and_two(world, client)
            streams = [Stream(f"emptied-{i}", p) for i, p in enumerate(PROMPTS)]
            tasks = [asyncio.create_task(s.run(client)) for s in streams]
            await asyncio.gather(*(s.has(10) for s in streams))
            home = await world.worker_of(client, "emptied-0")
            by_role = await workers_of(world.server, client)
            victim = next(w for w in by_role["decode"] if w["id"] == home)
            kill(victim, signal.SIGSTOP)
            order = asyncio.create_task(change(client, home, "prefill"))
            await changing(client, "emptying")
            kill(victim, signal.SIGKILL)
            answer = await order
            assert answer.status_code == 409, answer.text
            assert "was lost while emptying" in answer.json()["reason"]
            for stream in await asyncio.gather(*tasks):
                world.assert_exact(stream)
            await world.wait_for(client, prefill=2, decode=2)
            assert home in [w["id"] for w in (await workers_of(world.server, client))["decode"]]

    asyncio.run(scenario())


def test_a_worker_is_killed_while_it_switches(world: FaultWorld) -> None:
    """It is started anew in the role it had."""

    async def scenario() -> None:
        async with world.client() as client:
            await back_to_two_and_two(world, client)
            victim = (await workers_of(world.server, client))["decode"][0]
            kill(victim, signal.SIGSTOP)
            order = asyncio.create_task(change(client, victim["id"], "prefill"))
            await changing(client, "switching")
            kill(victim, signal.SIGKILL)
            answer = await order
            assert answer.status_code == 409, answer.text
            assert "was lost while switching" in answer.json()["reason"]
            ready = await world.wait_for(client, prefill=2, decode=2)
            assert victim["id"] in [w["id"] for w in ready["decode"]]
            world.assert_exact(await Stream("after-switching", PROMPTS[2]).run(client))

    asyncio.run(scenario())


def test_a_worker_is_killed_right_after(world: FaultWorld) -> None:
    """It is started anew in the role it has by now, and can go back."""

    async def scenario() -> None:
        async with world.client() as client:
            await back_to_two_and_two(world, client)
            stream = Stream("right-after", PROMPTS[3])
            task = asyncio.create_task(stream.run(client))
            await stream.has(10)
            victim = (await workers_of(world.server, client))["decode"][0]
            answer = await change(client, victim["id"], "prefill")
            assert answer.status_code == 200, answer.text
            kill(victim, signal.SIGKILL)
            world.assert_exact(await task)
            ready = await world.wait_for(client, prefill=3, decode=1)
            assert victim["id"] in [w["id"] for w in ready["prefill"]]
            await back_to_two_and_two(world, client)
            world.assert_exact(await Stream("and-back", PROMPTS[0]).run(client))
            await world.assert_balanced(client)

    asyncio.run(scenario())


def _streams(server: Server, count: int) -> None:
    """Requests one after the other, as their clients see them come."""
    body = {
        "text": "walk 12\n",
        "stream": True,
        "sampling_params": {"max_new_tokens": 8, "ignore_eos": True},
    }
    for _ in range(count):
        with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=120) as answer:
            assert answer.status_code == 200
            # To its end: a client that leaves early is counted nowhere.
            assert list(answer.iter_lines())[-2] == "data: [DONE]"


def _attainment(server: Server, labels: str) -> float:
    """The gauge, by labels; it is shown once a second."""
    time.sleep(2)
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    series = (x for x in text.splitlines() if x.startswith("sglang_ares:slo_attainment{"))
    (line,) = (x for x in series if labels in x)
    return float(line.split()[-1])


def test_an_elastic_server_measures_at_start_and_the_next_one_knows(tmp_path: Path) -> None:
    """The first start of a model on this hardware sends requests of its own and keeps what they
    showed; the second reads it. Users' streams, and nothing else, count as promises."""
    flags = (
        "--ares-decode-workers=1",
        "--ares-roles=ares",
        "--ares-ttft-slo-ms=60000",
        "--ares-tpot-slo-ms=0.001",
        "--ares-worker-timeout=20",
        f"--ares-profile-cache={tmp_path / 'profiles'}",
        "--enable-metrics",
        "--log-level=info",
    )
    process, server = start_server(tmp_path / "first.log", *flags)
    try:
        status = server.status()
        assert status["profile"]["source"] == "none"
        assert status["profile"]["prefill"] and status["profile"]["decode"]
        assert status["slo"]["windows"]["60"]["requests"] == 0
        assert status["length_prior"]["seen"] <= 1, "upstream's warm-up at most"
        _streams(server, 3)
        window = server.status()["slo"]["windows"]["600"]
        assert window == {"requests": 3, "ttft": 1.0, "tpot": 0.0, "both": 0.0}
        assert _attainment(server, 'slo="ttft",window="600"') == 1.0
        (file,) = (tmp_path / "profiles").iterdir()
        assert json.loads(file.read_text())["laws"]["prefill"]
    finally:
        stop_server(process)
    process, server = start_server(tmp_path / "second.log", *flags)
    try:
        profile = server.status()["profile"]
        assert profile["source"] == "cache" and profile["file"] == str(file)
        assert profile["prefill"]
    finally:
        stop_server(process)
