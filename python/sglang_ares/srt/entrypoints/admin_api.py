"""``/ares/…``: status, live requests, migrations and policies, on upstream's HTTP server."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_ares.srt.disaggregation.faults import is_point
from sglang_ares.srt.entrypoints.front_client import ControllerTimeoutError, FrontClient
from sglang_ares.srt.security.bounds import PolicyName, Rid, WorkerId

_Body = TypeVar("_Body")


class MigrateBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /ares/migrate``."""

    rid: Rid
    target: WorkerId


class PolicyBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /ares/policy``; what is left out stays as it is."""

    placement: PolicyName = ""
    admission: PolicyName = ""
    rescheduling: PolicyName = ""


class DrainBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /ares/drain`` and ``/ares/undrain``."""

    worker: WorkerId


class RoleBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /ares/role``."""

    worker: WorkerId
    role: Literal["prefill", "decode"]


class FaultBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /ares/fault``; see ``disaggregation/faults.py``."""

    worker: WorkerId
    point: str = ""
    action: Literal["hold", "fail", "release"] = "hold"
    seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 5.0


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
        body = await _read(request, MigrateBody, '{"rid": string, "target": integer}')
        if isinstance(body, Response):
            return body
        return await _answer(client.migrate(body.rid, body.target))

    @app.post("/ares/policy")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def policy(request: Request) -> Response:
        """Change the policies while the cluster serves; answers with those in use."""
        wanted = '{"placement": name, "admission": name, "rescheduling": name}'
        body = await _read(request, PolicyBody, wanted)
        if isinstance(body, Response):
            return body
        return await _answer(client.use_policies(body.placement, body.rescheduling, body.admission))

    @app.post("/ares/drain")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def drain(request: Request) -> Response:
        """Empty a worker; the status shows it draining, then drained."""
        return await _drain(request, True)

    @app.post("/ares/undrain")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def undrain(request: Request) -> Response:
        """Use a drained worker again."""
        return await _drain(request, False)

    async def _drain(request: Request, drain: bool) -> Response:
        body = await _read(request, DrainBody, '{"worker": integer}')
        if isinstance(body, Response):
            return body
        return await _answer(client.drain(body.worker, drain))

    @app.post("/ares/role")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def role(request: Request) -> Response:
        """Make a worker a prefill or a decode worker; answers once it is, or will not be."""
        wanted = '{"worker": integer, "role": "prefill" or "decode"}'
        body = await _read(request, RoleBody, wanted)
        if isinstance(body, Response):
            return body
        return await _answer(client.change_role(body.worker, body.role))

    @app.get("/ares/fault")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def faults() -> Response:
        """The injected faults that have struck since the last was armed."""
        return await _answer(client.inject_fault(None))

    @app.post("/ares/fault")
    @auth_level(AuthLevel.ADMIN_OPTIONAL)
    async def fault(request: Request) -> Response:
        """Arm a fault on a worker (needs ``--ares-fault-injection``)."""
        wanted = '{"worker": integer, "point": string, "action": string, "seconds": number}'
        body = await _read(request, FaultBody, wanted)
        if isinstance(body, Response):
            return body
        if body.action != "release" and not is_point(body.point):
            return _error(400, f"{body.point!r} is no point of a migration (source:COPYING, …)")
        return await _answer(
            client.inject_fault(body.worker, body.point, body.action, body.seconds)
        )


async def _read(request: Request, kind: type[_Body], wanted: str) -> _Body | Response:
    """The body, or what to answer if it is not as ``wanted``."""
    try:
        return msgspec.json.decode(await request.body(), type=kind)
    # What is not UTF-8 is no error of msgspec's own.
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return _error(400, f"the body must be {wanted}: {error}")


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
