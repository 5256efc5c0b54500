"""A cluster on tcp with CURVE keys that compares checksums: it serves and moves as any other,
and hears members only."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from integration.moving import run_all
from integration.servers import Server, start_server, stop_server
from sglang_ares.srt.managers.io_struct import Decoder, QueryReply, StatusQuery, encode
from sglang_ares.srt.security.control_plane import free_ports
from sglang_ares.srt.security.curve import CurveKeys

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

REQUESTS = 6


@pytest.fixture(scope="module")
def keys_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CurveKeys.generate(tmp_path_factory.mktemp("guarded") / "keys")


@pytest.fixture(scope="module")
def port() -> int:
    """The first of six free ports in a row."""
    while True:
        first = free_ports(1)[0]
        with contextlib.ExitStack() as stack:
            try:
                for other in range(first, first + 6):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", other))
            except OSError:
                continue
            return first


@pytest.fixture(scope="module")
def guarded(
    keys_folder: Path, port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    process, server = start_server(
        tmp_path_factory.mktemp("log") / "server.log",
        f"--ares-curve-keys={keys_folder}",
        f"--ares-control-port={port}",
        "--ares-kv-checksum",
        # Upstream's default; the other clusters of these tests have pages of 16.
        "--page-size=1",
        "--ares-rescheduling=none",
        "--ares-report-interval=0.1",
        "--log-level=info",
    )
    try:
        yield server
    finally:
        stop_server(process)


def test_moves_complete_and_outputs_are_equal(guarded: Server) -> None:
    sampling = {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True}
    bodies = {
        f"g-{i}": {"text": f"walk {i + 3}\n", "sampling_params": sampling} for i in range(REQUESTS)
    }
    unmoved, _ = asyncio.run(
        run_all(guarded.url, {f"{r}-ref": b for r, b in bodies.items()}, at_once=REQUESTS)
    )
    moved, log = asyncio.run(
        run_all(guarded.url, bodies, at_once=REQUESTS, move_on=guarded.decode_workers())
    )
    for rid, answer in moved.items():
        assert answer["output_ids"] == unmoved[f"{rid}-ref"]["output_ids"], rid
    assert log.outcomes["completed"] >= REQUESTS and not log.outcomes["failed"], log
    status = guarded.wait_until_idle()
    assert not any(status["dropped_frames"].values()), status["dropped_frames"]
    assert not any(w["dropped_frames"] for w in status["workers"])


def ask(port: int, keys: CurveKeys | None) -> QueryReply | None:
    """The controller's answer to a query over tcp, if it gives one."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
    dealer = context.socket(zmq.DEALER)
    if keys is not None:
        keys.apply_client(dealer)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    try:
        dealer.send(encode(StatusQuery(query_id=1)), flags=zmq.NOBLOCK)
        if not dealer.poll(20_000 if keys is not None else 2_000):
            return None
        reply: QueryReply = Decoder(QueryReply).decode(dealer.recv())
        return reply
    finally:
        context.destroy(linger=0)


def test_members_are_heard_and_others_are_not(
    guarded: Server, keys_folder: Path, port: int
) -> None:
    reply = ask(port, CurveKeys.load(keys_folder))
    assert reply is not None and reply.status == 200
    assert ask(port, None) is None
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
    # The controller's mailbox, the three workers', and the outputs of other hosts.
    strangers = [context.socket(zmq.PUSH) for _ in range(5)]
    for other, stranger in enumerate(strangers, start=port + 1):
        # One that is refused connects again for ever; the context would wait for it to deliver.
        stranger.linger = 0
        stranger.connect(f"tcp://127.0.0.1:{other}")
        for _ in range(5):
            stranger.send(b"not from a member")
    deadline = time.monotonic() + 30
    silent = True
    while silent and time.monotonic() < deadline:
        time.sleep(0.2)
        status = guarded.status()
        counts = [*status["dropped_frames"].values()]
        counts += [w["dropped_frames"] for w in status["workers"]]
        silent = not all(counts)
    context.destroy(linger=0)
    assert not silent, counts
    assert "malformed" not in guarded.log.read_text(), "a frame of a stranger was read"
