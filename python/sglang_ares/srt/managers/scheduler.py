"""The worker: upstream's scheduler, able to hand running requests over and to take them in."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_disagg, get_parallel

from sglang_ares.srt.disaggregation.checks import resume_fault
from sglang_ares.srt.disaggregation.faults import FaultInjector
from sglang_ares.srt.disaggregation.kv_link import KvLink
from sglang_ares.srt.disaggregation.manager import MigrationManager
from sglang_ares.srt.disaggregation.penalties import seed_penalties
from sglang_ares.srt.disaggregation.refusals import MODEL, first_refusal
from sglang_ares.srt.disaggregation.request_state import note_fed
from sglang_ares.srt.disaggregation.resume import ResumedRequests
from sglang_ares.srt.disaggregation.roles import add_prefill_side, label
from sglang_ares.srt.managers.control_intake import ControlIntake, ControlRequestReceiver
from sglang_ares.srt.managers.heartbeat import start_heartbeat
from sglang_ares.srt.managers.io_struct import (
    ChangeRole,
    ConnectPeers,
    ControlRequest,
    Discard,
    Generate,
    InjectFault,
    Message,
    PeerDied,
    PeerDiedAck,
    Resume,
)
from sglang_ares.srt.managers.load_snapshots import WorkerLoadWriter
from sglang_ares.srt.managers.migration_host import SchedulerMigrationHost
from sglang_ares.srt.managers.output_streamer import (
    AresOutputStreamer,
    TokenizerEcho,
)
from sglang_ares.srt.managers.remote_requests import RemoteRequests
from sglang_ares.srt.managers.role_switch import RoleSwitch
from sglang_ares.srt.managers.run_time_changes import repeat
from sglang_ares.srt.managers.worker_agent import WorkerAgent, pool_counters
from sglang_ares.srt.policy.types import DECODE
from sglang_ares.srt.predictor.runtime import hand_over_on_cpu

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler_components.request_receiver import (
        SchedulerRequestReceiver,
    )
    from sglang.srt.server_args import PortArgs, ServerArgs

    from sglang_ares.srt.disaggregation.migration import MigrationLimits
    from sglang_ares.srt.disaggregation.source import SourceMigration
    from sglang_ares.srt.disaggregation.target import TargetMigration
    from sglang_ares.srt.emulation.device import EmulatedDevice
    from sglang_ares.srt.emulation.predictions import EmulatedPredictions
    from sglang_ares.srt.managers.io_struct import PoolCounters
    from sglang_ares.srt.managers.worker_spec import WorkerSpec
    from sglang_ares.srt.policy.types import Remaining
    from sglang_ares.srt.predictor.tracker import PredictionTracker

logger = logging.getLogger(__name__)

# While transfers are under way and no batch can run, look again this often.
_STALL_POLL_MS = 1


class UnsupportedModelError(RuntimeError):
    """The model keeps state that cannot move; the text is the refusal table's row."""


