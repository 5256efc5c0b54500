"""The fault matrix: whoever dies, hangs or fails in whatever state of a migration, no request and
no token is lost or repeated, and everybody's memory comes back."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from integration.fault_world import PROMPTS, FaultWorld, Stream, kill
from integration.servers import start_server, stop_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

# State of the protocol -> where a migration is held to be in it, and for long enough.
STATES = {
    "OFFERED": ("source", "source:OFFERED"),
    "RESERVED": ("target", "target:RESERVED"),
    "COPYING": ("source", "source:COPYING"),
    "HANDOVER": ("target", "target:RECEIVING"),
    "COMMITTED": ("source", "source:HANDOVER"),
}
VICTIMS = ("source", "target", "prefill", "bystander")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
HOLD_S = 2.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultWorld]:
    """One cluster for the whole matrix; every cell breaks it and sees it whole again."""
    log = tmp_path_factory.mktemp("faults") / "server.log"
    process, server = start_server(
        log,
        "--ares-prefill-workers=2",
        "--ares-decode-workers=4",
        "--ares-rescheduling=none",
        "--ares-placement=round_robin",
        "--ares-report-interval=0.1",
        "--ares-worker-timeout=3",
        "--ares-max-restarts=1000",
        "--ares-fault-injection",
        "--max-total-tokens=16384",
        "--log-level=info",
    )
    try:
        world = FaultWorld(server)
        asyncio.run(world.learn_references())
        yield world
        text = log.read_text()
        assert "integrity check failed" not in text, text[-4000:]
        assert "hit an exception" not in text, text[text.index("hit an exception") :][:4000]
    finally:
        stop_server(process)


async def moving_request(
    world: FaultWorld, client: Any, state: str, **stream_fields: Any
) -> tuple[Stream, list[asyncio.Task[Any]], dict[str, dict[str, Any]]]:
    """A request held in the middle of its migration, among others; and who is who."""
    ready = await world.wait_for(client, prefill=2, decode=3)
    streams = [
        Stream(f"cell-{next(_numbers)}", prompt)
        for prompt in itertools.islice(itertools.cycle(PROMPTS), len(ready["decode"]))
    ]
    streams[0] = Stream(streams[0].rid, streams[0].prompt, **stream_fields)
    tasks = [asyncio.create_task(s.run(client)) for s in streams]
    await asyncio.gather(*(s.has(20) for s in streams))
    source = await world.worker_of(client, streams[0].rid)
    # A worker that had been killed may have come back in the meantime, and got a request.
    ready = await world.wait_for(client, prefill=2, decode=3)
    others = [w for w in ready["decode"] if w["id"] != source]
    cast = {
        "source": next(w for w in ready["decode"] if w["id"] == source),
        "target": others[0],
        "bystander": others[1],
        "prefill": ready["prefill"][0],
    }
    side, point = STATES[state]
    await world.arm(client, cast[side]["id"], point, seconds=HOLD_S)
    move = {"rid": streams[0].rid, "target": cast["target"]["id"]}
    tasks.append(asyncio.create_task(client.post("/ares/migrate", json=move, timeout=60)))
    await world.struck(client)
    if state in ("HANDOVER", "COMMITTED"):
        await asyncio.sleep(0.3)  # the other side goes as far as it can
    return streams[0], tasks, cast


async def finish(world: FaultWorld, client: Any, tasks: list[asyncio.Task[Any]]) -> None:
    """All requests end as they should, and the memory balances."""
    *streams, move = await asyncio.gather(*tasks)
    assert move.json()["outcome"] in ("completed", "failed", "cancelled", "refused"), move.text
    for stream in streams:
        world.assert_exact(stream)
    await world.assert_balanced(client)


@pytest.mark.parametrize("sig", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("state", STATES)
def test_death(world: FaultWorld, state: str, victim: str, sig: signal.Signals) -> None:
    """A worker is killed, or hangs, while a migration is in ``state``."""

    async def cell() -> None:
        async with world.client() as client:
            _, tasks, cast = await moving_request(world, client, state)
            kill(cast[victim], sig)
            await finish(world, client, tasks)
            await world.noticed(client, cast[victim])

    asyncio.run(cell())


@pytest.mark.parametrize("state", STATES)
def test_abort(world: FaultWorld, state: str) -> None:
    """The client leaves while its request is being moved."""

    async def cell() -> None:
        async with world.client() as client:
            request, tasks, _ = await moving_request(world, client, state)
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            got = len(request.output_ids)
            assert request.output_ids == world.references[request.prompt].output_ids[:got]
            await finish(world, client, tasks[1:])

    asyncio.run(cell())


@pytest.mark.parametrize("state", ["OFFERED", "RESERVED", "COPYING"])
def test_natural_finish(world: FaultWorld, state: str) -> None:
    """The request ends by itself while it is being moved (from HANDOVER on it stands still)."""

    async def cell() -> None:
        async with world.client() as client:
            request, tasks, _ = await moving_request(world, client, state, max_new_tokens=120)
            await finish(world, client, tasks)
            assert request.meta["finish_reason"]["type"] == "length"

    asyncio.run(cell())


@pytest.mark.parametrize("chunk", [1, 2])
def test_transfer_error(world: FaultWorld, chunk: int) -> None:
    """A piece of KV cannot be sent; the request goes on where it is."""

    async def cell() -> None:
        async with world.client() as client:
            ready = await world.wait_for(client, prefill=2, decode=2)
            # Seen by no cache before: its KV goes over in two pieces at least.
            stream = Stream(f"cell-{next(_numbers)}", f"walk {50 + chunk}\n")
            task = asyncio.create_task(stream.run(client))
            await stream.has(60)
            source = await world.worker_of(client, stream.rid)
            target = next(w["id"] for w in ready["decode"] if w["id"] != source)
            await world.arm(client, source, f"source:chunk:{chunk}", action="fail")
            move = {"rid": stream.rid, "target": target}
            for _ in range(5):  # a slow machine may let the request outgrow what was offered
                answer = await client.post("/ares/migrate", json=move, timeout=60)
                if answer.json()["outcome"] != "cancelled":
                    break
            assert answer.json()["outcome"] == "failed", answer.text
            assert await world.worker_of(client, stream.rid) == source
            await task
            world.references[stream.prompt] = await Stream("after", stream.prompt).run(client)
            world.assert_exact(stream)
            await world.assert_balanced(client)

    asyncio.run(cell())


@pytest.mark.parametrize("custom_params", [None, {"return_predicted_remaining": True}])
def test_a_request_of_any_length_moves_and_survives_a_death(
    world: FaultWorld, custom_params: dict[str, Any] | None
) -> None:
    """Nobody said ``max_new_tokens``, as is usual for chat: the workers have to agree on it."""

    async def cell() -> None:
        async with world.client() as client:
            ready = await world.wait_for(client, prefill=2, decode=3)
            prompt = "walk 120\n"
            whole = await Stream(f"cell-{next(_numbers)}", prompt, None).run(client)
            assert whole.meta["finish_reason"]["type"] == "stop" and len(whole.output_ids) > 300
            stream = Stream(f"cell-{next(_numbers)}", prompt, None, custom_params)
            task = asyncio.create_task(stream.run(client))
            await stream.has(40)
            source = await world.worker_of(client, stream.rid)
            target = next(w for w in ready["decode"] if w["id"] != source)
            move = {"rid": stream.rid, "target": target["id"]}
            answer = await client.post("/ares/migrate", json=move, timeout=60)
            assert answer.json()["outcome"] == "completed", answer.text
            kill(target, signal.SIGKILL)
            await task
            assert not stream.error and stream.output_ids == whole.output_ids
            assert stream.text == whole.text
            await world.noticed(client, target)
            await world.assert_balanced(client)

    asyncio.run(cell())
