"""One inbound socket and one outbound socket per peer; frames in, frames out, never blocking."""

from __future__ import annotations

import zmq


class Mailbox:
    """Receives on ``endpoint`` (ZMQ PULL, bound) and sends to named peers (ZMQ PUSH).

    Messages to one peer arrive in the order they were sent.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._context = context
        self.endpoint = endpoint
        self.socket = context.socket(zmq.PULL)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.bind(endpoint)
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._endpoints: dict[str, str] = {}

    def connect(self, peer: str, endpoint: str) -> None:
        """Make ``peer`` reachable; another endpoint replaces the old connection."""
        if self._endpoints.get(peer) == endpoint:
            return
        self.disconnect(peer)
        socket = self._context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(endpoint)
        self._peers[peer] = socket
        self._endpoints[peer] = endpoint

    def disconnect(self, peer: str) -> None:
        """Forget ``peer``; what it was not sent yet is dropped."""
        self._endpoints.pop(peer, None)
        socket = self._peers.pop(peer, None)
        if socket is not None:
            socket.close(linger=0)

    def knows(self, peer: str) -> bool:
        """Whether ``peer`` is connected."""
        return peer in self._peers

    def send(self, peer: str, frame: bytes) -> None:
        """Queue ``frame`` for ``peer``; :class:`KeyError` if it was never connected."""
        self._peers[peer].send(frame, flags=zmq.NOBLOCK)

    def drain(self, limit: int = 1024) -> list[bytes]:
        """The frames that have arrived, at most ``limit``."""
        frames: list[bytes] = []
        while len(frames) < limit:
            try:
                frames.append(self.socket.recv(flags=zmq.NOBLOCK))
            except zmq.Again:
                break
        return frames

    def close(self) -> None:
        """Close all sockets."""
        for peer in list(self._peers):
            self.disconnect(peer)
        self.socket.close(linger=0)
