"""The sending side of a migration: one small state machine per request on the move."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_ares.srt.disaggregation.checks import accept_fault
from sglang_ares.srt.disaggregation.kv_link import drained
from sglang_ares.srt.disaggregation.migration import (
    CANCELLED,
    COMPLETED,
    FAILED,
    REFUSED,
    Migration,
    MigrationLimits,
    SourceState,
)
from sglang_ares.srt.disaggregation.request_state import capture, pack_ids, spec_of
from sglang_ares.srt.managers.io_struct import (
    Accept,
    Cancel,
    ChunkSent,
    Commit,
    ForwardAbort,
    Offer,
)

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.disaggregation.budgets import BandwidthBudget
    from sglang_ares.srt.disaggregation.faults import FaultInjector
    from sglang_ares.srt.disaggregation.hosts import SourceHost


class SourceMigration:
    """Moves one running request to another worker.

    ``poll`` of the underlying sender is passed in by the owner (see ``pollers``), because all
    tensor-parallel ranks must see the same state in the same step.
    """

    def __init__(
        self,
        host: SourceHost,
        limits: MigrationLimits,
        bandwidth: BandwidthBudget,
        migration_id: int,
        target: int,
        req: Req,
        recv_req: TokenizedGenerateReqInput,
        headroom: int,
        now: float,
    ) -> None:
        self._host = host
        self._limits = limits
        self._bandwidth = bandwidth
        self.req = req
        # The same on every rank, different for every migration of every worker.
        room = random.Random(f"{host.worker_id}-{migration_id}").getrandbits(62)
        self.record = Migration(
            migration_id=migration_id,
            rid=req.rid,
            source=host.worker_id,
            target=target,
            room=room,
            started_at=now,
            state=SourceState.OFFERED,
            deadline=now + limits.timeout_s,
            tokens=req.kv.kv_committed_len,
        )
        self._sender = host.link.open_sender(room)
        self._progress = host.link.copied(room)
        self._metadata_slot: int | None = None
        self._accepted = False
        # The target holds everything before: found there, or sent.
        self._sent_tokens = 0
        self._prefix_tokens = 0
        self._chunk_in_flight = False
        self._reserved_tokens = req.kv.kv_committed_len + headroom
        self._stopped = False
        self._stopped_at: float | None = None
        self._cancel_sent = False
        self._aborted_by_client = False
        self._sender_closed = False
        self._chunks = 0
        self.faults: FaultInjector | None = None
        self.kv_bytes = 0
        host.send(
            target,
            Offer(
                migration_id=migration_id,
                source=host.worker_id,
                room=room,
                tokens=req.kv.kv_committed_len,
                headroom=headroom,
                spec=spec_of(recv_req, req.sampling_params.max_new_tokens),
                output_ids=pack_ids(req.output_ids),
            ),
        )

    # --- what the owner polls ---------------------------------------------------------------

    @property
    def pollers(self) -> tuple[Any, Any]:
        """The sender, and the progress of its chunks."""
        return self._sender, self._progress

    @property
    def closed(self) -> bool:
        """Final, and the sender's buffers are free again."""
        return self.record.final and self._sender_closed

    @property
    def tokens_to_send(self) -> int:
        """At most this much is still to be sent."""
        return 0 if self.record.final else self._reserved_tokens - self._sent_tokens

    @property
    def holds_request(self) -> bool:
        """Whether the request is stopped here and in nobody else's hands."""
        return self._stopped and not self.record.final

    # --- messages ---------------------------------------------------------------------------

    def on_accept(self, accept: Accept) -> None:
        """The target has reserved memory and holds a prefix of the tokens already."""
        fault = accept_fault(accept, self.record.tokens, self._host.link.page_size)
        if self.record.state is SourceState.CANCELLING:
            return
        if self.record.state is not SourceState.OFFERED or self._accepted:
            fault = f"it is {self.record.state.value} already"
        if fault is not None:
            self._host.dropped.count(f"Accept of migration {accept.migration_id}: {fault}")
            return
        self._accepted = True
        self._sent_tokens = self._prefix_tokens = accept.prefix_tokens
        self.record.tokens_saved = accept.prefix_tokens

    def on_refuse(self, reason: str, now: float) -> None:
        """The target does not take it; the request never stopped."""
        if self.record.state is SourceState.OFFERED and not self._accepted:
            self._finish(SourceState.ENDED, REFUSED, reason, now)

    def on_committed(self, now: float) -> None:
        """The target owns the request: let go of it."""
        if self.record.state in (SourceState.HANDOVER, SourceState.RECALLING):
            self._host.release(self.req)
            self._finish(SourceState.DONE, COMPLETED, "", now)

    def on_cancelled(self, now: float) -> None:
        """The target has let go: the request goes on here."""
        # Before it is asked to, the target has not let go, whoever says so.
        if self.record.state is SourceState.RECALLING and self._cancel_sent:
            self._resume()
            self._finish(SourceState.ENDED, FAILED, self.record.reason, now)
            if self._aborted_by_client:
                self._host.abort_here(self.req.rid)

    def on_transfer_failed(self, reason: str, now: float) -> None:
        """The KV did not arrive."""
        self._give_up(FAILED, reason, now)

    def on_target_died(self, now: float) -> None:
        """The target is gone. Before ``Commit`` the request simply goes on here. After it, the
        target may have emitted tokens that only the token ledger knows: the request is recovered
        from there, not from the state here."""
        state = self.record.state
        if self.record.final:
            return
        self._sender.abort()
        if state in (SourceState.HANDOVER, SourceState.RECALLING):
            self._host.lost(self.req, "the target of its migration died")
            self._finish_with_dead_target(now)
        else:
            self._resume()
            self._finish_with_dead_target(now)

    def _finish_with_dead_target(self, now: float) -> None:
        if self.record.state not in (SourceState.CANCELLING, SourceState.RECALLING):
            handed_over = self.record.state is SourceState.HANDOVER
            self._enter(SourceState.RECALLING if handed_over else SourceState.CANCELLING, now)
        self._finish(SourceState.ENDED, FAILED, self.record.reason or "target died", now)

    def on_fault(self, reason: str, now: float) -> None:
        """Something here went wrong."""
        self._give_up(FAILED, reason, now)

    def on_abort(self, now: float) -> None:
        """The client aborted. A request that still runs here ends by itself; one that stopped is
        resumed so that upstream finds it; one already handed over is aborted over there."""
        if self.record.state is SourceState.STOPPING:
            self._give_up(CANCELLED, "aborted", now)
        elif self.record.state in (SourceState.HANDOVER, SourceState.RECALLING):
            self._aborted_by_client = True
            self._host.send(
                self.record.target,
                ForwardAbort(migration_id=self.record.migration_id, source=self._host.worker_id),
            )

    # --- time -------------------------------------------------------------------------------

    def tick(self, now: float, sender_poll: int, progress_poll: int) -> None:
        """Advance as far as possible; never waits."""
        state = self.record.state
        if self.record.final:
            self._close_sender(sender_poll)
            return
        if state in (SourceState.OFFERED, SourceState.COPYING) and not self._host.is_running(
            self.req
        ):
            self._give_up(CANCELLED, "no longer running", now)
        elif sender_poll == KVPoll.Failed and state not in (
            SourceState.CANCELLING,
            SourceState.RECALLING,
        ):
            self._give_up(FAILED, "KV transfer failed at the source", now)
        elif now > self.record.deadline and state not in (
            SourceState.CANCELLING,
            SourceState.RECALLING,
        ):
            self._give_up(FAILED, f"timeout in {state.value}", now)
        elif (
            state in (SourceState.OFFERED, SourceState.COPYING)
            and self.req.kv.kv_committed_len > self._reserved_tokens
        ):
            self._give_up(CANCELLED, "outgrew the offer", now)
        elif state is SourceState.OFFERED:
            if self._accepted and sender_poll == KVPoll.WaitingForInput:
                self._begin_copy(now)
        elif state is SourceState.COPYING:
            if not self._chunk_in_flight or progress_poll == KVPoll.Success:
                self._copy_on(now)
            elif self.req.kv.kv_committed_len >= self._reserved_tokens - 2:
                self._out_of_room(self.req.kv.kv_committed_len - self._sent_tokens, now)
        if self.record.state is SourceState.STOPPING:
            self._hand_over_when_stopped(now, progress_poll)
        # Only with a poll from after the abort: a chunk may be taken up until then.
        if state in (SourceState.CANCELLING, SourceState.RECALLING):
            self._cancel_when_drained(now, progress_poll)

    # --- steps ------------------------------------------------------------------------------

    def _begin_copy(self, now: float) -> None:
        slot = self._host.alloc_metadata()
        if slot is None:
            self._give_up(FAILED, "no metadata slot", now)
            return
        self._metadata_slot = slot
        self._host.write_room(slot, self.record.room)
        # The total is a bound until the request stops; `init` is called again then.
        self._sender.init(self._host.link.page_count(self._reserved_tokens) + 1, slot)
        self._enter(SourceState.COPYING, now)
        self._copy_on(now)

    def _copy_on(self, now: float) -> None:
        """Send the next chunk of the pages completed so far, or stop when little is left.

        A chunk that has to wait for the bandwidth budget is tried again at the next tick."""
        page = self._host.link.page_size
        written = self.req.kv.kv_committed_len
        complete = (written - 1) // page * page
        left = written - self._sent_tokens
        room_to_grow = self._reserved_tokens - 2 - written
        self._chunk_in_flight = False
        if not self._limits.live_copy or left <= max(self._limits.final_tokens, page):
            self._stop(now)
        elif room_to_grow <= 0:
            self._out_of_room(left, now)
        elif complete > self._sent_tokens and self._bandwidth.ready(now):
            chunk = max(self._limits.chunk_tokens // page, 1) * page
            self._send_pages(min(complete, self._sent_tokens + chunk), now)
            self._chunk_in_flight = True
            self.record.extend_deadline(now, self._limits.timeout_s)
            self._host.send(
                self.record.target,
                ChunkSent(migration_id=self.record.migration_id, source=self._host.worker_id),
            )

    def _out_of_room(self, left: int, now: float) -> None:
        """The request has outgrown its reservation before the copy caught up with it: stop it if
        the rest goes over in one chunk, or else the pause would be longer than moving is worth."""
        if left <= max(self._limits.chunk_tokens, self._limits.headroom_tokens):
            self._stop(now)
        else:
            self._give_up(CANCELLED, "outgrew the reservation", now)

    def _stop(self, now: float) -> None:
        if not self._host.can_stop(self.req):
            # Resumed before that step's result is processed, it would run the step twice.
            self._give_up(CANCELLED, "engine paused", now)
            return
        self._host.stop(self.req)
        self._stopped = True
        self._enter(SourceState.STOPPING, now)
        if self._chunk_in_flight:
            longest = min(self._limits.stopped_s, self._limits.timeout_s)
            self.record.extend_deadline(now, longest)

    def _hand_over_when_stopped(self, now: float, progress_poll: int) -> None:
        if not self._host.has_stopped(self.req):
            return
        if self._stopped_at is None:
            self._stopped_at = self._host.wall_clock()
        if self.req.finished():
            self._give_up(CANCELLED, "finished", now)
            return
        if self.req.to_finish is not None:
            self._give_up(CANCELLED, "aborted", now)
            return
        if self._chunk_in_flight and progress_poll != KVPoll.Success:
            return
        written = self.req.kv.kv_committed_len
        first_page = self._sender.curr_idx
        last_pages = self._host.link.page_count(written - self._sent_tokens)
        assert self._metadata_slot is not None
        self._sender.init(first_page + last_pages, self._metadata_slot)
        self._send_pages(written, now)
        self.record.tokens = written
        self._host.send(
            self.record.target,
            Commit(
                migration_id=self.record.migration_id,
                source=self._host.worker_id,
                tokens=written,
                state=capture(self.req),
                stopped_at=self._stopped_at,
                kv_checksum=(
                    self._host.link.checksum(self.req, self._prefix_tokens, written)
                    if self._limits.kv_checksum
                    else None
                ),
            ),
        )
        self._enter(SourceState.HANDOVER, now)

    def _send_pages(self, end: int, now: float) -> None:
        self._chunks += 1
        point = f"source:chunk:{self._chunks}"
        if self.faults is not None and self.faults.reached(point, self.record):
            self._sender.abort()
            return
        pages = self._host.link.pages(self.req, self._sent_tokens, end)
        self._sender.send(pages, None, num_kv_tokens=end - self._sent_tokens)
        self._progress.chunk_sent()
        self._bandwidth.spend(len(pages), now)
        self.record.tokens_sent += end - self._sent_tokens
        self._sent_tokens = end

    # --- endings ----------------------------------------------------------------------------

    def _give_up(self, outcome: str, reason: str, now: float) -> None:
        """Stop copying. Before ``Commit`` the request goes on here at once; after it, only once
        the target has let go."""
        if self.record.final or self.record.state in (
            SourceState.CANCELLING,
            SourceState.RECALLING,
        ):
            return
        self.record.outcome = outcome
        self.record.reason = reason
        self._sender.abort()
        if self.record.state is SourceState.HANDOVER:
            self._enter(SourceState.RECALLING, now)
        else:
            self._resume()
            self._enter(SourceState.CANCELLING, now)

    def _cancel_when_drained(self, now: float, progress_poll: int) -> None:
        if self._cancel_sent or not drained(progress_poll):
            return
        self._cancel_sent = True
        self._host.send(
            self.record.target,
            Cancel(
                migration_id=self.record.migration_id,
                source=self._host.worker_id,
                reason=self.record.reason,
            ),
        )
        if self.record.state is SourceState.CANCELLING:
            self._finish(SourceState.ENDED, self.record.outcome, self.record.reason, now)

    def _resume(self) -> None:
        if self._stopped:
            self._stopped = False
            if not self.req.finished():
                self._host.resume(self.req)

    def _finish(self, state: SourceState, outcome: str, reason: str, now: float) -> None:
        self.kv_bytes = self._host.link.bytes_of(self._sender)
        if outcome != COMPLETED:
            self.record.tokens_saved = 0
        self.record.outcome = outcome
        self.record.reason = reason
        self._enter(state, now)

    def _close_sender(self, sender_poll: int) -> None:
        """Free the sender once upstream's transfer thread is through with it."""
        if self._sender_closed:
            return
        never_used = self._metadata_slot is None
        if never_used or sender_poll in (KVPoll.Success, KVPoll.Failed):
            self._sender.clear()
            self._progress.close()
            if self._metadata_slot is not None:
                self._host.free_metadata(self._metadata_slot)
            self._sender_closed = True

    def _enter(self, state: SourceState, now: float) -> None:
        self.record.enter(state, now, self._limits.timeout_s)
