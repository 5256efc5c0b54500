"""A worker's side of the control plane: its mailbox, its reports, what it knows of its requests."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zmq

from sglang_ares.srt.disaggregation.checks import peers_fault
from sglang_ares.srt.managers.io_struct import (
    Decoder,
    FirstEstimates,
    Landed,
    LoadUpdate,
    Message,
    Peer,
    PoolCounters,
    PredictionReport,
    RequestFailed,
    WorkerInbound,
    WorkerReport,
    encode,
)
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.policy.prefill_time import PrefillTimeFit
from sglang_ares.srt.policy.step_time import StepTimeFit
from sglang_ares.srt.policy.types import DECODE, Remaining, RequestLoad, WorkerLoad
from sglang_ares.srt.security.bounds import MAX_LISTED, MAX_REASON_CHARS
from sglang_ares.srt.security.dropped import DroppedFrames

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.scheduler import AresScheduler
    from sglang_ares.srt.managers.worker_spec import WorkerSpec
    from sglang_ares.srt.security.sockets import LossWatch

logger = logging.getLogger(__name__)

CONTROLLER: Final = "controller"
# Ends of decode steps kept to count those within a pause; weight of the newest step in the mean.
_STEPS_REMEMBERED: Final = 256
_STEP_WEIGHT: Final = 0.1
# A load that is told before its time follows the last one after this share of the interval.
_AT_ONCE: Final = 0.1

# Rids remembered of requests that are gone.
_REMEMBERED: Final = 8192


@dataclass
class _Landing:
    """A moved request whose first token here is still to come."""

    req: Req
    migration_id: int
    stopped_at: float
    output_tokens: int


class WorkerAgent:
    """Talks to the controller and the peers. Only rank 0 of a worker has sockets; the other
    ranks are handed the same frames and say nothing."""

    def __init__(self, spec: WorkerSpec, *, speaks: bool) -> None:
        self.worker_id = spec.worker_id
        self.role = spec.role
        self.incarnation = spec.incarnation
        self.speaks = speaks
        self._interval_s = spec.report_interval_s
        self._tells_of_room = spec.tells_of_room
        self._decoder = Decoder(WorkerInbound)
        self.dropped = DroppedFrames(f"worker-{spec.worker_id}")
        self._mailbox: Mailbox | None = None
        self._away = spec.outputs_endpoint is not None
        if speaks:
            context = zmq.Context(1)
            # Kept: it stops when nobody refers to it any more.
            self._admission = spec.curve_keys and spec.curve_keys.admit(context)
            self._mailbox = Mailbox(
                context, spec.control_bind, keys=spec.curve_keys, dropped=self.dropped
            )
            self._mailbox.connect(CONTROLLER, spec.controller_endpoint, watch=self._away)
        # What the front sent for each live request, to send along when it moves.
        self.received: dict[str, TokenizedGenerateReqInput] = {}
        self._arrived_at: dict[str, float] = {}
        self._refused: list[str] = []
        self._landings: list[_Landing] = []
        self._last_report = float("-inf")
        self._decode_steps = 0
        self._decode_time_s = 0.0
        self._last_step_end: float | None = None
        # Seconds of a decode step, recent ones weighing more; 0 before the first.
        self.decode_step_s = 0.0
        self._step_ends: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._step_time = StepTimeFit(spec.laws.decode)
        self._prefill_time = PrefillTimeFit(spec.laws.prefill)
        self._last_prefill_end = float("-inf")
        # Output lengths of requests that came to their end here since the last report.
        self._ended_lengths: list[int] = []
        # Whether one has ended since the load was told last, and when that was.
        self._has_ended = False
        self._last_told = float("-inf")
        self._step_ms = 0.0
        self.retracted = 0
        # Attempts that were declared void, and requests whose client has left.
        self._void: OrderedDict[str, None] = OrderedDict()
        self._aborted: OrderedDict[str, None] = OrderedDict()

    # --- messages ---------------------------------------------------------------------------

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """The inbound socket, for pollers."""
        return self._mailbox.socket if self._mailbox is not None else None

    @property
    def lifelines(self) -> list[LossWatch]:
        """Connections to another host whose loss this worker must not survive."""
        if self._mailbox is None or not self._away:
            return []
        return [self._mailbox.watch_of(CONTROLLER)]

    def drain(self) -> list[bytes]:
        """Frames that have arrived (rank 0)."""
        return self._mailbox.drain() if self._mailbox is not None else []

    def decode(self, frame: bytes) -> Message | None:
        """A validated message, or None: a malformed frame is counted, logged and dropped."""
        try:
            message: Message = self._decoder.decode(frame)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            self.dropped.count(f"malformed: {error}")
            return None
        return message

    def connect(self, peers: list[Peer]) -> bool:
        """Make all workers reachable, this one included (a message to oneself is legal); false if
        the list cannot be true."""
        fault = peers_fault(peers, self.worker_id)
        try:
            if fault is None and self._mailbox is not None:
                for peer in peers:
                    self._mailbox.connect(str(peer.worker_id), peer.control_endpoint)
        except zmq.ZMQError as error:
            fault = f"an endpoint cannot be connected to: {error}"
        if fault is not None:
            self.dropped.count(f"ConnectPeers: {fault}")
        return fault is None

    def send(self, worker_id: int, message: Message) -> None:
        """Send to a peer; one that died is not there to be told."""
        if self._mailbox is None:
            return
        if self._mailbox.knows(str(worker_id)):
            self._mailbox.send(str(worker_id), encode(message))
        else:
            self.dropped.count(f"{type(message).__name__} for unknown worker {worker_id}")

    def report(self, message: Message) -> None:
        """Send to the controller."""
        if self._mailbox is not None:
            self._mailbox.send(CONTROLLER, encode(message))

    def disconnect(self, worker_id: int) -> None:
        """Forget a peer that died; what is sent to it from now on is dropped."""
        if self._mailbox is not None:
            self._mailbox.disconnect(str(worker_id))

    # --- requests ---------------------------------------------------------------------------

    def note_void(self, rid: str) -> None:
        """This attempt may not say anything any more, should it still come."""
        _remember(self._void, rid)

    def is_void(self, rid: str) -> bool:
        """Whether the attempt was declared void."""
        return rid in self._void

    def note_aborted(self, rid: str) -> None:
        """The client has left."""
        _remember(self._aborted, rid)

    def was_aborted(self, rid: str) -> bool:
        """Whether the client has left."""
        return rid in self._aborted

    def request_failed(self, rid: str, reason: str) -> None:
        """Ask the controller for a new attempt; this one is void."""
        self.note_void(rid)
        # A longer one may not be said, and nobody would know of the request.
        reason = reason[:MAX_REASON_CHARS]
        self.report(RequestFailed(rid=rid, worker_id=self.worker_id, reason=reason))

    def note_refused(self, rid: str) -> None:
        """The request was answered without having begun; the controller is told that it ended."""
        self._refused.append(rid)

    def note_received(self, recv_req: TokenizedGenerateReqInput) -> None:
        """A request came in, from the front or from a peer."""
        self.received[recv_req.rid] = recv_req
        self._arrived_at.setdefault(recv_req.rid, time.monotonic())

    def forget_moved(self, rid: str) -> None:
        """The request lives elsewhere now; it must not be reported as finished here."""
        self.received.pop(rid, None)
        self._arrived_at.pop(rid, None)

    def note_landed(self, req: Req, migration_id: int, stopped_at: float) -> None:
        """A request was taken over; report its first token here."""
        self._arrived_at[req.rid] = time.monotonic()
        self._landings.append(_Landing(req, migration_id, stopped_at, len(req.output_ids)))

    def note_ended(self, output_tokens: int) -> None:
        """A request came to its end, with so much output; nobody aborted it."""
        if not self.speaks:
            return
        self._has_ended = self._tells_of_room
        if len(self._ended_lengths) < MAX_LISTED:
            self._ended_lengths.append(output_tokens)

    def after_decode_step(self, reqs: list[Req], now: float, continuous: bool) -> None:
        """Note the duration of a step over ``reqs``, and the first tokens of landed requests."""
        if continuous and self._last_step_end is not None:
            self._decode_steps += 1
            took = now - self._last_step_end
            if self.speaks:
                self._step_time.observe(len(reqs), sum(r.seqlen for r in reqs), 1e3 * took)
            self._decode_time_s += took
            weight = _STEP_WEIGHT if self.decode_step_s else 1.0
            self.decode_step_s += weight * (took - self.decode_step_s)
        self._last_step_end = now
        self._step_ends.append(time.time())
        if not self._landings:
            return
        waiting = []
        for landing in self._landings:
            if len(landing.req.output_ids) > landing.output_tokens:
                self._report_landed(landing)
            elif not landing.req.finished() and landing.req.rid in self.received:
                waiting.append(landing)
        self._landings = waiting

    def after_prefill(self, chunks: list[tuple[int, int]], launched: float, now: float) -> None:
        """A prefill batch has ended. It had the device from its launch on, or from the end of the
        one before."""
        if self.speaks:
            took = now - max(launched, self._last_prefill_end)
            self._prefill_time.observe(chunks, 1e3 * took)
        self._last_prefill_end = now

    def _report_landed(self, landing: _Landing) -> None:
        pause_s = time.time() - landing.stopped_at
        steps = sum(end > landing.stopped_at for end in self._step_ends)
        logger.info(
            "migration %d rid=%s landed on=%d pause_ms=%.1f steps=%d",
            landing.migration_id,
            landing.req.rid,
            self.worker_id,
            1e3 * pause_s,
            steps,
        )
        self.report(
            Landed(
                migration_id=landing.migration_id,
                rid=landing.req.rid,
                worker_id=self.worker_id,
                blackout_s=pause_s,
                steps=steps,
            )
        )

    # --- reports ----------------------------------------------------------------------------

    def report_first_estimates(self, estimates: list[tuple[str, Remaining]]) -> None:
        """Tell the controller what prefill says of requests whose decode worker has not begun."""
        self.report(FirstEstimates(worker_id=self.worker_id, remaining=dict(estimates)))

    def report_is_due(self, now: float) -> bool:
        """Whether the report interval is over."""
        return now - self._last_report >= self._interval_s

    def report_load(self, scheduler: AresScheduler, now: float, *, force: bool = False) -> None:
        """Tell the controller this worker's load, at most every report interval.

        ``now`` is the same on all ranks; those that say nothing only forget their ended requests.
        """
        if not force and not self.report_is_due(now):
            return
        self._last_report = now
        finished = self._forget_ended(scheduler)
        if not self.speaks:
            return
        step_ms = 1e3 * self._decode_time_s / self._decode_steps if self._decode_steps else 0.0
        self._decode_steps = 0
        self._decode_time_s = 0.0
        self._step_ms = step_ms
        self._note_told()
        self.report(
            WorkerReport(
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                load=self._load(scheduler, now, step_ms),
                finished=finished,
                ended_lengths=self._ended_lengths,
                prefill_law=self._prefill_law(),
                pools=pool_counters(scheduler, idle=scheduler.is_fully_idle()),
                migrations_in=len(scheduler.inbound_migrations()),
                migrations_out=len(scheduler.outbound_migrations()),
                retracted=self.retracted,
                decode_step_ms=step_ms,
                dropped_frames=self.dropped.total,
                late_steps=scheduler.emulated.late_steps if scheduler.emulated else 0,
                predictions=_prediction_report(scheduler),
            )
        )
        self._ended_lengths = []

    def tell_of_room(self, scheduler: AresScheduler) -> None:
        """If a request has ended, tell the load without waiting for the report's turn: others may
        wait for the memory. This rank's own affair: nobody is forgotten here."""
        now = time.monotonic()
        if not self._has_ended or now - self._last_told < _AT_ONCE * self._interval_s:
            return
        self._note_told()
        load = self._load(scheduler, now, self._step_ms)
        self.report(LoadUpdate(worker_id=self.worker_id, incarnation=self.incarnation, load=load))

    def _note_told(self) -> None:
        self._has_ended = False
        self._last_told = time.monotonic()

    def _prefill_law(self) -> tuple[float, float, float] | None:
        law = self._prefill_time.law()
        return (law.fixed_ms, law.per_token_ms, law.per_square_ms) if law is not None else None

    def report_all_ended(self, scheduler: AresScheduler, now: float) -> None:
        """Tell of every request that has left; the worker is idle, so that is all of them."""
        self.report_load(scheduler, now, force=True)
        while self.received:
            self.report_load(scheduler, now, force=True)

    def _forget_ended(self, scheduler: AresScheduler) -> list[str]:
        """Drop what was kept of requests that are not here any more; their rids."""
        live = {req.rid for req in scheduler.live_requests()}
        arriving = {m.record.rid for m in scheduler.inbound_migrations()}
        gone = (r for r in self.received if r not in live and r not in arriving)
        ended = list(islice(gone, MAX_LISTED))
        for rid in ended:
            del self.received[rid]
            self._arrived_at.pop(rid, None)
        refused, self._refused = self._refused, []
        return [*ended, *refused][:MAX_LISTED]

    def _load(self, scheduler: AresScheduler, now: float, step_ms: float) -> WorkerLoad:
        running = [r for r in scheduler.running_batch.reqs if not r.finished()]
        queued = scheduler.queued_requests()
        capacity = int(scheduler.max_total_num_tokens)
        allocator = scheduler.token_to_kv_pool_allocator
        held = capacity - allocator.available_size() - scheduler.tree_cache.evictable_size()
        return WorkerLoad(
            worker_id=self.worker_id,
            role=self.role,
            kv_tokens=max(0, int(held)),
            kv_capacity=capacity,
            running=len(running),
            queued=len(queued),
            queued_tokens=sum(r.seqlen for r in queued if not r.kv.holds_kv),
            decode_step_ms=step_ms,
            step=self._step_time.law(),
            requests=(
                *(self._request_load(scheduler, r, now, runs=True) for r in running[:MAX_LISTED]),
                *(
                    self._request_load(scheduler, r, now, runs=False)
                    for r in queued[: max(0, MAX_LISTED - len(running))]
                ),
            ),
        )

    def _request_load(
        self, scheduler: AresScheduler, req: Any, now: float, *, runs: bool
    ) -> RequestLoad:
        # `now` may be from before a request that came in during this iteration.
        age_s = max(0.0, now - self._arrived_at.get(req.rid, now))
        recv_req = self.received.get(req.rid)
        movable = (
            self.role == DECODE
            and runs
            and len(req.output_ids) > 0
            and recv_req is not None
            and scheduler.is_movable(req, recv_req)
        )
        return RequestLoad(
            rid=req.rid,
            tokens=req.seqlen,
            output_tokens=len(req.output_ids),
            age_s=age_s,
            since_move_s=age_s,
            movable=movable,
            remaining=scheduler.remaining(req),
        )


def _remember(rids: OrderedDict[str, None], rid: str) -> None:
    rids[rid] = None
    while len(rids) > _REMEMBERED:
        rids.popitem(last=False)


def _prediction_report(scheduler: AresScheduler) -> PredictionReport | None:
    """How the worker's predictions have turned out, if it makes any."""
    tracker = scheduler.predictions
    if tracker is None:
        return None
    return PredictionReport(errors=tracker.errors, not_finite=tracker.not_finite)


def pool_counters(scheduler: AresScheduler, *, idle: bool) -> PoolCounters:
    """Free slots and tokens of every pool a request draws from."""
    return PoolCounters(
        kv_free=int(scheduler.token_to_kv_pool_allocator.available_size()),
        kv_cached=int(scheduler.tree_cache.evictable_size()),
        kv_locked=int(scheduler.tree_cache.protected_size()),
        request_slots_free=int(scheduler.req_to_token_pool.available_size()),
        metadata_slots_free=int(scheduler.req_to_metadata_buffer_idx_allocator.available_size()),
        requests=len(scheduler.live_requests()),
        idle=idle,
    )
