"""One inbound socket and one outbound socket per peer; frames in, frames out, never blocking."""

from __future__ import annotations

import zmq

from sglang_ares.srt.security.curve import CurveKeys
from sglang_ares.srt.security.dropped import DroppedFrames
from sglang_ares.srt.security.sockets import BoundSocket, LossWatch, connected_socket


class Mailbox:
    """Receives on ``endpoint`` (ZMQ PULL, bound) and sends to named peers (ZMQ PUSH).

    Messages to one peer arrive in the order they were sent. With ``keys`` only peers that hold
    an admitted key are heard (the context's handler is the owner's: :meth:`CurveKeys.admit`).
    What is not let in counts in ``dropped``.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        keys: CurveKeys | None = None,
        dropped: DroppedFrames | None = None,
    ) -> None:
        self._context = context
        self._keys = keys
        self.endpoint = endpoint
        self.dropped = dropped or DroppedFrames(endpoint)
        self._inbound = BoundSocket(context, zmq.PULL, endpoint, keys=keys, dropped=self.dropped)
        self.socket = self._inbound.socket
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._endpoints: dict[str, str] = {}
        self._watches: dict[str, LossWatch] = {}

    def connect(self, peer: str, endpoint: str, *, watch: bool = False) -> None:
        """Make ``peer`` reachable; another endpoint replaces the old connection. With ``watch``
        :meth:`lost` tells when the connection was lost."""
        if self._endpoints.get(peer) == endpoint:
            return
        self.disconnect(peer)
        self._peers[peer] = connected_socket(self._context, zmq.PUSH, endpoint, keys=self._keys)
        self._endpoints[peer] = endpoint
        if watch:
            self._watches[peer] = LossWatch(self._context, self._peers[peer])

    def watch_of(self, peer: str) -> LossWatch:
        """The watch of ``peer``, for another thread to ask instead of :meth:`lost`."""
        return self._watches[peer]

    def lost(self) -> list[str]:
        """Watched peers whose connection was lost since the last question."""
        return [peer for peer, watch in self._watches.items() if watch.lost]

    def disconnect(self, peer: str) -> None:
        """Forget ``peer``; what it was not sent yet is dropped."""
        self._endpoints.pop(peer, None)
        watch = self._watches.pop(peer, None)
        if watch is not None:
            watch.close()
        socket = self._peers.pop(peer, None)
        if socket is not None:
            socket.close(linger=0)

    def knows(self, peer: str) -> bool:
        """Whether ``peer`` is connected."""
        return peer in self._peers

    def send(self, peer: str, frame: bytes) -> None:
        """Queue ``frame`` for ``peer``; :class:`KeyError` if it was never connected. A peer that
        has refused the connection (other keys) misses it, as it would if it were gone."""
        try:
            self._peers[peer].send(frame, flags=zmq.NOBLOCK)
        except zmq.Again:
            self.dropped.count(f"peer {peer} refuses the connection: nothing can be sent to it")

    def drain(self, limit: int = 1024) -> list[bytes]:
        """The frames that have arrived, at most ``limit``."""
        return [frame for (frame,) in self._inbound.receive(1, limit)]

    def close(self) -> None:
        """Close all sockets."""
        for peer in list(self._peers):
            self.disconnect(peer)
        self._inbound.close()
