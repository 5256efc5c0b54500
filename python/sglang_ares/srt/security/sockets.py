"""Listening sockets of the control plane: bounded, authenticated when there are keys, counting
what they refuse."""

from __future__ import annotations

import itertools
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_ares.srt.security.curve import CurveKeys
from sglang_ares.srt.security.dropped import DroppedFrames

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
# Messages a peer may have queued here before it has to wait (it queues on its own side then).
_RECEIVE_HWM: Final = 10_000
_monitors = itertools.count()
_REFUSED_HANDSHAKES: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class BoundSocket:
    """A socket that listens on ``endpoint``.

    ZMQ itself ends the connection of a peer that sends a frame of more than
    ``MAX_MESSAGE_BYTES``, or that fails the handshake; failed handshakes are counted.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        endpoint: str,
        *,
        keys: CurveKeys | None,
        dropped: DroppedFrames,
    ) -> None:
        self._dropped = dropped
        self.socket = context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, _RECEIVE_HWM)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.IPV6, "[" in endpoint)
        if keys is not None:
            keys.apply_server(self.socket)
        self._monitor = _monitor(context, self.socket, _REFUSED_HANDSHAKES)
        self.socket.bind(endpoint)

    def receive(self, parts: int, limit: int) -> list[list[bytes]]:
        """What has arrived: at most ``limit`` messages, or a little over ``MAX_MESSAGE_BYTES``.
        Messages that have not exactly ``parts`` parts are dropped."""
        self._count_refused_handshakes()
        messages: list[list[bytes]] = []
        left = MAX_MESSAGE_BYTES
        for _ in range(limit):
            try:
                message = self.socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(message) == parts:
                messages.append(message)
            else:
                self._dropped.count(f"it has {len(message)} parts instead of {parts}")
            left -= sum(map(len, message))
            if left <= 0:
                break
        return messages

    def _count_refused_handshakes(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(flags=zmq.NOBLOCK))
            except zmq.Again:
                return
            if event["event"] & _REFUSED_HANDSHAKES:
                self._dropped.count(f"a connection was refused ({zmq.Event(event['event']).name})")

    def close(self) -> None:
        """Stop listening."""
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)


def connected_socket(
    context: zmq.Context[Any], kind: int, endpoint: str, *, keys: CurveKeys | None
) -> Any:
    """A socket that talks to ``endpoint``; what it sends is kept until the peer takes it."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.IPV6, "[" in endpoint)
    if keys is not None:
        keys.apply_client(socket)
    socket.connect(endpoint)
    return socket


class LossWatch:
    """Whether the connection of a socket was lost after it had stood: then messages may be lost,
    too, and ZMQ, which connects again, says nothing. One thread may ask."""

    def __init__(self, context: zmq.Context[Any], socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._monitor = _monitor(context, socket, zmq.EVENT_DISCONNECTED)

    @property
    def lost(self) -> bool:
        """Whether it was lost since the last question."""
        lost = False
        while True:
            try:
                self._monitor.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return lost
            lost = True

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)


def _monitor(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int
) -> zmq.Socket[bytes]:
    """The socket's events. Unbounded, or ZMQ's own thread would wait for whoever reads them."""
    name = f"inproc://events-{next(_monitors)}"
    socket.monitor(name, events)
    monitor = context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(name)
    return monitor
