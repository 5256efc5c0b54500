"""The controller: dispatches requests, collects loads, plans and commands migrations, answers
the front. One process; the workers are its children."""

from __future__ import annotations

import logging
import random
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
from sglang.srt.managers.io_struct import AbortReq, sock_recv, sock_send
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.utils.network import get_zmq_socket
from sglang.utils import TypeBasedDispatcher

from sglang_ares.srt.managers.cluster import WorkerCluster
from sglang_ares.srt.managers.cluster_state import ClusterState, MovingRequest, WorkerView
from sglang_ares.srt.managers.io_struct import (
    ConnectPeers,
    ControllerInbound,
    Decoder,
    FrontInbound,
    Landed,
    MigrateQuery,
    MigrationResult,
    QueryReply,
    RequestsQuery,
    StartMigration,
    StatusQuery,
    WorkerReport,
    encode,
)
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.managers.worker_process import leave_ctrl_c_to_the_front
from sglang_ares.srt.observability.metrics import ControllerMetrics
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

# Longest sleep of the event loop; bounds how late a rescheduling round can be.
_POLL_MS = 200
# Most queries of the front answered before the loop turns to the workers again.
_FRONT_MESSAGES = 256


class WorkerDiedError(RuntimeError):
    """A worker process ended while the cluster was serving."""


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
        self.cluster = WorkerCluster(server_args, port_args, self.ares_args, self.control)
        self.workers = [
            get_zmq_socket(self.context, zmq.PUSH, w.port_args.scheduler_input_ipc_name, True)
            for w in self.cluster.workers
        ]
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
        self._introduce_workers()
        self._init_state()

    def _introduce_workers(self) -> None:
        peers = [w.peer for w in self.cluster.workers]
        for worker in self.cluster.workers:
            name = str(worker.spec.worker_id)
            self._mailbox.connect(name, worker.spec.control_endpoint)
            self._mailbox.send(name, encode(ConnectPeers(peers=peers)))

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
        self._next_round = time.monotonic() + self.ares_args.reschedule_interval
        self._sequence = 0
        self._next_migration_id = 1
        # Queries of the front that wait for a migration's outcome: (identity, query id).
        self._waiting: dict[int, tuple[bytes, int]] = {}
        self._seeds = SampleSeeds()
        self.metrics = ControllerMetrics.create(self.server_args)

    def init_dispatcher(self) -> None:
        """Requests go to two workers, aborts to whoever may hold the request."""
        super().init_dispatcher()
        self.dispatching = self.dispatch
        self._aborts = TypeBasedDispatcher([(AbortReq, self.route_abort)])

    # --- requests ---------------------------------------------------------------------------

    def dispatch(self, req: TokenizedGenerateReqInput) -> None:
        """Choose a prefill and a decode worker, and send the request to both."""
        new = NewRequest(prompt_tokens=len(req.input_ids or ()), sequence=self._sequence)
        self._sequence += 1
        prefill = self._place(new, self.state.loads(PREFILL))
        decode = self._place(new, self.state.loads(DECODE))
        req.sampling_params.sampling_seed = self._seeds.seed_for(req)
        if is_health_check_generate_req(req):
            self._probe(req, prefill, decode)
            return
        source = self.cluster.workers[prefill].spec
        req.bootstrap_host = source.bootstrap_host
        req.bootstrap_port = source.bootstrap_port
        req.bootstrap_room = random.SystemRandom().getrandbits(62)
        sock_send(self.workers[prefill], req)
        sock_send(self.workers[decode], req)
        if len(req.rid) <= MAX_RID_CHARS:  # else reports do not list it, and it cannot move
            self.state.note_dispatch(req.rid, prefill, decode, new.prompt_tokens)
        self.metrics.dispatched(prefill, PREFILL)
        self.metrics.dispatched(decode, DECODE)

    def _probe(self, req: TokenizedGenerateReqInput, prefill: int, decode: int) -> None:
        """A health check: each of the two workers answers by itself, without a KV transfer, or
        leaves it to its running requests when it is busy. Nobody owns it."""
        req.bootstrap_host = FAKE_BOOTSTRAP_HOST
        req.bootstrap_room = 0
        sock_send(self.workers[prefill], req)
        sock_send(self.workers[decode], req)

    def route_abort(self, abort: AbortReq) -> None:
        """To the request's two workers; to all when it is on the move, unknown, or a prefix."""
        owner = self.state.owners.get(abort.rid or "")
        moving = any(m.rid == abort.rid for m in self.state.moving.values())
        if abort.abort_all or owner is None or moving:
            self.send_control_message(abort)
            return
        for worker_id in {owner.prefill, owner.decode}:
            sock_send(self.workers[worker_id], abort)

    # --- migrations -------------------------------------------------------------------------

    def start_migration(self, rid: str, source: int, target: int) -> int:
        """Command a migration; its id."""
        migration_id = self._next_migration_id
        self._next_migration_id += 1
        self.state.note_migration_started(migration_id, MovingRequest(rid, source, target))
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
                self.start_migration(move.rid, move.source, move.target)
            else:
                logger.error("the policy planned an impossible move: %s", move)

    def _on_worker_message(self, frame: bytes) -> None:
        message = self._decode(self._from_workers, frame, self.dropped)
        fault = self.state.fault(message) if message is not None else None
        if fault is not None:
            self.dropped.count(f"{type(message).__name__}: {fault}")
            return
        if isinstance(message, WorkerReport):
            self.state.note_report(message)
            self.metrics.reported(message)
            for own in (self.dropped, self.dropped_front):
                self.metrics.dropped(own.where, own.total)
        elif isinstance(message, MigrationResult):
            if self.state.note_migration_result(message):
                self.metrics.migrated(message)
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
            "rid": result.rid,
            "source": result.source,
            "target": result.target,
            "tokens": result.tokens,
            "kv_bytes": result.kv_bytes,
            "duration_ms": 1e3 * result.duration_s,
        }
        self._reply(*waiting, 200 if result.outcome == "completed" else 409, body)

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

    def _on_migrate_query(self, identity: bytes, query: MigrateQuery) -> None:
        owner = self.state.owners.get(query.rid)
        target = self.state.workers.get(query.target)
        refusal: tuple[int, str] | None = None
        if owner is None:
            refusal = (404, f"no live request has the rid {query.rid!r}")
        elif target is None:
            refusal = (404, f"there is no worker {query.target}")
        elif target.role != DECODE:
            refusal = (409, f"worker {query.target} is a {target.role} worker")
        elif owner.decode == query.target:
            refusal = (409, f"the request is on worker {query.target} already")
        elif any(m.rid == query.rid for m in self.state.moving.values()):
            refusal = (409, "the request is being moved already")
        if refusal is not None:
            status, reason = refusal
            self._reply(identity, query.query_id, status, {"outcome": "refused", "reason": reason})
            return
        assert owner is not None
        migration_id = self.start_migration(query.rid, owner.decode, query.target)
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
        """Serve until a worker dies or the front goes away."""
        poller = zmq.Poller()
        for socket in (self.recv_from_tokenizer, self._mailbox.socket, self._front.socket):
            poller.register(socket, zmq.POLLIN)
        for sentinel in self.cluster.sentinels:
            poller.register(sentinel, zmq.POLLIN)
        while True:
            self.soft_watchdog.feed()
            until_round_ms = 1e3 * (self._next_round - time.monotonic())
            poller.poll(max(0, min(_POLL_MS, until_round_ms)))
            self._serve_tokenizer()
            for frame in self._mailbox.drain():
                self._safely(self.dropped, self._on_worker_message, frame)
            self._serve_front()
            self._reschedule_when_due()
            self._check_workers()

    def _serve_tokenizer(self) -> None:
        while True:
            try:
                received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            if isinstance(received, AbortReq):
                self._aborts(received)
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

    def _check_workers(self) -> None:
        dead = self.cluster.dead_worker()
        if dead is not None:
            codes = [p.exitcode for p in dead.processes if not p.is_alive()]
            raise WorkerDiedError(
                f"{dead.spec.role} worker {dead.spec.worker_id} died (exit code {codes[0]}); "
                "the server stops."
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
    AresController.ares_args = ares_args
    AresController.control = control
    hook_controller(AresController)
    run_data_parallel_controller_process(server_args, port_args, writer)
