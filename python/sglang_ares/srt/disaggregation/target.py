"""The receiving side of a migration: memory first, then KV, then ownership."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_ares.srt.disaggregation.checks import commit_fault, offer_fault
from sglang_ares.srt.disaggregation.kv_link import Arrival
from sglang_ares.srt.disaggregation.migration import (
    CANCELLED,
    COMPLETED,
    FAILED,
    REFUSED,
    Migration,
    MigrationLimits,
    TargetState,
)
from sglang_ares.srt.disaggregation.request_state import replay, restore, unpack_ids
from sglang_ares.srt.managers.io_struct import (
    Accept,
    Cancelled,
    Commit,
    Committed,
    Offer,
    Peer,
    Refuse,
    TransferFailed,
)
from sglang_ares.srt.security.bounds import MAX_REASON_CHARS

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.disaggregation.budgets import InboundMemory
    from sglang_ares.srt.disaggregation.hosts import TargetHost


class TargetMigration:
    """Takes one request over from another worker."""

    def __init__(
        self,
        host: TargetHost,
        limits: MigrationLimits,
        memory: InboundMemory,
        offer: Offer,
        source: Peer,
        now: float,
    ) -> None:
        self._host = host
        self._limits = limits
        self._memory = memory
        self._offer = offer
        self._source = source
        self.record = Migration(
            migration_id=offer.migration_id,
            rid=offer.spec.rid,
            source=offer.source,
            target=host.worker_id,
            room=offer.room,
            started_at=now,
            state=TargetState.BUILDING,
            deadline=now + limits.timeout_s,
            tokens=offer.tokens,
        )
        self._req: Req | None = None
        self._receiver: Any = None
        self._arrival: Arrival | None = None
        self._metadata_slot: int | None = None
        self._prefix_tokens = 0
        # Output tokens that the request's grammar has seen.
        self._replayed = 0
        self._commit: Commit | None = None
        self._kv_complete = False
        self._aborted_by_client = False

    def start(self, now: float) -> None:
        """Refuse, or build the request."""
        fault = offer_fault(self._offer, self._host.facts)
        if fault is not None:
            self._host.dropped.count(f"Offer of migration {self.record.migration_id}: {fault}")
            self._refuse(f"invalid offer: {fault}"[:MAX_REASON_CHARS], now)
            return
        reason = self._host.refusal(self._offer)
        if reason is not None:
            self._refuse(reason, now)
        else:
            self._host.build(self._offer, self._source)

    @property
    def lora_id(self) -> str | None:
        """The LoRA adapter of the request, if it has one."""
        return self._offer.spec.lora_id

    @property
    def poller(self) -> Any:
        """What tells of the KV's arrival, once the transfer is open."""
        return self._arrival

    # --- messages ---------------------------------------------------------------------------

    def on_built(self, req: Req, now: float) -> None:
        """The request exists: reserve memory and open the transfer, or refuse."""
        if self.record.state is not TargetState.BUILDING:
            return
        if req.finished() or req.to_finish is not None:
            self._refuse("the request did not build", now)
            return
        slot = self._host.alloc_metadata()
        if slot is None:
            self._refuse("no metadata slot", now)
            return
        self._metadata_slot = slot
        prefix = self._host.lock_prefix(req, self._offer)
        link = self._host.link
        wanted = self._offer.tokens + self._offer.headroom - prefix
        reserved = link.page_count(wanted) * link.page_size
        reason = None
        if not self._memory.admits(reserved):
            reason = "memory share of inbound migrations used up"
        elif not self._host.reserve(req, self._offer):
            reason = "no KV memory"
        if reason is not None:
            self._host.unlock_prefix(req)
            self._free()
            self._refuse(reason, now)
            return
        self._memory.hold(self.record.migration_id, reserved)
        self._req = req
        self._prefix_tokens = self.record.tokens_saved = prefix
        self._receiver = self._host.link.open_receiver(
            self._source.bootstrap_host, self._source.bootstrap_port, self.record.room
        )
        self._arrival = Arrival(self._receiver, self.record.room, self._arrived_room)
        self._enter(TargetState.RESERVED, now)

    def on_chunk_sent(self, now: float) -> None:
        """The copy goes on."""
        if self.record.state is TargetState.RECEIVING and self._commit is None:
            self.record.extend_deadline(now, self._limits.timeout_s)

    def on_commit(self, commit: Commit, now: float) -> None:
        """The source has stopped; take over when the KV is complete too."""
        fault = commit_fault(commit, self._offer, self._host.facts)
        if self.record.state is TargetState.ABORTING:
            return
        expected = self.record.state is TargetState.RECEIVING and self._commit is None
        if expected and fault is None:
            self._commit = commit
            self.record.extend_deadline(now, self._limits.timeout_s)
            self._take_over_when_complete(now)
            return
        fault = fault or f"it is {self.record.state.value}, or was sent before"
        self._host.dropped.count(f"Commit of migration {self.record.migration_id}: {fault}")
        if expected:
            self._fail(f"invalid state: {fault}"[:MAX_REASON_CHARS], now)

    def on_forward_abort(self) -> None:
        """The client aborted after ``Commit``; applied at take-over."""
        self._aborted_by_client = True

    def on_cancel(self, reason: str, now: float) -> None:
        """The source goes on alone, and nothing of it is in flight any more."""
        if self.record.state is TargetState.COMMITTED:
            # Too late: the request is owned here. Say so again; the source then lets go.
            self._send_committed()
            return
        if not self.record.final:
            self._release(CANCELLED, reason, now)
        self._host.send(
            self.record.source,
            Cancelled(migration_id=self.record.migration_id, worker_id=self._host.worker_id),
        )

    def on_source_died(self, now: float) -> None:
        """The source is gone, and with it whatever wrote into the memory reserved here."""
        if not self.record.final:
            self._release(FAILED, "source died", now)

    # --- time -------------------------------------------------------------------------------

    def tick(self, now: float, receiver_poll: int | None) -> None:
        """Advance as far as possible; never waits."""
        state = self.record.state
        if state not in (TargetState.BUILDING, TargetState.RESERVED, TargetState.RECEIVING):
            return
        if receiver_poll == KVPoll.Failed:
            self._fail(self._why_failed(), now)
        elif now > self.record.deadline:
            if state is TargetState.BUILDING:
                self._refuse("timeout in BUILDING", now)
            else:
                self._fail(f"timeout in {state.value}", now)
        elif state is TargetState.RESERVED and receiver_poll == KVPoll.WaitingForInput:
            self._open_for_kv(now)
        elif state is TargetState.RECEIVING and receiver_poll == KVPoll.Success:
            self._kv_complete = True
            self._take_over_when_complete(now)

    # --- steps ------------------------------------------------------------------------------

    def _open_for_kv(self, now: float) -> None:
        assert self._req is not None
        # Now, while the source decodes on, rather than in the pause.
        output = unpack_ids(self._offer.output_ids)
        replay(self._req, output)
        self._replayed = len(output)
        reserved = self._offer.tokens + self._offer.headroom
        self._receiver.send_metadata(
            self._host.link.pages(self._req, self._prefix_tokens, reserved),
            self._metadata_slot,
            [],
            decode_prefix_len=self._prefix_tokens,
        )
        self._host.send(
            self.record.source,
            Accept(
                migration_id=self.record.migration_id,
                worker_id=self._host.worker_id,
                prefix_tokens=self._prefix_tokens,
            ),
        )
        self._enter(TargetState.RECEIVING, now)

    def _take_over_when_complete(self, now: float) -> None:
        if self._commit is None or not self._kv_complete:
            return
        assert self._req is not None
        if not self._kv_is_as_sent():
            self._fail("checksum mismatch", now)
            return
        try:
            restore(self._req, self._commit.state, self._replayed)
        except Exception as error:
            # A grammar that does not accept the output; the source takes the request back.
            self._host.dropped.count("Commit: the state cannot be restored", error=error)
            self._fail("invalid state: it cannot be restored", now)
            return
        self._host.trim(self._req, self._commit.tokens)
        self.record.tokens = self._commit.tokens
        self._close_receiver()
        self.record.outcome = COMPLETED
        self._enter(TargetState.COMMITTED, now)
        self._send_committed()
        self._host.adopt(
            self._req,
            self.record.migration_id,
            self._commit.stopped_at,
            self._aborted_by_client,
        )

    def _kv_is_as_sent(self) -> bool:
        assert self._commit is not None and self._req is not None
        sent = self._commit.kv_checksum
        if sent is None:
            return True
        here = self._host.link.checksum(self._req, self._prefix_tokens, self._commit.tokens)
        return here == sent

    # --- endings ----------------------------------------------------------------------------

    def on_fault(self, reason: str, now: float) -> None:
        """Something here went wrong: refuse as long as no KV can be on its way, else fail."""
        if self.record.state is TargetState.BUILDING:
            self._free()
            self._refuse(reason, now)
        elif self.record.state in (TargetState.RESERVED, TargetState.RECEIVING):
            self._fail(reason, now)

    def _refuse(self, reason: str, now: float) -> None:
        self.record.outcome = REFUSED
        self.record.reason = reason
        self._enter(TargetState.RELEASED, now)
        self._host.send(
            self.record.source,
            Refuse(
                migration_id=self.record.migration_id,
                worker_id=self._host.worker_id,
                reason=reason,
            ),
        )

    def _fail(self, reason: str, now: float) -> None:
        """Tell the source; the memory stays reserved until it says that no byte is in flight."""
        self.record.reason = reason
        self._enter(TargetState.ABORTING, now)
        self._host.send(
            self.record.source,
            TransferFailed(
                migration_id=self.record.migration_id,
                worker_id=self._host.worker_id,
                reason=reason,
            ),
        )

    def _arrived_room(self) -> int:
        return self._host.room_in(self._metadata_slot) if self._metadata_slot is not None else 0

    def _why_failed(self) -> str:
        arrived = self._arrived_room()
        if arrived not in (0, self.record.room):
            return f"metadata of room {arrived} arrived, not of {self.record.room}"
        return "KV transfer failed at the target"

    def _release(self, outcome: str, reason: str, now: float) -> None:
        self._free()
        self.record.outcome = FAILED if self.record.state is TargetState.ABORTING else outcome
        self.record.reason = self.record.reason or reason
        self._enter(TargetState.RELEASED, now)

    def _free(self) -> None:
        if self._receiver is not None:
            self._receiver.abort()
        self._close_receiver()
        if self._req is not None:
            self._host.unreserve(self._req)

    def _close_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.clear()
            self._receiver = self._arrival = None
        if self._metadata_slot is not None:
            self._host.free_metadata(self._metadata_slot)
            self._metadata_slot = None

    def _send_committed(self) -> None:
        self._host.send(
            self.record.source,
            Committed(migration_id=self.record.migration_id, worker_id=self._host.worker_id),
        )

    def _enter(self, state: TargetState, now: float) -> None:
        self.record.enter(state, now, self._limits.timeout_s)
        if self.record.final:
            self._memory.release(self.record.migration_id)