class AresScheduler(Scheduler):
    """A prefill or decode worker of the cluster.

    Upstream constructs it (``plugin.hook_worker`` puts it in upstream's place), so what the
    worker is told comes through ``spec``, set on the class before.
    """

    spec: ClassVar[WorkerSpec]
    emulated: ClassVar[EmulatedDevice | None] = None
    emulated_predictions: ClassVar[EmulatedPredictions | None] = None
    predictions: ClassVar[PredictionTracker | None] = None

    def __init__(self, server_args: ServerArgs, port_args: PortArgs) -> None:
        self.migrations: MigrationManager | None = None
        self.resumed: ResumedRequests | None = None
        self._faults: FaultInjector | None = None
        self._role_switch: RoleSwitch | None = None
        self.ares: WorkerAgent
        self._pools_at_start: PoolCounters | None = None
        self._was_busy = False
        self._last_forward_was_decode = False
        # Prefill batches under way: when each was launched, and what of its prompts it computes.
        self._prefills: deque[tuple[float, list[tuple[int, int]]]] = deque(maxlen=4)
        super().__init__(server_args, port_args)
        repeat(self.spec.adapters, self._request_dispatcher)
        self._pools_at_start = pool_counters(self, idle=True)
        lifelines = self._remote.lifelines if self._remote is not None else []
        start_heartbeat(self.spec, get_parallel().tp_rank, lifelines)

    # --- construction: upstream's init_* steps ----------------------------------------------

    def init_ipc_channels(self, port_args: PortArgs) -> None:
        """Upstream's sockets, and the agent's mailbox on rank 0."""
        super().init_ipc_channels(port_args)
        self.ares = WorkerAgent(self.spec, speaks=get_parallel().attn_tp_rank == 0)
        AresOutputStreamer.agent = self.ares
        AresOutputStreamer.predictions = self.predictions
        channels: Any = self.ipc_channels
        self._remote = RemoteRequests.of(self)
        if self._remote is not None:
            channels = self._remote.instead_of(channels)
        echo = TokenizerEcho(channels.send_to_tokenizer, self.ares)
        self.ipc_channels: Any = dataclasses.replace(channels, send_to_tokenizer=echo)
        if self.ares.speaks:
            self.load_snapshot_writer = WorkerLoadWriter(self.spec)

    def init_request_receiver(self) -> None:
        """Upstream's receiver; its broadcast takes the control messages along."""
        super().init_request_receiver()
        upstreams: SchedulerRequestReceiver = self.request_receiver  # type: ignore[has-type]
        self.intake = ControlIntake(
            self.ares.drain,
            self._waits_for_time,
            self._digest,
            lambda: self.ares.decode_step_s,
        )
        self.request_receiver = ControlRequestReceiver.around(upstreams, self.intake)

    def _waits_for_time(self) -> bool:
        migrating = self.migrations is not None and self.migrations.active
        changing = self._role_switch is not None and self._role_switch.waiting
        return migrating or changing or self.ares.report_is_due(time.monotonic())

    def _digest(self) -> int:
        return self.migrations.digest.value if self.migrations is not None else 0

    def init_idle_sleeper(self) -> None:
        """An idle worker wakes up for control messages too."""
        super().init_idle_sleeper()
        if self.idle_sleeper is not None and self.ares.socket is not None:
            self.idle_sleeper.poller.register(self.ares.socket)

    def init_disaggregation(self) -> None:
        """Upstream's structures for both roles, as far as the worker may have both; a decode
        worker needs the sending side for migrations anyway."""
        row = first_refusal(MODEL, self)
        if row is not None:
            raise UnsupportedModelError(f"{row.what}: {row.reason} {row.remedy}")
        if get_disagg().enable_pd_role_switch:
            label(self, DECODE)
        super().init_disaggregation()
        if self.disaggregation_mode is DisaggregationMode.DECODE:
            send_manager = add_prefill_side(self)
            label(self, self.spec.role)
            link = KvLink(self, send_manager, self.spec.bootstrap_host, self.spec.bootstrap_port)
            limits = self._limits(link)
            self._host = SchedulerMigrationHost(self, link, limits)
            if self.spec.fault_injection:
                self._faults = FaultInjector(
                    self.ares.worker_id, self.ares.report, lambda: self.intake.now
                )
            self.migrations = MigrationManager(self._host, limits, self._faults)
            self.resumed = ResumedRequests(self)
        if get_disagg().enable_pd_role_switch:
            self._role_switch = RoleSwitch(self, self.spec.limits.timeout_s)

    def _limits(self, link: KvLink) -> MigrationLimits:
        """Those of the operator; unless they say otherwise, an emulated link is as fast as its
        profile says."""
        limits, profile = self.spec.limits, self.spec.profile
        if profile is None or limits.bandwidth_mb_s:
            return limits
        bytes_per_token = link.page_bytes / link.page_size
        bytes_per_s = profile.link_tokens_per_s * bytes_per_token / self.spec.time_dilation
        return dataclasses.replace(limits, bandwidth_mb_s=bytes_per_s / 1e6)

    def get_output_streamer_class(self) -> type:
        """Who may speak to the detokenizer."""
        return AresOutputStreamer

    # --- the event loop ---------------------------------------------------------------------

    def ingest_requests(self) -> list[Any]:
        """Upstream's input, and the control messages; all ranks see the same ones, and the same
        clock wherever it decides anything."""
        received: list[Any] = super().ingest_requests()
        now = self.intake.now
        for frame in self.intake.pop_frames():
            message = self.ares.decode(frame)
            if message is not None:
                self._handle_control(message, now)
        if self._engine_paused and self.migrations is not None:
            # Upstream's loop goes no further while paused; migrations under way must end.
            self.migrations.tick(now)
        self.ares.report_load(self, now)
        self.ares.tell_of_room(self)
        if self._role_switch is not None:
            self._role_switch.step(now)
        return received

    def _handle_control(self, message: Message, now: float) -> None:
        if isinstance(message, ConnectPeers):
            self._connect(message)
        elif isinstance(message, PeerDied):
            self._let_go_of(message, now)
        elif isinstance(message, Discard):
            self._discard(message)
        elif isinstance(message, (Generate, ControlRequest)):
            if self._remote is None:
                self.ares.dropped.count(f"{type(message).__name__} is for workers of other hosts")
            else:
                self._remote.receive(message)
        elif isinstance(message, ChangeRole):
            if self._role_switch is not None:
                self._role_switch.order(message, now)
        elif self.migrations is None or self.resumed is None:
            self.ares.dropped.count(f"{type(message).__name__} is not for a prefill worker")
        elif isinstance(message, Resume):
            self._resume(message)
        elif isinstance(message, InjectFault):
            if self._faults is not None:
                self._faults.arm(message)
        else:
            self.migrations.receive(message, now)

    def _resume(self, message: Resume) -> None:
        assert self.resumed is not None
        fault = resume_fault(message, self._host.facts)
        if fault is not None:
            # Somebody waits for it: it gets its next attempt, or after the last one an answer.
            self.ares.dropped.count(f"Resume of {message.spec.rid}: {fault}")
            self.ares.request_failed(message.spec.rid, fault)
        elif self._host.comes_from_the_dead(message):
            self.ares.request_failed(message.spec.rid, "its prefill worker died")
        elif not self.ares.is_void(message.spec.rid):
            self.resumed.start(message)

    def _let_go_of(self, message: PeerDied, now: float) -> None:
        """A worker died: migrations with it end, and nothing waits for its KV any longer."""
        if self.migrations is not None:
            self.migrations.on_peer_died(message.worker_id, now)
            peer = self.migrations.forget_peer(message.worker_id)
            if peer is not None:
                self._host.stop_waiting_for(peer)
        self.ares.disconnect(message.worker_id)
        self.ares.report(PeerDiedAck(event_id=message.event_id, worker_id=self.ares.worker_id))

    def _discard(self, message: Discard) -> None:
        for rid in message.rids:
            self.ares.note_void(rid)
            if rid in self.ares.received:  # upstream aborts by prefix: "" would be everybody
                self.abort_request(AbortReq(rid=rid))

    def _connect(self, message: ConnectPeers) -> None:
        if not self.ares.connect(message.peers):
            return
        if self.migrations is None:
            return
        self.migrations.connect(message.peers)
        self._host.note_alive(message.peers)
        for peer in message.peers:
            if peer.worker_id != self.ares.worker_id and not self._host.link.connect(
                peer.bootstrap_host, peer.bootstrap_port
            ):
                logger.warning("worker %d cannot be reached for KV yet", peer.worker_id)

    def process_decode_queue(self) -> None:
        """Advance the migrations between two steps, then upstream's own transfers."""
        assert self.migrations is not None
        self.migrations.tick(self.intake.now)
        self._host.release_what_the_dead_held()
        super().process_decode_queue()

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; when a prefill batch began."""
        if batch.forward_mode.is_extend():
            chunks = [
                (start, start + length)
                for start, length in zip(batch.prefix_lens, batch.extend_lens, strict=True)
            ]
            self._prefills.append((time.monotonic(), chunks))
        return super().run_batch(batch, *args, **kwargs)

    def _copy_auxiliary_output_to_cpu(self, batch: ScheduleBatch, result: Any) -> None:
        """Upstream's, where there is something to copy."""
        if self.server_args.device == "cpu":
            hand_over_on_cpu(result)
        else:
            super()._copy_auxiliary_output_to_cpu(batch, result)

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """Upstream's processing, then the step's time, the first tokens of landed requests, and
        what is predicted for new ones."""
        super().process_batch_result(batch, result)
        if self.predictions is not None and self.predictions.first:
            self.ares.report_first_estimates(self.predictions.take_first())
        if batch.forward_mode.is_extend() and self._prefills:
            launched, chunks = self._prefills.popleft()
            self.ares.after_prefill(chunks, launched, time.monotonic())
        is_decode = batch.forward_mode.is_decode()
        if is_decode:
            now, continuous = time.monotonic(), self._last_forward_was_decode
            self.ares.after_decode_step(batch.reqs, now, continuous)
        self._last_forward_was_decode = is_decode

    def on_idle(self) -> None:
        """Upstream's housekeeping; never spin while a transfer is under way."""
        self._last_forward_was_decode = False
        if self.emulated is not None:
            self.emulated.rest()
        if not self.is_fully_idle():
            self._was_busy = True
            super().on_idle()
            if self.idle_sleeper is not None:
                self.idle_sleeper.poller.poll(_STALL_POLL_MS)
            return
        if self._was_busy:
            self._was_busy = False
            self.check_integrity()
            self.ares.report_load(self, self.intake.now, force=True)
        super().on_idle()

    def is_fully_idle(self, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
        """Not while a migration holds memory."""
        if self.migrations is not None:
            if self.migrations.active:
                return False
            if self.disagg_decode_transfer_queue.has_pending_deferred_releases():
                return False
        idle: bool = super().is_fully_idle(for_health_check, ignore_waiting)
        return idle

    # --- requests ---------------------------------------------------------------------------

    def handle_generate_request(self, recv_req: TokenizedGenerateReqInput, **kwargs: Any) -> None:
        """Remember what the front sent, to send it along should the request move."""
        if self.ares.is_void(recv_req.rid):
            return
        if self.migrations is not None and self._host.comes_from_the_dead(recv_req):
            self.ares.request_failed(recv_req.rid, "its prefill worker died")
            return
        self._was_busy = True
        self.ares.note_received(recv_req)
        super().handle_generate_request(recv_req, **kwargs)

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        """A request built for a migration goes to its migration, not to the queue."""
        if self.enable_priority_scheduling:
            # Those taken below never come to where upstream does this, and it sorts them, too.
            self._set_or_validate_priority(req)
        if is_retracted:
            self.ares.retracted += 1
        elif self.migrations is not None and self.migrations.take_built(req, self.intake.now):
            return
        elif self.resumed is not None and self.resumed.take_built(req):
            req.time_stats.set_decode_prealloc_queue_entry_time()
            return
        super()._add_request_to_queue(req, is_retracted)

    def can_schedule_lora_req(self, req: Req, running_loras: set[str | None]) -> bool:
        """Upstream's; the adapters of requests on the move count as running, for they may be needed
        beside those that run."""
        running = running_loras | self.adapters_on_the_move()
        fits: bool = super().can_schedule_lora_req(req, running)
        return fits

    def abort_request(self, recv_req: AbortReq) -> None:
        """Abort wherever the request is, in a migration too."""
        if recv_req.rid:
            self.ares.note_aborted(recv_req.rid)
        if self.migrations is not None:
            self.migrations.on_abort(recv_req.rid or "", recv_req.abort_all, self.intake.now)
        super().abort_request(recv_req)

    def get_new_prebuilt_batch(self, running_batch: ScheduleBatch) -> ScheduleBatch | None:
        """Upstream's; the grammars of the batch have then seen all output. Should their requests
        stop and enter again, upstream is not to feed them the last token once more."""
        batch = super().get_new_prebuilt_batch(running_batch)
        for req in batch.reqs if batch is not None else ():
            note_fed(req, req.output_ids[-1])
        return batch

    def _get_new_prebuilt_batch(self, running_batch: ScheduleBatch) -> ScheduleBatch | None:
        """Upstream's batch of requests whose KV is here; the penalties of those that come with
        output restored. (Upstream starts the penalties of a retracted request anew.)"""
        batch = super()._get_new_prebuilt_batch(running_batch)
        if batch is not None:
            assert self.resumed is not None
            self.resumed.note_entering(batch.reqs)
            entering = self._host.entering_with_output(batch.reqs)
            if entering:
                seed_penalties(batch, entering, overlap=self.enable_overlap)
        return batch

    def is_movable(self, req: Req, recv_req: TokenizedGenerateReqInput) -> bool:
        """Whether a policy may plan to move the request."""
        return (
            self.migrations is not None
            and not self.migrations.is_moving(req.rid)
            and self._host.immovable(req, recv_req) is None
        )

    def remaining(self, req: Req) -> Remaining | None:
        """What the request is predicted to produce still, if anything predicts here."""
        predictions = self.predictions or self.emulated_predictions
        return predictions.remaining(req) if predictions is not None else None

    def queued_requests(self) -> list[Req]:
        """Requests here that are in no running batch."""
        queued = [*self.waiting_queue, *self.grammar_manager.grammar_queue]
        if self.disaggregation_mode is DisaggregationMode.DECODE:
            queue = self.disagg_decode_prealloc_queue
            queued += [d.req for d in queue.queue]
            queued += [d.req for d in self.disagg_decode_transfer_queue.queue]
            queued += queue.retracted_queue
            queued += queue.held_rebootstrap_reqs
            assert self.migrations is not None
            queued += self.migrations.stopped_requests()
        elif self.disaggregation_mode is DisaggregationMode.PREFILL:
            queued += self.disagg_prefill_bootstrap_queue.queue
            queued += self.disagg_prefill_inflight_queue
            if self.chunked_req is not None:
                queued.append(self.chunked_req)
        return queued

    def live_requests(self) -> list[Req]:
        """All requests this worker owns."""
        running = [r for r in self.running_batch.reqs if not r.finished()]
        if self.last_batch is not None:
            known = {id(r) for r in running}
            running += [r for r in self.last_batch.reqs if not r.finished() and id(r) not in known]
        return [*running, *self.queued_requests()]

    def inbound_migrations(self) -> list[TargetMigration]:
        """Migrations into this worker."""
        return list(self.migrations.inbound.values()) if self.migrations is not None else []

    def outbound_migrations(self) -> list[SourceMigration]:
        """Migrations out of this worker."""
        return list(self.migrations.outbound.values()) if self.migrations is not None else []

    def adapters_on_the_move(self) -> set[str | None]:
        """LoRA adapters (None: the model alone) of requests that may enter a batch here and are in
        no queue of upstream's: on their way in, or stopped on their way out."""
        if self.migrations is None:
            return set()
        stopped = {req.lora_id for req in self.migrations.stopped_requests()}
        return stopped | {m.lora_id for m in self.inbound_migrations()}

    # --- integrity --------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """When idle, every pool holds what it held at start (upstream checks KV tokens and
        request slots too; the metadata slots only here)."""
        start, here = self._pools_at_start, pool_counters(self, idle=True)
        if start is None:
            return
        expected = (
            start.kv_free + start.kv_cached,
            start.request_slots_free,
            start.metadata_slots_free,
        )
        found = (here.kv_free + here.kv_cached, here.request_slots_free, here.metadata_slots_free)
        if found != expected or here.kv_locked:
            logger.error(
                "integrity check failed on worker %d: (KV tokens, request slots, metadata slots) "
                "are %s, were %s at start; %d KV tokens of the prefix cache are locked",
                self.ares.worker_id,
                found,
                expected,
                here.kv_locked,
            )
