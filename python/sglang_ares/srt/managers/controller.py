"""The controller: dispatches requests, collects loads, plans and commands migrations, answers
the front. One process; the workers are its children."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import zmq
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

from sglang_ares.srt.disaggregation.refusals import REQUEST, first_refusal
from sglang_ares.srt.disaggregation.request_state import make_fit_to_travel
from sglang_ares.srt.emulation.settings import not_emulated, profile_of
from sglang_ares.srt.managers.admission_queue import AdmissionQueue
from sglang_ares.srt.managers.cluster import (
    WorkerCluster,
    WorkerProcess,
    admission_of,
)
from sglang_ares.srt.managers.cluster_settings import settings_of
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    FAILED_FOR_GOOD,
    LEFT,
    READY,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.dispatcher import Dispatcher, Sent
from sglang_ares.srt.managers.front_desk import FrontDesk
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    ConnectPeers,
    ControllerInbound,
    ControlReply,
    Decoder,
    EmittedTokens,
    FaultReached,
    Fenced,
    FenceRequests,
    FirstEstimates,
    FrontInbound,
    Heartbeat,
    HostBeat,
    HostLeaving,
    JoinQuery,
    Landed,
    LedgerDropped,
    LoadUpdate,
    Message,
    MigrationResult,
    PeerDiedAck,
    RequestFailed,
    RoleChanged,
    WorkerEnded,
    WorkerReport,
    WorkerStarted,
    encode,
)
from sglang_ares.srt.managers.law_keeper import open_keeper
from sglang_ares.srt.managers.length_predictions import LengthPredictions
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.managers.mover import Mover
from sglang_ares.srt.managers.probes import is_probe
from sglang_ares.srt.managers.recovery import Recovery
from sglang_ares.srt.managers.remote_io import RemoteInput, decode_reply
from sglang_ares.srt.managers.remote_workers import RemoteWorker, RemoteWorkers, view_of
from sglang_ares.srt.managers.role_changes import RoleChanges
from sglang_ares.srt.managers.role_planner import RolePlanner
from sglang_ares.srt.managers.supervisor import Supervisor
from sglang_ares.srt.managers.worker_input import WorkerInput
from sglang_ares.srt.observability.metrics import ControllerMetrics
from sglang_ares.srt.policy.admission import SLO
from sglang_ares.srt.policy.elastic.instances import Slo
from sglang_ares.srt.policy.types import DECODE, PREFILL
from sglang_ares.srt.sampling.sample_seeds import SampleSeeds
from sglang_ares.srt.security.dropped import DroppedFrames
from sglang_ares.srt.security.sockets import BoundSocket

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.server_args import PortArgs, ServerArgs

    from sglang_ares.ares_args import AresArgs
    from sglang_ares.srt.managers.role_changes import EndedChange
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
        # Counted in the token ledger's process, which tells its total.
        self.dropped_ledger = DroppedFrames("ledger")
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
        self._settings = settings_of(server_args)
        emulated = profile_of(self.ares_args)
        self.laws = open_keeper(server_args, self.ares_args, self._settings, emulated)
        self.cluster = WorkerCluster(
            server_args, port_args, self.ares_args, self.control, self.laws
        )
        self.workers: list[WorkerInput | RemoteInput] = [
            self._input_of(w) for w in self.cluster.workers
        ]
        count = len(self.workers)
        self.status = [True] * count
        self.dp_active = [True] * count
        self._active_workers = list(range(count))
        self.cluster.start()
        self.scheduler_procs = [p for w in self.cluster.local for p in w.processes]
        self.max_total_num_tokens = min(
            w.info["max_total_num_tokens"] for w in self.cluster.workers
        )
        self.max_req_input_len = min(w.info["max_req_input_len"] for w in self.cluster.workers)
        self.startup_time = None
        self._init_state()
        self._introduce_workers()

    def _input_of(self, worker: WorkerProcess | RemoteWorker) -> WorkerInput | RemoteInput:
        if isinstance(worker, RemoteWorker):
            worker_id = worker.spec.worker_id
            return RemoteInput(lambda message: self.tell(worker_id, message))
        return WorkerInput(self.context, worker.port_args.scheduler_input_ipc_name)

    def _introduce_workers(self) -> None:
        """Tell every ready worker of all ready workers."""
        ready = [
            w for w in self.cluster.workers if self.state.workers[w.spec.worker_id].state == READY
        ]
        peers = [w.peer for w in ready]
        for worker in ready:
            self._mailbox.connect(
                str(worker.spec.worker_id),
                worker.spec.control_endpoint,
                watch=isinstance(worker, RemoteWorker),
            )
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
        self.metrics = ControllerMetrics.create(self.server_args)
        self.predictions = LengthPredictions(use_prior=self.ares_args.length_prior)
        self.mover = Mover(
            self.state,
            self.ares_args,
            self.server_args.num_reserved_decode_tokens,
            self.tell,
            self.predictions,
            now,
        )
        self.roles = RoleChanges(
            self,
            self.state,
            self.cluster.why_roles_are_fixed,
            self.ares_args.role_change_timeout,
        )
        self.planner = RolePlanner(
            self.state,
            self.roles,
            self.ares_args.roles,
            Slo(ttft_ms=self.ares_args.ttft_slo_ms, tpot_ms=self.ares_args.tpot_slo_ms),
            lambda: self.mover.cost,
            now,
            self.ares_args.time_dilation,
            self.laws.current.prefill,
            self.metrics.role_loads,
            self.server_args.num_reserved_decode_tokens,
        )
        self.dispatcher = Dispatcher(
            self.state,
            self.cluster,
            self.workers,
            self.ares_args.placement,
            self.metrics,
            self.tell,
            self.predictions,
            self.server_args.num_reserved_decode_tokens,
        )
        self.waiting = AdmissionQueue(
            self.state,
            self.ares_args.ttft_slo_ms / 1e3,
            self.dispatcher.rooms,
            lambda owner, among: self.dispatcher.send_attempt(owner, None, among),
            self.missing_role,
            self.end,
            self.ares_args.why_not_by_slo,
        )
        self.waiting.use(self.ares_args.admission)
        self.desk = FrontDesk(
            self._front,
            self.state,
            self.mover,
            self.dispatcher,
            self.waiting,
            self.predictions,
            self.roles,
            self.planner,
            self.laws,
            self.ares_args,
            self.control.runtime_dir,
            [self.dropped, self.dropped_front, self.dropped_ledger],
            self.tell,
        )
        self.remote = RemoteWorkers(
            self._mailbox,
            self.supervisor,
            self.state,
            self.cluster.workers,
            self._settings,
            admission_of(self.ares_args, self.control),
            self.max_req_input_len,
            self._enlist,
            changes=self.cluster.changes,
        )
        self._seeds = SampleSeeds()
        self._leaving = False

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
            self.dispatcher.probe(req)
            return
        owner = self.state.new_owner(req.rid, req)
        if self.ares_args.emulate and (what := not_emulated(req)):
            self.end(owner, 400, f"no model runs here (--ares-emulate), so there are no {what}")
        elif (fault := make_fit_to_travel(req)) is not None:
            self.end(owner, 400, fault)
        elif self.waiting.admission == SLO and not is_probe(req.rid):
            self.waiting.arrive(owner)
        elif self.dispatcher.send_attempt(owner, None) is not Sent.SENT:
            self.end(owner, 503, self.missing_role() or "all workers of a role are starting anew")
        elif not is_probe(req.rid):
            self.planner.on_arrival(len(req.input_ids or ()))

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
        if owner.waiting:
            self.waiting.remove(owner)
            self.end(owner, None, "aborted by the client")
            return
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
                self.workers[worker_id].put(named)

    def send_control_message(self, obj: Any) -> None:
        """To all workers that serve."""
        self.cluster.changes.note(obj)
        for worker_id in self._active_workers:
            self.workers[worker_id].put(obj)

    def send_to_all_workers(self, obj: Any) -> None:
        """Upstream's other name for it: no worker here has an inactive rank."""
        self.send_control_message(obj)

    # --- workers that come and go -----------------------------------------------------------

    def _enlist(self, worker: RemoteWorker) -> None:
        """A worker of another host is going to start."""
        self.cluster.workers.append(worker)
        self.workers.append(self._input_of(worker))
        self.status.append(False)
        self.dp_active.append(True)
        self.state.workers[worker.spec.worker_id] = view_of(worker)

    def tell(self, worker_id: int, message: Message) -> None:
        """Send to a worker; one that was lost is not there to be told."""
        if self._mailbox.knows(str(worker_id)):
            self._mailbox.send(str(worker_id), encode(message))

    def leave_out(self, worker_id: int) -> None:
        """A worker is lost: it gets nothing any more."""
        self.status[worker_id] = False
        self._active_workers = [w for w in self._active_workers if w != worker_id]
        self._mailbox.disconnect(str(worker_id))
        self.workers[worker_id].close()
        self._tell_front_who_serves()
        view = self.state.workers[worker_id]
        self.roles.on_worker_lost(worker_id, view.reason, time.monotonic())
        self.metrics.worker_gone(worker_id, view.role)
        if not self.cluster.workers[worker_id].left:
            self.metrics.worker_lost(worker_id, view.role)

    def _tell_front_who_serves(self) -> None:
        sock_send(self._to_tokenizer, ActiveRanksOutput(status=list(self.status)))

    def on_worker_dead(self, worker_id: int) -> None:
        """A worker's processes are gone."""
        for result in self.state.moves_lost_with(worker_id):
            self._migration_ended(result)
        self.recovery.worker_died(worker_id)
        self.recovery.dispatch_parked()
        self.waiting.cluster_changed()

    def settled(self, worker_id: int) -> bool:
        """Whether all others have let go of a dead worker."""
        return self.recovery.settled(worker_id)

    def restart(self, worker_id: int) -> None:
        """Start a lost worker anew; it finds its input socket bound."""
        worker = self.cluster.restart(worker_id)
        self.state.workers[worker_id].role = worker.spec.role
        self.workers[worker_id] = self._input_of(worker)

    def take_in(self, worker: WorkerProcess | RemoteWorker) -> None:
        """A worker that was restarted, or has joined, is ready."""
        worker_id = worker.spec.worker_id
        self.status[worker_id] = True
        self._active_workers = sorted({*self._active_workers, worker_id})
        self._introduce_workers()
        self._tell_front_who_serves()
        self.recovery.dispatch_parked()
        self.waiting.cluster_changed()

    def empty_workers(self) -> None:
        """Move requests away from the workers that are to be emptied."""
        self.mover.empty_draining_workers()

    def hand_back(self, worker_id: int) -> None:
        """Dispatch anew the requests of a worker that have no output yet. One that could not go on
        from its output stays: its first token may be on its way to here."""
        if self.ares_args.role_emptying == "migrate":
            waiting = [
                owner
                for owner in self.state.without_output(worker_id)
                if first_refusal(REQUEST, owner.request) is None
            ]
            for owner in waiting:
                owner.handed_back += 1
            self.recovery.recover(waiting, f"worker {worker_id} changes its role")

    def role_changed(self, worker_id: int, role: str) -> None:
        """A worker serves in another role: everybody is told, and it may have requests."""
        self.state.workers[worker_id].role = role
        self.cluster.set_role(worker_id, role)
        self._introduce_workers()
        self.recovery.dispatch_parked()

    def role_change_ended(self, ended: EndedChange) -> None:
        """A change of role has come to its end, either way."""
        self.metrics.role_change_ended(ended)

    def fence(self, request: FenceRequests) -> None:
        """Ask the token ledger."""
        self._mailbox.send(_LEDGER, encode(request))

    def redispatch(self, owner: Ownership, emitted: EmittedTokens) -> bool:
        """Send the next attempt at a request, if there are workers for it."""
        sent = self.dispatcher.send_attempt(owner, emitted) is Sent.SENT
        if sent:
            self.metrics.recovered()
        return sent

    def missing_role(self) -> str | None:
        """Why no request can be served, not even once restarts are done."""
        for role in (PREFILL, DECODE):
            workers = [w for w in self.state.workers.values() if w.role == role]
            if all(w.state in (FAILED_FOR_GOOD, LEFT) for w in workers):
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

    # --- messages ---------------------------------------------------------------------------

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
        elif isinstance(message, RoleChanged):
            self.roles.on_changed(message, time.monotonic())
        elif isinstance(message, Fenced):
            self.recovery.on_fenced(message)
        elif isinstance(message, LedgerDropped):
            self.dropped_ledger.total = message.dropped_frames
            self.metrics.dropped(self.dropped_ledger.where, message.dropped_frames)
        elif isinstance(message, FaultReached):
            self.desk.on_fault_reached(message)
        elif isinstance(message, Adopted):
            self.state.note_adopted(message)
        elif isinstance(message, WorkerReport):
            if not self.state.note_report(message):
                return
            self.waiting.cluster_changed()
            self.predictions.on_report(message)
            self.metrics.reported(message)
            self.metrics.waiting(len(self.waiting))
            self.metrics.predicted(self.predictions.of_new())
            self.mover.on_report(message)
            self.planner.on_report(message, time.monotonic())
            if not self.state.workers[message.worker_id].host:
                self.laws.on_report(message)
            for own in (self.dropped, self.dropped_front):
                self.metrics.dropped(own.where, own.total)
        elif isinstance(message, LoadUpdate):
            self.state.note_load(message)
            self.waiting.cluster_changed()
        elif isinstance(message, MigrationResult):
            self._migration_ended(message)
        elif isinstance(message, FirstEstimates):
            self.state.note_first_estimates(message)
        elif isinstance(message, Landed):
            self.metrics.landed(message)
            self.mover.on_landed(message)
        elif isinstance(message, (HostBeat, WorkerStarted, WorkerEnded, HostLeaving)):
            self.remote.on_message(message)
        elif isinstance(message, ControlReply):
            try:
                reply = decode_reply(message.body)
            except msgspec.MsgspecError as error:
                self.dropped.count(f"ControlReply: {error}")
            else:
                sock_send(self._to_tokenizer, reply)

    def _migration_ended(self, result: MigrationResult) -> None:
        move = self.state.note_migration_result(result)
        if move is not None:
            self.metrics.migrated(result, move.cause)
            self.mover.on_result(result)
            self.desk.on_result(result)

    def _on_front_message(self, identity: bytes, frame: bytes) -> None:
        query = self._decode(self._from_front, frame, self.dropped_front)
        if isinstance(query, JoinQuery):
            self.desk.reply(identity, query.query_id, *self.remote.answer(query))
        elif query is not None:
            self.desk.answer(identity, query)

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
            until_round_ms = 1e3 * (self.mover.next_round - time.monotonic())
            poller.poll(max(0, min(_POLL_MS, until_round_ms)))
            self._serve_tokenizer()
            for frame in self._mailbox.drain():
                self._safely(self.dropped, self._on_worker_message, frame)
            self._serve_front()
            self.waiting.let_in(time.monotonic())
            if not self._leaving:
                self.supervisor.tick(time.monotonic())
                self.remote.tick()
            self.mover.run_round_when_due(time.monotonic())
            self.roles.tick(time.monotonic())
            self.planner.run_pass_when_due(time.monotonic())
            self.laws.write_when_due(time.monotonic())

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
                self.remote.server_ends()
                self.laws.write()
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


def run_controller(
    server_args: ServerArgs,
    port_args: PortArgs,
    ares_args: AresArgs,
    control: ControlPlane,
    writer: Connection,
) -> None:
    """Run the controller in this process."""
    from sglang_ares.plugin import hook_controller

    # Upstream's workers send their parent SIGQUIT when they fail; the cluster outlives them.
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    AresController.ares_args = ares_args
    AresController.control = control
    hook_controller(AresController)
    run_data_parallel_controller_process(server_args, port_args, writer)
