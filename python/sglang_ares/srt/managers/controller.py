"""The controller: dispatches requests, collects loads, plans and commands migrations, answers
the front. One process; the workers are its children."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import zmq
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.data_parallel_controller import (
    DataParallelController,
    run_data_parallel_controller_process,
)
from sglang.srt.managers.io_struct import (
    AbortReq,
    ActiveRanksOutput,
    ShutdownReq,
    sock_recv,
    sock_send,
)
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.utils.network import get_zmq_socket
from sglang.utils import TypeBasedDispatcher

from sglang_ares.srt.disaggregation.request_state import recompute_input, spec_of, unpack_ids
from sglang_ares.srt.managers.attempts import public_rid
from sglang_ares.srt.managers.cluster import WorkerCluster, WorkerProcess
from sglang_ares.srt.managers.cluster_state import (
    DRAIN,
    FAILED_FOR_GOOD,
    MANUAL,
    MEMORY,
    POLICY,
    READY,
    ClusterState,
    MovingRequest,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    ConnectPeers,
    ControllerInbound,
    Decoder,
    DrainQuery,
    EmittedTokens,
    FaultQuery,
    FaultReached,
    Fenced,
    FenceRequests,
    FrontInbound,
    Heartbeat,
    InjectFault,
    Landed,
    Message,
    MigrateQuery,
    MigrationResult,
    PeerDiedAck,
    QueryReply,
    RequestFailed,
    RequestsQuery,
    Resume,
    StartMigration,
    StatusQuery,
    WorkerReport,
    encode,
)
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.managers.memory_relief import MemoryRelief
from sglang_ares.srt.managers.recovery import Recovery
from sglang_ares.srt.managers.supervisor import Supervisor
from sglang_ares.srt.managers.worker_process import leave_ctrl_c_to_the_front
from sglang_ares.srt.observability.metrics import ControllerMetrics
from sglang_ares.srt.policy.draining import drain_moves
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING
from sglang_ares.srt.policy.types import DECODE, PREFILL, NewRequest, RescheduleLimits
from sglang_ares.srt.sampling.sample_seeds import SampleSeeds
from sglang_ares.srt.security.bounds import MAX_RID_CHARS
from sglang_ares.srt.security.dropped import DroppedFrames
from sglang_ares.srt.security.sockets import BoundSocket

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.server_args import PortArgs, ServerArgs

    from sglang_ares.ares_args import AresArgs
    from sglang_ares.srt.security.control_plane import ControlPlane

logger = logging.getLogger(__name__)

# Longest sleep of the event loop; bounds how late a rescheduling round can be, or a death noticed.
_POLL_MS = 200
# Most queries of the front answered before the loop turns to the workers again.
_FRONT_MESSAGES = 256

_LEDGER = "ledger"


class AresController(DataParallelController):
    """Upstream's data-parallel controller with the cluster of prefill and decode workers.

    Upstream constructs it, so its own arguments come through class attributes, set before.
    """

    ares_args: ClassVar[AresArgs]
    control: ClassVar[ControlPlane]

    # --- construction: upstream's steps -----------------------------------------------------

    def launch_dp_schedulers(self, server_args: ServerArgs, port_args: PortArgs) -> None:
        """Start the workers, connect to them and introduce them to each other."""
        keys = self.control.keys
        # Kept: it stops when nobody refers to it any more.
        self._admission = keys and keys.admit(self.context)
        self.dropped = DroppedFrames("controller")
        self.dropped_front = DroppedFrames("front")
        self._mailbox = Mailbox(
            self.context, self.control.controller.bind, keys=keys, dropped=self.dropped
        )
        self._front = BoundSocket(
            self.context,
            zmq.ROUTER,
            self.control.front.bind,
            keys=keys,
            dropped=self.dropped_front,
        )
        self._mailbox.connect(_LEDGER, self.control.ledger.connect)
        self._to_tokenizer = get_zmq_socket(
            self.context, zmq.PUSH, port_args.tokenizer_ipc_name, False
        )
        self.cluster = WorkerCluster(server_args, port_args, self.ares_args, self.control)
        self.workers = [self._input_socket(w) for w in self.cluster.workers]
        count = len(self.workers)
        self.status = [True] * count
        self.dp_active = [True] * count
        self._active_workers = list(range(count))
        self.cluster.start()
        self.scheduler_procs = [p for w in self.cluster.workers for p in w.processes]
        self.max_total_num_tokens = min(
            w.info["max_total_num_tokens"] for w in self.cluster.workers
        )
        self.max_req_input_len = min(w.info["max_req_input_len"] for w in self.cluster.workers)
        self.startup_time = None
        self._init_state()
        self._introduce_workers()

    def _input_socket(self, worker: WorkerProcess) -> zmq.Socket[bytes]:
        endpoint = worker.port_args.scheduler_input_ipc_name
        socket: zmq.Socket[bytes] = get_zmq_socket(self.context, zmq.PUSH, endpoint, True)
        return socket

    def _introduce_workers(self) -> None:
        """Tell every ready worker of all ready workers."""
        ready = [
            w for w in self.cluster.workers if self.state.workers[w.spec.worker_id].state == READY
        ]
        peers = [w.peer for w in ready]
        for worker in ready:
            self._mailbox.connect(str(worker.spec.worker_id), worker.spec.control_endpoint)
            self.tell(worker.spec.worker_id, ConnectPeers(peers=peers))

    def _init_state(self) -> None:
        self.state = ClusterState(
            [
                WorkerView(
                    worker_id=w.spec.worker_id,
                    role=w.spec.role,
                    pids=w.pids,
                    kv_capacity=w.info["max_total_num_tokens"],
                )
                for w in self.cluster.workers
            ]
        )
        self._from_workers = Decoder(ControllerInbound)
        self._from_front = Decoder(FrontInbound)
        self._place = PLACEMENT.get(self.ares_args.placement)
        self._reschedule = RESCHEDULING.get(self.ares_args.rescheduling)
        self._limits = RescheduleLimits(
            max_moves=self.ares_args.max_moves,
            threshold=self.ares_args.reschedule_threshold,
            min_gap_tokens=self.ares_args.min_gap_tokens,
            cooldown_s=self.ares_args.move_cooldown,
        )
        now = time.monotonic()
        self.recovery = Recovery(self, self.state, self.ares_args.max_attempts)
        self.supervisor = Supervisor(
            self,
            self.cluster,
            self.state,
            self.ares_args.worker_timeout,
            self.ares_args.max_restarts,
            now,
        )
        self._next_round = time.monotonic() + self.ares_args.reschedule_interval
        self._relief = MemoryRelief(
            report_interval_s=self.ares_args.report_interval,
            floor=self.ares_args.memory_floor,
            reserved_tokens=self.server_args.num_reserved_decode_tokens,
        )
        self._sequence = 0
        self._next_migration_id = 1
        # Queries of the front that wait for a migration's outcome: (identity, query id).
        self._waiting: dict[int, tuple[bytes, int]] = {}
        self._seeds = SampleSeeds()
        self._leaving = False
        self._faults_struck: list[dict[str, Any]] = []
        self.metrics = ControllerMetrics.create(self.server_args)

    def init_dispatcher(self) -> None:
        """Requests go to two workers, aborts to whoever may hold the request."""
        super().init_dispatcher()
        self.dispatching = self.dispatch
        self._aborts = TypeBasedDispatcher([(AbortReq, self.route_abort)])

    # --- requests ---------------------------------------------------------------------------

    def dispatch(self, req: TokenizedGenerateReqInput) -> None:
        """Choose a prefill and a decode worker, and send the request to both."""
        req.sampling_params.sampling_seed = self._seeds.seed_for(req)
        if is_health_check_generate_req(req):
            self._probe(req)
            return
        owner = Ownership(req.rid, req, -1, -1, dispatched_at=time.monotonic())
        if len(owner.name) > MAX_RID_CHARS:
            self.end(owner, 400, f"the rid is longer than {MAX_RID_CHARS - 3} characters")
        elif not self._send_attempt(owner, None):
            self.end(owner, 503, self.missing_role() or "all workers of a role are starting anew")

    def _choose(self, prompt_tokens: int) -> tuple[int, int] | None:
        """A prefill and a decode worker for a request, if there are such workers."""
        prefill, decode = self.state.loads(PREFILL), self.state.loads(DECODE)
        if not prefill or not decode:
            return None
        new = NewRequest(prompt_tokens=prompt_tokens, sequence=self._sequence)
        self._sequence += 1
        return self._place(new, prefill), self._place(new, decode)

    def _send_attempt(self, owner: Ownership, emitted: EmittedTokens | None) -> bool:
        """Send the current attempt at a request to two workers; false if there are none.

        If tokens were emitted, the prefill worker computes the KV of all but the last of them,
        and the decode worker goes on behind that.
        """
        req = owner.request
        output = unpack_ids(emitted.output_ids if emitted is not None else b"")
        prompt_tokens = len(req.input_ids or ()) + len(output)
        chosen = self._choose(prompt_tokens)
        if chosen is None:
            return False
        owner.prefill, owner.decode = chosen
        source = self.cluster.workers[owner.prefill].spec
        attempt = msgspec.structs.replace(
            req,
            rid=owner.name,
            bootstrap_host=source.bootstrap_host,
            bootstrap_port=source.bootstrap_port,
            bootstrap_room=random.SystemRandom().getrandbits(62),
        )
        if emitted is not None and output:
            sock_send(self.workers[owner.prefill], recompute_input(attempt, output))
            self.tell(owner.decode, resume_message(attempt, emitted))
        else:
            sock_send(self.workers[owner.prefill], attempt)
            sock_send(self.workers[owner.decode], attempt)
        self.state.note_dispatch(owner, prompt_tokens)
        self.metrics.dispatched(owner.prefill, PREFILL)
        self.metrics.dispatched(owner.decode, DECODE)
        return True

    def _probe(self, req: TokenizedGenerateReqInput) -> None:
        """A health check: each of two workers answers by itself, without a KV transfer, or
        leaves it to its running requests when it is busy. Nobody owns it."""
        chosen = self._choose(len(req.input_ids or ()))
        if chosen is None:
            return
        prefill, decode = chosen
        req.bootstrap_host = FAKE_BOOTSTRAP_HOST
        req.bootstrap_room = 0
        sock_send(self.workers[prefill], req)
        sock_send(self.workers[decode], req)

    def route_abort(self, abort: AbortReq) -> None:
        """To the workers that may hold the request; upstream's aborts match by prefix."""
        rid = abort.rid or ""
        matching = [
            o for o in self.state.owners.values() if abort.abort_all or o.rid.startswith(rid)
        ]
        if abort.abort_all or not matching:
            self.send_control_message(abort)
        for owner in matching:
            self._abort(owner, abort)

    def _abort(self, owner: Ownership, abort: AbortReq) -> None:
        owner.aborted = True
        if owner.recovering:
            self.recovery.on_abort(owner)
            return
        if abort.abort_all:
            return
        named = msgspec.structs.replace(abort, rid=owner.name)
        if any(m.rid == owner.name for m in self.state.moving.values()):
            self.send_control_message(named)
            return
        for worker_id in {owner.prefill, owner.decode}:
            if self.state.workers[worker_id].state == READY:
                sock_send(self.workers[worker_id], named)

    # --- workers that come and go -----------------------------------------------------------

    def tell(self, worker_id: int, message: Message) -> None:
        """Send to a worker."""
        self._mailbox.send(str(worker_id), encode(message))

    def leave_out(self, worker_id: int) -> None:
        """A worker is lost: it gets nothing any more."""
        self.status[worker_id] = False
        self._active_workers = [w for w in self._active_workers if w != worker_id]
        self._mailbox.disconnect(str(worker_id))
        self.workers[worker_id].close(linger=0)
        self._tell_front_who_serves()
        self.metrics.worker_lost(worker_id, self.state.workers[worker_id].role)

    def _tell_front_who_serves(self) -> None:
        sock_send(self._to_tokenizer, ActiveRanksOutput(status=list(self.status)))

    def on_worker_dead(self, worker_id: int) -> None:
        """A worker's processes are gone."""
        for migration_id, move in list(self.state.moving.items()):
            if move.source == worker_id:
                self._answer_unfinished(migration_id, move)
        self.recovery.worker_died(worker_id)
        self.recovery.dispatch_parked()

    def settled(self, worker_id: int) -> bool:
        """Whether all others have let go of a dead worker."""
        return self.recovery.settled(worker_id)

    def take_in(self, worker: WorkerProcess) -> None:
        """A worker that was restarted is ready."""
        worker_id = worker.spec.worker_id
        self.workers[worker_id] = self._input_socket(worker)
        self.status[worker_id] = True
        self._active_workers = sorted({*self._active_workers, worker_id})
        self._introduce_workers()
        self._tell_front_who_serves()
        self.recovery.dispatch_parked()

    def fence(self, request: FenceRequests) -> None:
        """Ask the token ledger."""
        self._mailbox.send(_LEDGER, encode(request))

    def redispatch(self, owner: Ownership, emitted: EmittedTokens) -> bool:
        """Send the next attempt at a request, if there are workers for it."""
        sent = self._send_attempt(owner, emitted)
        if sent:
            self.metrics.recovered()
        return sent

    def missing_role(self) -> str | None:
        """Why no request can be served, not even once restarts are done."""
        for role in (PREFILL, DECODE):
            workers = [w for w in self.state.workers.values() if w.role == role]
            if all(w.state == FAILED_FOR_GOOD for w in workers):
                return f"no {role} worker is left: " + "; ".join(
                    f"worker {w.worker_id} {w.reason}" for w in workers
                )
        return None

    def end(self, owner: Ownership, status: int | None, reason: str) -> None:
        """Answer the client: with an error, or (``status`` None) that its request was aborted."""
        finish = None
        if status is not None:
            logger.error("rid=%s is answered with %d: %s", owner.rid, status, reason)
            finish = {"type": "abort", "message": reason, "status_code": status}
        sock_send(self._to_tokenizer, AbortReq(rid=owner.rid, finished_reason=finish))

    # --- migrations -------------------------------------------------------------------------

    def start_migration(self, rid: str, source: int, target: int, cause: str) -> int:
        """Command a migration; its id."""
        migration_id = self._next_migration_id
        self._next_migration_id += 1
        self.state.note_migration_started(migration_id, MovingRequest(rid, source, target, cause))
        command = StartMigration(migration_id=migration_id, rid=rid, target=target)
        self._mailbox.send(str(source), encode(command))
        return migration_id

    def run_rescheduling_round(self) -> None:
        """Plan on the latest loads and command the moves. A policy that fails, or plans for
        workers that are not there, costs its round, not the cluster."""
        try:
            moves = self._reschedule(self.state.loads(DECODE), self._limits)
        except Exception:
            logger.exception("rescheduling policy %s failed", self.ares_args.rescheduling)
            return
        serving = {w.worker_id for w in self.state.with_role(DECODE)}
        for move in moves:
            if {move.source, move.target} <= serving:
                self.start_migration(move.rid, move.source, move.target, POLICY)
            else:
                logger.error("the policy planned an impossible move: %s", move)

    def empty_draining_workers(self) -> None:
        """Move what is left on draining decode workers to the others."""
        for view in self.state.ready(DECODE):
            if not view.draining:
                continue
            moving = frozenset(m.rid for m in self.state.moving.values())
            underway = sum(m.source == view.worker_id for m in self.state.moving.values())
            most = max(0, self.ares_args.max_migrations_per_worker - underway)
            limits = msgspec.structs.replace(self._limits, max_moves=most)
            for move in drain_moves(view.load(moving), self.state.loads(DECODE), limits):
                self.start_migration(move.rid, move.source, move.target, DRAIN)

    def _on_worker_message(self, frame: bytes) -> None:
        message = self._decode(self._from_workers, frame, self.dropped)
        fault = self.state.fault(message) if message is not None else None
        if fault is not None:
            self.dropped.count(f"{type(message).__name__}: {fault}")
            return
        if isinstance(message, Heartbeat):
            self.supervisor.on_heartbeat(
                message.worker_id, message.incarnation, message.rank, time.monotonic()
            )
        elif isinstance(message, RequestFailed):
            self.recovery.on_request_failed(message.rid, message.reason)
        elif isinstance(message, PeerDiedAck):
            self.recovery.on_acknowledged(message.event_id, message.worker_id)
        elif isinstance(message, Fenced):
            self.recovery.on_fenced(message)
        elif isinstance(message, FaultReached):
            self._faults_struck.append(msgspec.structs.asdict(message))
        elif isinstance(message, Adopted):
            self.state.note_adopted(message)
        elif isinstance(message, WorkerReport):
            self.state.note_report(message)
            self.empty_draining_workers()
            self.metrics.reported(message)
            if self.ares_args.memory_relief:
                for planned in self._relief.plan(message, self.state):
                    self.start_migration(planned.rid, planned.source, planned.target, MEMORY)
            for own in (self.dropped, self.dropped_front):
                self.metrics.dropped(own.where, own.total)
        elif isinstance(message, MigrationResult):
            move = self.state.note_migration_result(message)
            if move is not None:
                self.metrics.migrated(message, move.cause)
                self._relief.note_result(message)
                self._answer_waiting(message)
        elif isinstance(message, Landed):
            self.metrics.landed(message)

    def _answer_waiting(self, result: MigrationResult) -> None:
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
        self._reply(*waiting, 200 if result.outcome == "completed" else 409, body)

    def _answer_unfinished(self, migration_id: int, move: MovingRequest) -> None:
        self._answer_waiting(
            MigrationResult(
                migration_id=migration_id,
                rid=move.rid,
                source=move.source,
                target=move.target,
                outcome="failed",
                reason="source died",
                tokens=0,
                tokens_sent=0,
                tokens_saved=0,
                kv_bytes=0,
                duration_s=0.0,
            )
        )

    # --- the front --------------------------------------------------------------------------

    def _on_front_message(self, identity: bytes, frame: bytes) -> None:
        query = self._decode(self._from_front, frame, self.dropped_front)
        if isinstance(query, StatusQuery):
            settings = {
                "placement": self.ares_args.placement,
                "rescheduling": self.ares_args.rescheduling,
                "runtime_dir": self.control.runtime_dir,
                "dropped_frames": {d.where: d.total for d in (self.dropped, self.dropped_front)},
            }
            self._reply(identity, query.query_id, 200, self.state.status(settings))
        elif isinstance(query, RequestsQuery):
            self._reply(identity, query.query_id, 200, self.state.requests())
        elif isinstance(query, MigrateQuery):
            self._on_migrate_query(identity, query)
        elif isinstance(query, DrainQuery):
            self._reply(identity, query.query_id, *self._on_drain_query(query))
        elif isinstance(query, FaultQuery):
            self._reply(identity, query.query_id, *self._on_fault_query(query))

    def _on_drain_query(self, query: DrainQuery) -> tuple[int, Any]:
        view = self.state.workers.get(query.worker_id)
        if view is None:
            return 404, {"reason": f"there is no worker {query.worker_id}"}
        others = [w for w in self.state.with_role(view.role) if w is not view]
        if query.drain and not others:
            return 409, {"reason": f"worker {view.worker_id} is the last {view.role} worker in use"}
        view.draining = query.drain
        self.empty_draining_workers()
        return 200, {"worker": view.worker_id, "state": self.state.operating_state(view)}

    def _on_fault_query(self, query: FaultQuery) -> tuple[int, Any]:
        if not self.ares_args.fault_injection:
            return 403, {"reason": "start the server with --ares-fault-injection"}
        if query.worker_id is None:
            struck = [{**f, "rid": public_rid(f["rid"])} for f in self._faults_struck]
            return 200, {"struck": struck}
        if query.worker_id not in self.state.workers:
            return 404, {"reason": f"there is no worker {query.worker_id}"}
        if self.state.workers[query.worker_id].state != READY:
            return 409, {"reason": f"worker {query.worker_id} is not ready"}
        self._faults_struck.clear()
        fault = InjectFault(point=query.point, action=query.action, seconds=query.seconds)
        self.tell(query.worker_id, fault)
        return 200, {"armed": query.point}

    def _on_migrate_query(self, identity: bytes, query: MigrateQuery) -> None:
        owner = self.state.owners.get(query.rid)
        target = self.state.workers.get(query.target)
        refusal: tuple[int, str] | None = None
        if owner is None:
            refusal = (404, f"no live request has the rid {query.rid!r}")
        elif target is None:
            refusal = (404, f"there is no worker {query.target}")
        elif target.state != READY:
            refusal = (409, f"worker {query.target} is {target.state}: {target.reason}")
        elif owner.recovering or self.state.workers[owner.decode].state != READY:
            refusal = (409, "the request is being recovered from a dead worker")
        elif target.role != DECODE:
            refusal = (409, f"worker {query.target} is a {target.role} worker")
        elif owner.decode == query.target:
            refusal = (409, f"the request is on worker {query.target} already")
        elif any(m.rid == owner.name for m in self.state.moving.values()):
            refusal = (409, "the request is being moved already")
        if refusal is not None:
            status, reason = refusal
            self._reply(identity, query.query_id, status, {"outcome": "refused", "reason": reason})
            return
        assert owner is not None
        migration_id = self.start_migration(owner.name, owner.decode, query.target, MANUAL)
        self._waiting[migration_id] = (identity, query.query_id)

    def _reply(self, identity: bytes, query_id: int, status: int, body: Any) -> None:
        reply = QueryReply(query_id=query_id, status=status, body=msgspec.json.encode(body))
        self._front.socket.send_multipart([identity, encode(reply)])

    def _decode(self, decoder: Decoder, frame: bytes, dropped: DroppedFrames) -> Any:
        try:
            return decoder.decode(frame)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            dropped.count(f"malformed: {error}")
            return None

    # --- the event loop ---------------------------------------------------------------------

    def event_loop(self) -> None:
        """Serve until the front goes away."""
        watched: set[int] = set()
        while True:
            # A process that ends wakes the loop up; restarted ones have other descriptors.
            if watched != (sentinels := set(self.cluster.sentinels)):
                watched, poller = sentinels, self._poller(sentinels)
            self.soft_watchdog.feed()
            until_round_ms = 1e3 * (self._next_round - time.monotonic())
            poller.poll(max(0, min(_POLL_MS, until_round_ms)))
            self._serve_tokenizer()
            for frame in self._mailbox.drain():
                self._safely(self.dropped, self._on_worker_message, frame)
            self._serve_front()
            if not self._leaving:
                self.supervisor.tick(time.monotonic())
            self._reschedule_when_due()

    def _poller(self, sentinels: set[int]) -> zmq.Poller:
        poller = zmq.Poller()
        for watched in (
            self.recv_from_tokenizer,
            self._mailbox.socket,
            self._front.socket,
            *sentinels,
        ):
            poller.register(watched, zmq.POLLIN)
        return poller

    def _serve_tokenizer(self) -> None:
        while True:
            try:
                received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            if isinstance(received, AbortReq):
                self._aborts(received)
            elif isinstance(received, ShutdownReq):
                self._leaving = True  # workers that end now are not to be started anew
                self.send_control_message(received)
            else:
                self._request_dispatcher(received)

    def _serve_front(self) -> None:
        for identity, frame in self._front.receive(parts=2, limit=_FRONT_MESSAGES):
            self._safely(self.dropped_front, self._on_front_message, identity, frame)

    def _safely(self, dropped: DroppedFrames, handle: Callable[..., None], *args: Any) -> None:
        """A message that cannot be handled is dropped; the cluster goes on."""
        try:
            handle(*args)
        except Exception as error:
            dropped.count("it could not be handled", error=error)

    def _reschedule_when_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_round:
            self._next_round = now + self.ares_args.reschedule_interval
            self.run_rescheduling_round()


def resume_message(attempt: TokenizedGenerateReqInput, emitted: EmittedTokens) -> Resume:
    """What the decode worker of a request with output is sent."""
    return Resume(
        spec=spec_of(attempt),
        output_ids=emitted.output_ids,
        cached_tokens=emitted.cached_tokens,
        reasoning_tokens=emitted.reasoning_tokens,
        bootstrap_host=attempt.bootstrap_host,
        bootstrap_port=attempt.bootstrap_port,
        room=attempt.bootstrap_room,
    )


def run_controller_process(
    server_args: ServerArgs,
    port_args: PortArgs,
    ares_args: AresArgs,
    control: ControlPlane,
    writer: Connection,
) -> None:
    """Entry point of the controller's process."""
    from sglang_ares.plugin import hook_controller

    leave_ctrl_c_to_the_front()
    # Upstream's workers send their parent SIGQUIT when they fail; the cluster outlives them.
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    AresController.ares_args = ares_args
    AresController.control = control
    hook_controller(AresController)
    run_data_parallel_controller_process(server_args, port_args, writer)
