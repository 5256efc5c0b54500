"""Answers the front's queries: status, live requests, migrations, policies, roles, draining,
injected faults."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_ares.srt.managers.attempts import public_rid
from sglang_ares.srt.managers.cluster_documents import requests_document, status_document
from sglang_ares.srt.managers.cluster_views import MANUAL, READY
from sglang_ares.srt.managers.io_struct import (
    DrainQuery,
    FaultQuery,
    FaultReached,
    InjectFault,
    MigrateQuery,
    MigrationResult,
    PolicyQuery,
    QueryReply,
    RequestsQuery,
    RoleQuery,
    StatusQuery,
    encode,
)
from sglang_ares.srt.managers.role_changes import OPERATOR
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING
from sglang_ares.srt.policy.types import DECODE

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_ares.ares_args import AresArgs
    from sglang_ares.srt.managers.admission_queue import AdmissionQueue
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.dispatcher import Dispatcher
    from sglang_ares.srt.managers.io_struct import Message
    from sglang_ares.srt.managers.law_keeper import LawKeeper
    from sglang_ares.srt.managers.length_predictions import LengthPredictions
    from sglang_ares.srt.managers.mover import Mover
    from sglang_ares.srt.managers.role_changes import RoleChanges
    from sglang_ares.srt.managers.role_planner import RolePlanner
    from sglang_ares.srt.security.dropped import DroppedFrames
    from sglang_ares.srt.security.sockets import BoundSocket

logger = logging.getLogger(__name__)


class FrontDesk:
    """``socket`` is the controller's ROUTER towards the front; ``tell`` sends to a worker."""

    def __init__(
        self,
        socket: BoundSocket,
        state: ClusterState,
        mover: Mover,
        dispatcher: Dispatcher,
        waiting: AdmissionQueue,
        predictions: LengthPredictions,
        roles: RoleChanges,
        planner: RolePlanner,
        laws: LawKeeper,
        ares_args: AresArgs,
        runtime_dir: str,
        dropped: list[DroppedFrames],
        tell: Callable[[int, Message], None],
    ) -> None:
        self._socket = socket
        self._state = state
        self._mover = mover
        self._dispatcher = dispatcher
        self._waiting_requests = waiting
        self._predictions = predictions
        self._roles = roles
        self._planner = planner
        self._laws = laws
        self._args = ares_args
        self._runtime_dir = runtime_dir
        self._dropped = dropped
        self._tell = tell
        # Queries that wait for a migration's outcome: (identity, query id).
        self._waiting: dict[int, tuple[bytes, int]] = {}
        self._faults_struck: list[FaultReached] = []

    def answer(self, identity: bytes, query: Any) -> None:
        """Answer a query, now or, if it asks for a migration, when that has ended."""
        match query:
            case StatusQuery():
                self.reply(identity, query.query_id, 200, self._status())
            case RequestsQuery():
                self.reply(identity, query.query_id, 200, requests_document(self._state))
            case MigrateQuery():
                self._migrate(identity, query)
            case DrainQuery():
                self.reply(identity, query.query_id, *self._drain(query))
            case PolicyQuery():
                self.reply(identity, query.query_id, *self._use_policies(query))
            case RoleQuery():
                self._change_role(identity, query)
            case FaultQuery():
                self.reply(identity, query.query_id, *self._inject_fault(query))

    def reply(self, identity: bytes, query_id: int, status: int, body: Any) -> None:
        """Send an answer."""
        reply = QueryReply(query_id=query_id, status=status, body=msgspec.json.encode(body))
        self._socket.socket.send_multipart([identity, encode(reply)])

    def _status(self) -> dict[str, Any]:
        return status_document(
            self._state,
            {
                "placement": self._dispatcher.placement,
                "admission": self._waiting_requests.admission,
                "rescheduling": self._mover.rescheduling,
                "waiting": len(self._waiting_requests),
                "emulated": self._args.emulate or None,
                "time_dilation": self._args.time_dilation,
                "length_prior": self._predictions.status(),
                "move_cost": msgspec.to_builtins(self._mover.cost),
                "profile": self._laws.status(),
                "runtime_dir": self._runtime_dir,
                "dropped_frames": {d.where: d.total for d in self._dropped},
                "roles": {**self._planner.status(), **self._roles.status(time.monotonic())},
            },
        )

    # --- migrations -------------------------------------------------------------------------

    def _migrate(self, identity: bytes, query: MigrateQuery) -> None:
        refusal = self._why_not(query)
        if refusal is not None:
            status, reason = refusal
            self.reply(identity, query.query_id, status, {"outcome": "refused", "reason": reason})
            return
        owner = self._state.owners[query.rid]
        migration_id = self._mover.start(owner.name, owner.decode, query.target, MANUAL)
        self._waiting[migration_id] = (identity, query.query_id)

    def _why_not(self, query: MigrateQuery) -> tuple[int, str] | None:
        owner = self._state.owners.get(query.rid)
        target = self._state.workers.get(query.target)
        if owner is None:
            return 404, f"no live request has the rid {query.rid!r}"
        if target is None:
            return 404, f"there is no worker {query.target}"
        if owner.waiting:
            return 409, "the request waits for a worker with room"
        if target.role != DECODE:
            return 409, f"worker {query.target} is a {target.role} worker"
        if target.state != READY:
            return 409, f"worker {query.target} is {target.state}: {target.reason}"
        if target.changing_to is not None:
            return 409, f"worker {query.target} is becoming a {target.changing_to} worker"
        if owner.recovering or self._state.workers[owner.decode].state != READY:
            return 409, "the request is being recovered from a dead worker"
        if owner.decode == query.target:
            return 409, f"the request is on worker {query.target} already"
        if any(m.rid == owner.name for m in self._state.moving.values()):
            return 409, "the request is being moved already"
        return None

    def on_result(self, result: MigrationResult) -> None:
        """A migration has ended: answer whoever asked for it."""
        waiting = self._waiting.pop(result.migration_id, None)
        if waiting is None:
            return
        body = {
            "outcome": result.outcome,
            "reason": result.reason,
            "rid": public_rid(result.rid),
            "source": result.source,
            "target": result.target,
            "tokens": result.tokens,
            "tokens_sent": result.tokens_sent,
            "tokens_saved": result.tokens_saved,
            "kv_bytes": result.kv_bytes,
            "duration_ms": 1e3 * result.duration_s,
        }
        self.reply(*waiting, 200 if result.outcome == "completed" else 409, body)

    # --- roles ------------------------------------------------------------------------------

    def _change_role(self, identity: bytes, query: RoleQuery) -> None:
        def answer(status: int, body: dict[str, Any]) -> None:
            self.reply(identity, query.query_id, status, body)

        refusal = self._roles.order(
            query.worker_id, query.role, time.monotonic(), cause=OPERATOR, answer=answer
        )
        if refusal is not None:
            status, reason = refusal
            answer(status, {"outcome": "refused", "reason": reason})

    # --- policies, draining, faults -----------------------------------------------------------

    def _use_policies(self, query: PolicyQuery) -> tuple[int, Any]:
        for name, known in (
            (query.placement, PLACEMENT.served_names()),
            (query.rescheduling, RESCHEDULING.served_names()),
        ):
            if name and name not in known:
                choices = ", ".join(known)
                return 400, {"reason": f"there is no policy {name!r}; choose one of: {choices}"}
        refusal = self._waiting_requests.use(query.admission) if query.admission else None
        if refusal is not None:
            return 400, {"reason": refusal}
        if query.placement:
            self._dispatcher.use(query.placement)
        if query.rescheduling:
            self._mover.use(query.rescheduling)
        used = {
            "placement": self._dispatcher.placement,
            "admission": self._waiting_requests.admission,
            "rescheduling": self._mover.rescheduling,
        }
        logger.info("policies from now on: %s", used)
        return 200, used

    def _drain(self, query: DrainQuery) -> tuple[int, Any]:
        view = self._state.workers.get(query.worker_id)
        if view is None:
            return 404, {"reason": f"there is no worker {query.worker_id}"}
        others = [w for w in self._state.with_role(view.role) if w is not view]
        if query.drain and not others:
            return 409, {"reason": f"worker {view.worker_id} is the last {view.role} worker in use"}
        view.draining = query.drain
        self._mover.empty_draining_workers()
        return 200, {"worker": view.worker_id, "state": self._state.operating_state(view)}

    def on_fault_reached(self, message: FaultReached) -> None:
        """An injected fault has struck."""
        self._faults_struck.append(message)

    def _inject_fault(self, query: FaultQuery) -> tuple[int, Any]:
        if not self._args.fault_injection:
            return 403, {"reason": "start the server with --ares-fault-injection"}
        if query.worker_id is None:
            struck = [
                {"worker_id": f.worker_id, "point": f.point, "rid": public_rid(f.rid)}
                for f in self._faults_struck
            ]
            return 200, {"struck": struck}
        view = self._state.workers.get(query.worker_id)
        if view is None:
            return 404, {"reason": f"there is no worker {query.worker_id}"}
        if view.state != READY:
            return 409, {"reason": f"worker {query.worker_id} is not ready"}
        self._faults_struck.clear()
        fault = InjectFault(point=query.point, action=query.action, seconds=query.seconds)
        self._tell(query.worker_id, fault)
        return 200, {"armed": query.point}
