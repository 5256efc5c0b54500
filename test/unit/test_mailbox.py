"""The mailbox on real sockets: order, reconnection, unknown peers, bounded draining."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sglang_ares.srt.managers.mailbox import Mailbox


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context(1)
    yield context
    context.destroy(linger=0)


@pytest.fixture
def boxes(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[list[Mailbox]]:
    boxes = [Mailbox(context, f"ipc://{tmp_path}/{i}") for i in range(3)]
    yield boxes
    for box in boxes:
        box.close()


def receive(box: Mailbox, count: int, timeout_s: float = 10.0) -> list[bytes]:
    frames: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(frames) < count and time.monotonic() < deadline:
        box.socket.poll(50)
        frames += box.drain()
    return frames


def test_frames_of_a_peer_arrive_in_order(boxes: list[Mailbox]) -> None:
    first, second, receiver = boxes
    for sender in (first, second):
        sender.connect("receiver", receiver.endpoint)
    for i in range(500):
        first.send("receiver", b"a%d" % i)
        second.send("receiver", b"b%d" % i)
    frames = receive(receiver, 1000)
    for name in (b"a", b"b"):
        assert [f for f in frames if f[:1] == name] == [name + b"%d" % i for i in range(500)]


def test_sending_never_blocks(boxes: list[Mailbox], tmp_path: Path) -> None:
    """Nobody listens yet: frames are kept, and delivered when somebody does."""
    sender = boxes[0]
    sender.connect("later", f"ipc://{tmp_path}/later")
    for i in range(5000):
        sender.send("later", b"%d" % i)
    context = zmq.Context(1)
    late = Mailbox(context, f"ipc://{tmp_path}/later")
    frames = receive(late, 5000)
    late.close()
    context.destroy(linger=0)
    assert frames == [b"%d" % i for i in range(5000)]


def test_a_frame_to_oneself(boxes: list[Mailbox]) -> None:
    boxes[0].connect("me", boxes[0].endpoint)
    boxes[0].send("me", b"hello")
    assert receive(boxes[0], 1) == [b"hello"]


def test_an_empty_and_a_large_frame(boxes: list[Mailbox]) -> None:
    boxes[0].connect("b", boxes[1].endpoint)
    large = bytes(range(256)) * 40_000
    boxes[0].send("b", b"")
    boxes[0].send("b", large)
    assert receive(boxes[1], 2) == [b"", large]


def test_connecting_again_replaces_the_peer(boxes: list[Mailbox]) -> None:
    sender, old, new = boxes
    sender.connect("peer", old.endpoint)
    sender.send("peer", b"to the old one")
    assert receive(old, 1) == [b"to the old one"]
    sender.connect("peer", new.endpoint)
    sender.send("peer", b"to the new one")
    assert receive(new, 1) == [b"to the new one"]
    assert receive(old, 1, timeout_s=0.1) == []


def test_connecting_to_the_same_endpoint_changes_nothing(
    boxes: list[Mailbox], tmp_path: Path
) -> None:
    """All workers are introduced again when one comes back: what waits for a peer that is slow to
    listen must not be lost by that."""
    sender = boxes[0]
    endpoint = f"ipc://{tmp_path}/slow"
    sender.connect("slow", endpoint)
    socket = sender._peers["slow"]
    for i in range(100):
        sender.send("slow", b"%d" % i)
        sender.connect("slow", endpoint)
    assert sender._peers["slow"] is socket
    context = zmq.Context(1)
    slow = Mailbox(context, endpoint)
    frames = receive(slow, 100)
    slow.close()
    context.destroy(linger=0)
    assert frames == [b"%d" % i for i in range(100)]


def test_a_forgotten_peer_may_be_connected_again(boxes: list[Mailbox]) -> None:
    sender, peer = boxes[:2]
    sender.connect("peer", peer.endpoint)
    sender.disconnect("peer")
    sender.connect("peer", peer.endpoint)
    sender.send("peer", b"x")
    assert receive(peer, 1) == [b"x"]


def test_an_unknown_peer_is_an_error(boxes: list[Mailbox]) -> None:
    assert not boxes[0].knows("nobody")
    with pytest.raises(KeyError, match="nobody"):
        boxes[0].send("nobody", b"x")


def test_a_forgotten_peer_is_unknown(boxes: list[Mailbox]) -> None:
    boxes[0].connect("peer", boxes[1].endpoint)
    assert boxes[0].knows("peer")
    boxes[0].disconnect("peer")
    boxes[0].disconnect("peer")
    assert not boxes[0].knows("peer")
    with pytest.raises(KeyError):
        boxes[0].send("peer", b"x")


def test_draining_is_bounded(boxes: list[Mailbox]) -> None:
    boxes[0].connect("b", boxes[1].endpoint)
    for i in range(10):
        boxes[0].send("b", b"%d" % i)
    boxes[0].send("b", b"last")
    deadline = time.monotonic() + 10
    drained: list[list[bytes]] = []
    while sum(map(len, drained)) < 11 and time.monotonic() < deadline:
        boxes[1].socket.poll(50)
        drained.append(boxes[1].drain(limit=4))
    assert max(map(len, drained)) <= 4
    assert [f for part in drained for f in part] == [b"%d" % i for i in range(10)] + [b"last"]


def test_draining_an_empty_mailbox_returns_at_once(boxes: list[Mailbox]) -> None:
    started = time.monotonic()
    assert boxes[0].drain() == []
    assert time.monotonic() - started < 1


def test_closing_frees_the_endpoint(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/again"
    Mailbox(context, endpoint).close()
    box = Mailbox(context, endpoint)
    box.connect("me", endpoint)
    box.send("me", b"x")
    assert receive(box, 1) == [b"x"]
    box.close()
