"""The front's connection to the controller: queries out, answers in, over one ZMQ socket."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from sglang_ares.srt.managers.io_struct import (
    Decoder,
    DrainQuery,
    FaultQuery,
    Message,
    MigrateQuery,
    PolicyQuery,
    QueryReply,
    RequestsQuery,
    RoleQuery,
    StatusQuery,
    encode,
)
from sglang_ares.srt.observability.slo import SloAttainment
from sglang_ares.srt.security.curve import CurveKeys
from sglang_ares.srt.security.sockets import connected_socket

logger = logging.getLogger(__name__)


class ControllerTimeoutError(TimeoutError):
    """The controller did not answer in time."""


class FrontClient:
    """Asks the controller; answers are (HTTP status, document). Use within one event loop."""

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = 60.0,
        *,
        keys: CurveKeys | None = None,
        attainment: SloAttainment | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._attainment = attainment
        self._timeout_s = timeout_s
        self._keys = keys
        self._decoder = Decoder(QueryReply)
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[QueryReply]] = {}
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None

    async def status(self) -> tuple[int, Any]:
        """The cluster's status, and what the front itself knows: the SLO attainment."""
        status, document = await self._ask(StatusQuery(query_id=next(self._ids)))
        if self._attainment is not None:
            document = {**document, "slo": self._attainment.status(time.monotonic())}
        return status, document

    async def requests(self) -> tuple[int, Any]:
        """The live requests."""
        return await self._ask(RequestsQuery(query_id=next(self._ids)))

    async def migrate(self, rid: str, target: int) -> tuple[int, Any]:
        """Move a request and wait for the outcome."""
        return await self._ask(MigrateQuery(query_id=next(self._ids), rid=rid, target=target))

    async def drain(self, worker_id: int, drain: bool) -> tuple[int, Any]:
        """Begin to empty a worker, or use it again."""
        return await self._ask(
            DrainQuery(query_id=next(self._ids), worker_id=worker_id, drain=drain)
        )

    async def use_policies(
        self, placement: str, rescheduling: str, admission: str = ""
    ) -> tuple[int, Any]:
        """Change policies; an empty name changes nothing."""
        query = PolicyQuery(
            query_id=next(self._ids),
            placement=placement,
            rescheduling=rescheduling,
            admission=admission,
        )
        return await self._ask(query)

    async def change_role(self, worker_id: int, role: str) -> tuple[int, Any]:
        """Change a worker's role and wait until it serves in it, or will not."""
        query = RoleQuery(query_id=next(self._ids), worker_id=worker_id, role=role)
        return await self._ask(query, patient=True)

    async def inject_fault(
        self, worker_id: int | None, point: str = "", action: str = "", seconds: float = 0.0
    ) -> tuple[int, Any]:
        """Inject a fault on a worker, or (no worker) ask which have struck."""
        return await self._ask(
            FaultQuery(
                query_id=next(self._ids),
                worker_id=worker_id,
                point=point,
                action=action,
                seconds=seconds,
            )
        )

    async def _ask(self, query: Message, *, patient: bool = False) -> tuple[int, Any]:
        if self._socket is None:
            self._socket = connected_socket(
                zmq.asyncio.Context.instance(), zmq.DEALER, self._endpoint, keys=self._keys
            )
            self._reader = asyncio.create_task(self._read())
        query_id: int = query.query_id  # type: ignore[attr-defined]
        future: asyncio.Future[QueryReply] = asyncio.get_running_loop().create_future()
        self._pending[query_id] = future
        try:
            await self._socket.send(encode(query))
            reply = await asyncio.wait_for(future, None if patient else self._timeout_s)
        except TimeoutError:
            raise ControllerTimeoutError(
                f"the controller did not answer within {self._timeout_s:.0f} s"
            ) from None
        finally:
            self._pending.pop(query_id, None)
        return reply.status, msgspec.json.decode(reply.body)

    async def _read(self) -> None:
        assert self._socket is not None
        while True:
            frame = await self._socket.recv()
            try:
                reply = self._decoder.decode(frame)
            except msgspec.MsgspecError:
                logger.warning("dropped a malformed answer of the controller")
                continue
            future = self._pending.get(reply.query_id)
            if future is not None and not future.done():
                future.set_result(reply)

    def close(self) -> None:
        """Drop the connection."""
        if self._reader is not None:
            self._reader.cancel()
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
