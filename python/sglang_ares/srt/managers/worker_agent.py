"""A worker's side of the control plane: its mailbox, its reports, what it knows of its requests."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
import zmq

from sglang_ares.srt.disaggregation.checks import peers_fault
from sglang_ares.srt.managers.io_struct import (
    Decoder,
    Landed,
    Message,
    Peer,
    PoolCounters,
    WorkerInbound,
    WorkerReport,
    encode,
)
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.policy.types import DECODE, RequestLoad, WorkerLoad
from sglang_ares.srt.security.bounds import MAX_LISTED, MAX_RID_CHARS
from sglang_ares.srt.security.dropped import DroppedFrames

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.scheduler import AresScheduler
    from sglang_ares.srt.managers.worker_spec import WorkerSpec

logger = logging.getLogger(__name__)

CONTROLLER: Final = "controller"


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
        self._interval_s = spec.report_interval_s
        self._decoder = Decoder(WorkerInbound)
        self.dropped = DroppedFrames(f"worker-{spec.worker_id}")
        self._mailbox: Mailbox | None = None
        if speaks:
            context = zmq.Context(1)
            # Kept: it stops when nobody refers to it any more.
            self._admission = spec.curve_keys and spec.curve_keys.admit(context)
            self._mailbox = Mailbox(
                context, spec.control_bind, keys=spec.curve_keys, dropped=self.dropped
            )
            self._mailbox.connect(CONTROLLER, spec.controller_endpoint)
        # What the front sent for each live request, to send along when it moves.
        self.received: dict[str, TokenizedGenerateReqInput] = {}
        self._arrived_at: dict[str, float] = {}
        self._landings: list[_Landing] = []
        self._last_report = float("-inf")
        self._decode_steps = 0
        self._decode_time_s = 0.0
        self._last_step_end: float | None = None
        self.retracted = 0

    # --- messages ---------------------------------------------------------------------------

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """The inbound socket, for pollers."""
        return self._mailbox.socket if self._mailbox is not None else None

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
        fault = peers_fault(peers, self.worker_id, self.role)
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
        """Send to a peer."""
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

    # --- requests ---------------------------------------------------------------------------

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

    def after_decode_step(self, now: float, continuous: bool) -> None:
        """Note the step's duration, and the first tokens of landed requests."""
        if continuous and self._last_step_end is not None:
            self._decode_steps += 1
            self._decode_time_s += now - self._last_step_end
        self._last_step_end = now
        if not self._landings:
            return
        waiting = []
        for landing in self._landings:
            if len(landing.req.output_ids) > landing.output_tokens:
                self.report(
                    Landed(
                        migration_id=landing.migration_id,
                        rid=landing.req.rid,
                        worker_id=self.worker_id,
                        blackout_s=time.time() - landing.stopped_at,
                    )
                )
            elif not landing.req.finished() and landing.req.rid in self.received:
                waiting.append(landing)
        self._landings = waiting

    # --- reports ----------------------------------------------------------------------------

    def report_load(self, scheduler: AresScheduler, now: float, *, force: bool = False) -> None:
        """Tell the controller this worker's load, at most every report interval."""
        if self._mailbox is None or (not force and now - self._last_report < self._interval_s):
            return
        self._last_report = now
        live = {req.rid for req in scheduler.live_requests()}
        arriving = {m.record.rid for m in scheduler.inbound_migrations()}
        ended = (r for r in self.received if r not in live and r not in arriving)
        finished = list(islice(ended, MAX_LISTED))
        for rid in finished:
            del self.received[rid]
            self._arrived_at.pop(rid, None)
        step_ms = 1e3 * self._decode_time_s / self._decode_steps if self._decode_steps else 0.0
        self._decode_steps = 0
        self._decode_time_s = 0.0
        self.report(
            WorkerReport(
                worker_id=self.worker_id,
                load=self._load(scheduler, now),
                finished=[rid for rid in finished if len(rid) <= MAX_RID_CHARS],
                pools=pool_counters(scheduler, idle=scheduler.is_fully_idle()),
                migrations_in=len(scheduler.inbound_migrations()),
                migrations_out=len(scheduler.outbound_migrations()),
                retracted=self.retracted,
                decode_step_ms=step_ms,
                dropped_frames=self.dropped.total,
            )
        )

    def _load(self, scheduler: AresScheduler, now: float) -> WorkerLoad:
        running = [r for r in scheduler.running_batch.reqs if not r.finished()]
        queued = scheduler.queued_requests()
        listed = [r for r in (*running, *queued) if len(r.rid) <= MAX_RID_CHARS]
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
            queued_tokens=sum(len(r.origin_input_ids) for r in queued if not r.kv.holds_kv),
            requests=tuple(self._request_load(scheduler, r, now) for r in listed[:MAX_LISTED]),
        )

    def _request_load(self, scheduler: AresScheduler, req: Any, now: float) -> RequestLoad:
        # `now` may be from before a request that came in during this iteration.
        age_s = max(0.0, now - self._arrived_at.get(req.rid, now))
        recv_req = self.received.get(req.rid)
        movable = (
            self.role == DECODE
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
        )


def pool_counters(scheduler: AresScheduler, *, idle: bool) -> PoolCounters:
    """Free slots and tokens of every pool a request draws from."""
    return PoolCounters(
        kv_free=int(scheduler.token_to_kv_pool_allocator.available_size()),
        kv_cached=int(scheduler.tree_cache.evictable_size()),
        request_slots_free=int(scheduler.req_to_token_pool.available_size()),
        metadata_slots_free=int(scheduler.req_to_metadata_buffer_idx_allocator.available_size()),
        requests=len(scheduler.live_requests()),
        idle=idle,
    )
