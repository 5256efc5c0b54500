"""Workers on other hosts: they serve, take over and hand over like those of the server's host,
and no fault of theirs, or of the way to them, loses or repeats a token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from integration.fault_world import TOKENS, FaultWorld, Stream
from integration.moving import run_all
from integration.remote_world import JoinedHost, RemoteWorld, remote_world
from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.security.control_plane import free_ports
from sglang_ares.srt.security.curve import CurveKeys

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SAMPLING = {"max_new_tokens": 300, "temperature": 0, "ignore_eos": True}
# A worker timeout of 5 s, the lease with its two beats, and a prefill on busy cores.
LEASE_OVER_S = 20
BODIES = {f"r-{i}": {"text": f"walk {i + 3}\n", "sampling_params": SAMPLING} for i in range(6)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteWorld]:
    logs = tmp_path_factory.mktemp("remote")
    keys = CurveKeys.generate(logs / "keys")
    while True:
        port = free_ports(1)[0]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for other in range(port, port + 6):
                stack.enter_context(socket.socket()).bind(("", other))
            break
    with remote_world(logs, keys, port) as world:
        yield world
        for log in logs.glob("*.log"):
            assert "integrity check failed" not in log.read_text(), log


@pytest.fixture(scope="module")
def references(world: RemoteWorld) -> dict[str, list[int]]:
    """Outputs of the server's own workers, before anybody joins."""
    answers, _ = asyncio.run(
        run_all(world.server.url, {f"{r}-ref": b for r, b in BODIES.items()}, at_once=6)
    )
    return {rid: answers[f"{rid}-ref"]["output_ids"] for rid in BODIES}


@pytest.fixture(scope="module")
def decode_host(world: RemoteWorld, references: dict[str, list[int]]) -> JoinedHost:
    host = world.join(1, "decode")
    world.worker_of(host)
    return host


def run(world: RemoteWorld, name: str, move_on: list[int] | None = None) -> dict[str, list[int]]:
    """The requests, and that nothing failed."""
    bodies = {f"{rid}-{name}": body for rid, body in BODIES.items()}
    answers, log = asyncio.run(run_all(world.server.url, bodies, at_once=6, move_on=move_on))
    assert not log.outcomes["failed"], log
    if move_on is not None:
        assert log.outcomes["completed"] >= len(BODIES), log
    return {rid: answers[f"{rid}-{name}"]["output_ids"] for rid in BODIES}


async def streams_on(
    world: RemoteWorld, worker: int, name: str, tokens: int = TOKENS
) -> tuple[FaultWorld, list[Stream], list[asyncio.Task[Stream]], httpx.AsyncClient]:
    """Two requests that stream from ``worker``, wherever they began."""
    faults = FaultWorld(world.server)
    client = faults.client()
    streams = [Stream(f"{name}-{i}", f"walk {9 + 5 * i}\n", tokens) for i in range(2)]
    tasks = [asyncio.create_task(s.run(client)) for s in streams]
    for stream in streams:
        await stream.has(5)
        if await faults.worker_of(client, stream.rid) != worker:
            body = {"rid": stream.rid, "target": worker}
            answer = await client.post("/ares/migrate", json=body, timeout=60)
            assert answer.json()["outcome"] == "completed", answer.text
    return faults, streams, tasks, client


def survive(
    world: RemoteWorld, worker: int, name: str, pids: list[int], signo: int, tokens: int = TOKENS
) -> float:
    """Send the signal while two requests stream from the worker; their longest pause (s)."""

    def strike() -> None:
        for pid in pids:
            os.kill(pid, signo)

    return outlive(world, worker, name, strike, tokens)


def outlive(
    world: RemoteWorld, worker: int, name: str, strike: Callable[[], None], tokens: int = TOKENS
) -> float:
    """Let ``strike`` happen while two requests stream from the worker; their longest pause (s)."""

    async def scenario() -> float:
        faults, streams, tasks, client = await streams_on(world, worker, name, tokens)
        strike()
        await asyncio.gather(*tasks)
        again = [Stream(f"{s.rid}-again", s.prompt, tokens) for s in streams]
        for reference in await asyncio.gather(*(s.run(client) for s in again)):
            faults.references[reference.prompt] = reference
        for stream in streams:
            faults.assert_exact(stream)
        await client.aclose()
        return max(s.pause_s for s in streams)

    return asyncio.run(scenario())


# --- serving and moving ---------------------------------------------------------------------


def test_a_decode_worker_of_another_host_takes_requests_and_hands_them_over(
    world: RemoteWorld, references: dict[str, list[int]], decode_host: JoinedHost
) -> None:
    """Requests start here and there, and are moved to and fro."""
    worker = world.worker_of(decode_host)
    assert worker["role"] == "decode" and worker["kv_capacity"] > 0
    assert run(world, "moved", move_on=world.server.decode_workers()) == references
    status = world.server.wait_until_idle()
    assert not any(status["dropped_frames"].values()), status["dropped_frames"]
    assert not any(w["dropped_frames"] for w in status["workers"]), status["workers"]


