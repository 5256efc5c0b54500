"""``/ares/…``: status, live requests and migrations, on upstream's HTTP server."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_ares.srt.entrypoints.front_client import ControllerTimeoutError, FrontClient
from sglang_ares.srt.security.bounds import Rid, WorkerId


class MigrateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /ares/migrate``."""

    rid: Rid
    target: WorkerId


def add_ares_routes(app: FastAPI, client: FrontClient) -> None:
    """Add the endpoints to ``app``; all ask the controller through ``client``.

    They are routes of the app itself: upstream's authorisation does not see the level of an
    endpoint that came with a router.
    """

    @app.get("/ares/status")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def status() -> Response:
        """Workers, migrations, policies and uptime."""
        return await _answer(client.status())

    @app.get("/ares/requests")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def requests() -> Response:
        """The live requests: rid, worker, tokens, age_s."""
        return await _answer(client.requests())

    @app.post("/ares/migrate")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def migrate(request: Request) -> Response:
        """Move a request to a decode worker; answers with the outcome."""
        try:
            body = msgspec.json.decode(await request.body(), type=MigrateBody)
        except msgspec.MsgspecError as error:
            return _error(400, f'the body must be {{"rid": string, "target": integer}}: {error}')
        return await _answer(client.migrate(body.rid, body.target))


async def _answer(query: Any) -> Response:
    try:
        status, document = await query
    except ControllerTimeoutError as error:
        return _error(504, str(error))
    return _json(status, document)


def _error(status: int, reason: str) -> Response:
    return _json(status, {"outcome": "refused", "reason": reason})


def _json(status: int, document: Any) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")
