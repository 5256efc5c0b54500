"""A server that was told to end (SIGTERM) finishes what it has and takes nothing new."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

_BODY = msgspec.json.encode(
    {"error": {"message": "the server is shutting down", "type": "unavailable", "code": 503}}
)
# Upstream serves /generate and others under both.
_REFUSED = ("POST", "PUT")


class RefuseWhileLeaving:
    """ASGI middleware: 503 for every POST and PUT but the operator's (``/ares/…``) once
    ``is_leaving()``.

    Upstream goes on accepting requests after SIGTERM, so that a busy server never ends.
    """

    def __init__(self, app: Any, is_leaving: Callable[[], bool]) -> None:
        self._app = app
        self._is_leaving = is_leaving

    async def __call__(
        self, scope: dict[str, Any], receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Answer, or pass on."""
        refused = (
            scope["type"] == "http"
            and scope["method"] in _REFUSED
            and not scope["path"].startswith("/ares/")
            and self._is_leaving()
        )
        if not refused:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": _BODY})