def test_a_prefill_worker_of_another_host_serves_too(
    world: RemoteWorld, references: dict[str, list[int]], decode_host: JoinedHost
) -> None:
    host = world.join(2, "prefill")
    worker = world.worker_of(host)
    # The server's own is drained: all prompts are computed on the other host.
    local = world.workers(role="prefill", host=None)[0]["id"]
    answer = httpx.post(f"{world.server.url}/ares/drain", json={"worker": local}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert run(world, "prefilled") == references
    httpx.post(f"{world.server.url}/ares/undrain", json={"worker": local}, timeout=30)
    # It leaves as it was asked to, and leaves nothing behind.
    tree = host.tree()
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(60) == 0, host.log.read_text()[-3000:]
    assert {_state(pid) for pid in tree} <= {"Z", ""}, "it left something behind"
    assert world.worker_of(host, "left")["id"] == worker["id"]
    assert run(world, "after") == references


def test_control_requests_reach_it_and_those_that_cannot_are_refused(
    world: RemoteWorld, decode_host: JoinedHost
) -> None:
    world.server.wait_until_idle()
    with httpx.Client(base_url=world.server.url, timeout=60) as client:
        assert client.post("/flush_cache").status_code == 200
        states = client.get("/server_info").json()["internal_states"]
        assert len(states) == len(world.workers(state="ready"))
        refused = client.post("/start_profile", json={})
        assert refused.status_code == 501 and "other hosts" in refused.text, refused.text
        # What cannot travel runs on the server's own workers.
        body = {"text": "walk 5\n", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
        for _ in range(3):
            answer = client.post("/generate", json={**body, "return_hidden_states": True})
            assert answer.status_code in (200, 400), answer.text
        scored = client.post(
            "/generate", json={**body, "return_logprob": True, "top_logprobs_num": 2}
        ).json()["meta_info"]
        assert len(scored["output_top_logprobs"]) == scored["completion_tokens"]


# --- faults ---------------------------------------------------------------------------------


def test_a_killed_worker_comes_back(world: RemoteWorld, decode_host: JoinedHost) -> None:
    worker = world.worker_of(decode_host)
    survive(world, worker["id"], "killed", worker["pids"], signal.SIGKILL)
    again = world.worker_of(decode_host, restarts=worker["restarts"] + 1)
    assert again["id"] == worker["id"] and again["pids"] != worker["pids"]


def test_a_stopped_worker_is_ended_by_its_host(world: RemoteWorld, decode_host: JoinedHost) -> None:
    worker = world.worker_of(decode_host)
    survive(world, worker["id"], "stopped", worker["pids"], signal.SIGSTOP)
    world.worker_of(decode_host, restarts=worker["restarts"] + 1)
    assert {_state(pid) for pid in worker["pids"]} <= {"Z", ""}


def test_a_worker_whose_host_process_is_stopped_ends_by_itself(
    world: RemoteWorld, decode_host: JoinedHost
) -> None:
    """Nobody is there to end it: its lease does, before its requests go on elsewhere."""
    worker = world.worker_of(decode_host)
    # They still run when the lease is over.
    host = decode_host.process.pid
    survive(world, worker["id"], "alone", [host], signal.SIGSTOP, tokens=1500)
    states = [_state(pid) for pid in worker["pids"]]
    assert set(states) <= {"Z", ""}, states
    assert world.workers(id=worker["id"])[0]["state"] == "failed"
    os.kill(decode_host.process.pid, signal.SIGCONT)
    again = world.worker_of(decode_host, restarts=worker["restarts"] + 1)
    assert again["id"] == worker["id"]


def test_a_host_whose_cable_is_pulled_comes_back(
    world: RemoteWorld, decode_host: JoinedHost
) -> None:
    """Neither side hears of the other: the lease ends the worker before its requests go on."""
    if not world.net.separate:
        pytest.skip("pulling a cable takes network namespaces, which need root and `ip netns`")
    worker = world.worker_of(decode_host)
    try:
        # They still run when the lease is over.
        pause_s = outlive(
            world, worker["id"], "cut", lambda: world.net.plug(1, "down"), tokens=1500
        )
        states = [_state(pid) for pid in worker["pids"]]
        assert set(states) <= {"Z", ""}, states
    finally:
        world.net.plug(1, "up")
    assert pause_s < LEASE_OVER_S
    again = world.worker_of(decode_host, restarts=worker["restarts"] + 1)
    assert again["id"] == worker["id"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


# --- who is not let in ----------------------------------------------------------------------


def test_other_keys_and_other_models_are_refused(world: RemoteWorld, tmp_path: Path) -> None:
    before = world.server.status()
    strange = CurveKeys.generate(tmp_path / "strange")
    model = shutil.copytree(MODEL_DIR, tmp_path / "model")
    weights = next(model.glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    hosts = [
        world.join(1, "decode", "--join-timeout", "5", keys=strange),
        world.join(2, "decode", "--model-path", str(model), "--context-length", "16000"),
    ]
    started = time.monotonic()
    codes = [host.process.wait(120) for host in hosts]
    texts = [host.log.read_text() for host in hosts]
    assert codes == [1, 1], texts
    assert "nobody answers" in texts[0] and "--ares-curve-keys the same" in texts[0]
    assert "--model-path names another model" in texts[1]
    assert "--context-length is 16000" in texts[1]
    after = world.server.status()
    assert len(after["workers"]) == len(before["workers"]), time.monotonic() - started
    assert after["dropped_frames"]["front"] > before["dropped_frames"]["front"]


# --- last, because its host does not come back ----------------------------------------------


def test_another_host_takes_the_place_of_a_lost_one(
    world: RemoteWorld, references: dict[str, list[int]], decode_host: JoinedHost
) -> None:
    lost = world.worker_of(decode_host)
    outlive(world, lost["id"], "lost", decode_host.stop, tokens=1500)
    new = world.worker_of(world.join(2, "decode"))
    assert run(world, "replaced", move_on=_ready_decode_workers(world)) == references
    assert world.workers(id=new["id"])[0]["state"] == "ready"


def _ready_decode_workers(world: RemoteWorld) -> list[int]:
    return [w["id"] for w in world.workers(role="decode", state="ready")]
