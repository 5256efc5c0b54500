"""The controller's line to a worker's request socket; never blocking.

A ZMQ PUSH socket without a peer waits for one. A worker that has just died has none, and the
controller, waiting, would never get to know of the death.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import zmq
from sglang.srt.managers.io_struct import sock_send
from sglang.srt.utils.network import get_zmq_socket

logger = logging.getLogger(__name__)


class WorkerInput:
    """Sends like the socket it wraps. What cannot be sent now is dropped: the worker is dead or
    dying, and its requests will be recovered once that is certain.

    Bind it before the worker starts, so that a worker that is ready is connected.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket: Any = get_zmq_socket(context, zmq.PUSH, endpoint, True)
        self._endpoint = endpoint

    def put(self, request: Any) -> None:
        """Send one of upstream's requests."""
        sock_send(self, request)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._socket, name)
        return functools.partial(self._send, attribute) if name.startswith("send") else attribute

    def _send(self, send: Callable[..., Any], *args: Any, flags: int = 0, **kwargs: Any) -> None:
        try:
            send(*args, flags=flags | zmq.NOBLOCK, **kwargs)
        except zmq.Again:
            logger.warning("nobody listens at %s any more; a message was dropped", self._endpoint)

    def close(self) -> None:
        """Drop the connection and what was not sent."""
        self._socket.close(linger=0)
