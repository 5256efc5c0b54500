"""All migrations of one worker, in both directions: routing of messages, polling, reports."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from sglang_ares.srt.disaggregation.budgets import BandwidthBudget, InboundMemory
from sglang_ares.srt.disaggregation.faults import FaultInjector
from sglang_ares.srt.disaggregation.migration import (
    REFUSED,
    Migration,
    MigrationLimits,
    TargetState,
)
from sglang_ares.srt.disaggregation.rank_agreement import TransitionDigest
from sglang_ares.srt.disaggregation.source import SourceMigration
from sglang_ares.srt.disaggregation.target import TargetMigration
from sglang_ares.srt.managers.io_struct import (
    Accept,
    Adopted,
    Cancel,
    Cancelled,
    ChunkSent,
    Commit,
    Committed,
    ForwardAbort,
    Message,
    MigrationResult,
    Offer,
    Peer,
    Refuse,
    StartMigration,
    TransferFailed,
)
from sglang_ares.srt.security.bounds import MAX_HEADROOM

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.disaggregation.hosts import MigrationHost

logger = logging.getLogger(__name__)

# Committed migrations remembered, to answer a source that asks again.
_REMEMBERED = 4096


class MigrationManager:
    """Owns every :class:`SourceMigration` and :class:`TargetMigration` of a worker."""

    def __init__(
        self,
        host: MigrationHost,
        limits: MigrationLimits,
        faults: FaultInjector | None = None,
    ) -> None:
        self._host = host
        self._faults = faults
        # Messages to migrations that an injected fault holds.
        self._postponed: list[Message] = []
        self._limits = limits
        pages_per_s = 1e6 * limits.bandwidth_mb_s / host.link.page_bytes
        self._bandwidth = BandwidthBudget(pages_per_s)
        self._memory = InboundMemory(int(limits.memory_share * host.kv_capacity))
        self._peers: dict[int, Peer] = {}
        self.outbound: dict[int, SourceMigration] = {}
        self.inbound: dict[int, TargetMigration] = {}
        self._building: dict[int, TargetMigration] = {}
        # Migration id -> the request and where it came from.
        self._committed: OrderedDict[int, tuple[str, int]] = OrderedDict()
        self.digest = TransitionDigest()

    # --- what the scheduler asks ------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether any memory or buffer is held for a migration."""
        return bool(self.outbound or self.inbound)

    @property
    def reserved_inbound(self) -> int:
        """KV tokens that inbound migrations hold reserved."""
        return self._memory.held_tokens

    def is_moving(self, rid: str) -> bool:
        """Whether the request is on its way out."""
        return any(m.record.rid == rid and not m.record.final for m in self.outbound.values())

    def stopped_requests(self) -> list[Req]:
        """Requests that are in no queue of the scheduler because they are being handed over."""
        return [m.req for m in self.outbound.values() if m.holds_request]

    def connect(self, peers: list[Peer]) -> None:
        """The cluster's ready workers. One that is missing may hang or be dying: it stays known
        until :meth:`forget_peer`, because its address is needed then."""
        self._peers.update((p.worker_id, p) for p in peers)

    def forget_peer(self, worker_id: int) -> Peer | None:
        """A worker that died; what it still has under way to here is dropped."""
        return self._peers.pop(worker_id, None)

    def on_peer_died(self, worker_id: int, now: float) -> None:
        """End every migration with a worker that is dead for certain."""
        for source in [m for m in self.outbound.values() if m.record.target == worker_id]:
            was_final = source.record.final
            source.on_target_died(now)
            if not was_final:
                self._report_if_final(source, now)
        for target in [m for m in self.inbound.values() if m.record.source == worker_id]:
            target.on_source_died(now)
            self._drop_if_final(target)

    def take_built(self, req: Req, now: float) -> bool:
        """Whether ``req`` was built for a migration; it is then taken over here."""
        migration = self._building.pop(req.bootstrap_room, None)
        if migration is None:
            return False
        try:
            migration.on_built(req, now)
        except Exception as error:
            self._host.dropped.count(f"{req.rid} could not be taken in", error=error)
            migration.on_fault("internal error at the target", now)
        self._drop_if_final(migration)
        return True

    def on_abort(self, rids: str, abort_all: bool, now: float) -> None:
        """A client's abort (upstream matches by prefix)."""
        for migration in list(self.outbound.values()):
            if abort_all or migration.record.rid.startswith(rids):
                migration.on_abort(now)
        for arriving in self.inbound.values():
            # Its source is told too; whoever owns the request in the end applies the abort.
            if abort_all or arriving.record.rid.startswith(rids):
                arriving.on_forward_abort()

    # --- injected faults --------------------------------------------------------------------

    def _expose(self, side: str, record: Migration) -> None:
        """Let injected faults strike this migration."""
        faults = self._faults
        if faults is None:
            return

        def strike(record: Migration) -> None:
            faults.reached(f"{side}:{record.state.value}", record)

        record.on_enter = strike
        strike(record)

    def _held(self, record: Migration) -> bool:
        return self._faults is not None and self._faults.holds(record)

    def _deliver_postponed(self, now: float) -> None:
        postponed, self._postponed = self._postponed, []
        for message in postponed:
            self.handle(message, now)

    # --- messages ---------------------------------------------------------------------------

    def receive(self, message: Message, now: float) -> None:
        """A message of the controller or a peer. Whatever goes wrong with it ends the migration
        it is about, and nothing else."""
        try:
            if isinstance(message, StartMigration):
                self.start(message, now)
            else:
                self.handle(message, now)
        except Exception as error:
            self._host.dropped.count(f"{type(message).__name__} could not be handled", error=error)
            try:
                self._end_faulty(message, now)
            except Exception:
                logger.exception("and its migration could not be ended in order")

    def _end_faulty(self, message: Any, now: float) -> None:
        migration_id = message.migration_id
        outbound, inbound = self.outbound.get(migration_id), self.inbound.get(migration_id)
        if isinstance(message, StartMigration) and outbound is None:
            self._refuse_to_start(message, "internal error at the source")
        elif isinstance(message, (Accept, Refuse, Committed, Cancelled, TransferFailed)):
            if outbound is not None:
                outbound.on_fault("internal error at the source", now)
        elif inbound is not None:
            inbound.on_fault("internal error at the target", now)
            self._drop_if_final(inbound)

    def start(self, command: StartMigration, now: float) -> None:
        """Begin a migration, or report at once why not."""
        if command.migration_id in self.outbound:
            self._host.dropped.count(f"StartMigration {command.migration_id} is repeated")
            return
        found = self._host.find_running(command.rid)
        reason = self._why_not(command, found)
        headroom = self._headroom(found[0]) if found is not None else None
        if reason is not None or found is None or headroom is None:
            self._refuse_to_start(command, reason or "bandwidth budget used up")
            return
        req, recv_req = found
        migration = SourceMigration(
            self._host,
            self._limits,
            self._bandwidth,
            command.migration_id,
            command.target,
            req,
            recv_req,
            headroom,
            now,
        )
        migration.faults = self._faults
        self.outbound[command.migration_id] = migration
        self._expose("source", migration.record)

    def _headroom(self, req: Req) -> int | None:
        """How many tokens the request may write while it is copied: one a step, and every chunk
        takes a step or two, and the bandwidth budget more, for it and for those before it. None
        if at this rate the copy would never catch up with the requests on their way out, or only
        after more tokens than an offer may name."""
        tokens = req.kv.kv_committed_len
        headroom = self._limits.headroom_tokens + 2 * (tokens // self._limits.chunk_tokens)
        step_s = self._host.decode_step_s()
        if step_s > 0:
            page = self._host.link.page_size
            others = [m for m in self.outbound.values() if not m.record.final]
            queued = tokens + sum(m.tokens_to_send for m in others)
            growth = (len(others) + 1) / step_s
            seconds = self._bandwidth.seconds_for(queued / page, growth / page)
            if seconds is None:
                return None
            headroom += int(seconds / step_s)
        headroom = min(headroom, req.sampling_params.max_new_tokens - len(req.output_ids) + 2)
        return headroom if headroom <= MAX_HEADROOM else None

    def _refuse_to_start(self, command: StartMigration, reason: str) -> None:
        self._report(
            MigrationResult(
                migration_id=command.migration_id,
                rid=command.rid,
                source=self._host.worker_id,
                target=command.target,
                outcome=REFUSED,
                reason=reason,
                tokens=0,
                tokens_sent=0,
                tokens_saved=0,
                kv_bytes=0,
                duration_s=0.0,
            )
        )

    def _why_not(
        self,
        command: StartMigration,
        found: tuple[Req, TokenizedGenerateReqInput] | None,
    ) -> str | None:
        if command.target not in self._peers:
            return "unknown target"
        if command.target == self._host.worker_id:
            return "already here"
        if found is None:
            return "not running"
        if self.is_moving(command.rid):
            return "already moving"
        if sum(not m.record.final for m in self.outbound.values()) >= self._limits.max_outbound:
            return "too many migrations outbound"
        return self._host.immovable(*found)

    def handle(self, message: Message, now: float) -> None:
        """A message from a peer."""
        match message:
            case Offer():
                self._on_offer(message, now)
            case ChunkSent() | Commit() | Cancel() | ForwardAbort():
                self._to_target(message, now)
            case Accept() | Refuse() | Committed() | Cancelled() | TransferFailed():
                self._to_source(message, now)
            case _:
                self._host.dropped.count(f"{type(message).__name__} is not for this worker")

    def _on_offer(self, offer: Offer, now: float) -> None:
        source = self._peers.get(offer.source)
        if source is None or offer.source == self._host.worker_id:
            self._host.dropped.count(f"Offer of worker {offer.source}, which cannot offer")
            return
        if (
            offer.migration_id in self.inbound
            or offer.migration_id in self._committed
            or any(m.record.room == offer.room for m in self.inbound.values())
        ):
            self._host.dropped.count(f"Offer {offer.migration_id} is repeated, or its room is")
            return
        migration = TargetMigration(self._host, self._limits, self._memory, offer, source, now)
        self.inbound[offer.migration_id] = migration
        self._expose("target", migration.record)
        self._building[offer.room] = migration
        migration.start(now)
        if migration.record.final:
            self._building.pop(offer.room, None)
        self._drop_if_final(migration)

    def _to_target(self, message: ChunkSent | Commit | Cancel | ForwardAbort, now: float) -> None:
        migration = self.inbound.get(message.migration_id)
        known = self._committed.get(message.migration_id)
        source = migration.record.source if migration else known[1] if known else None
        if message.source not in self._peers or source not in (message.source, None):
            self._host.dropped.count(
                f"{type(message).__name__} of worker {message.source}: not its migration"
            )
            return
        if migration is not None and self._held(migration.record):
            self._postponed.append(message)
        elif migration is not None:
            if isinstance(message, ChunkSent):
                migration.on_chunk_sent(now)
            elif isinstance(message, Commit):
                migration.on_commit(message, now)
            elif isinstance(message, Cancel):
                migration.on_cancel(message.reason, now)
            else:
                migration.on_forward_abort()
            self._drop_if_final(migration)
        elif known is not None:
            self._after_commit(message, known[0])
        elif isinstance(message, Commit):
            # Given up here before: make the source take the request back.
            self._host.send(
                message.source,
                TransferFailed(
                    migration_id=message.migration_id,
                    worker_id=self._host.worker_id,
                    reason="migration unknown at the target",
                ),
            )
        elif isinstance(message, Cancel):
            self._host.send(
                message.source,
                Cancelled(migration_id=message.migration_id, worker_id=self._host.worker_id),
            )

    def _after_commit(self, message: ChunkSent | Commit | Cancel | ForwardAbort, rid: str) -> None:
        if isinstance(message, ForwardAbort):
            self._host.abort_here(rid)
        elif not isinstance(message, ChunkSent):
            self._host.send(
                message.source,
                Committed(migration_id=message.migration_id, worker_id=self._host.worker_id),
            )

    def _to_source(
        self,
        message: Accept | Refuse | Committed | Cancelled | TransferFailed,
        now: float,
    ) -> None:
        migration = self.outbound.get(message.migration_id)
        if message.worker_id not in self._peers or (
            migration is not None and message.worker_id != migration.record.target
        ):
            self._host.dropped.count(
                f"{type(message).__name__} of worker {message.worker_id}: not its migration"
            )
            return
        if migration is None and isinstance(message, (Accept, TransferFailed)):
            self._disown(message)
        if migration is None or migration.record.final:
            return
        if self._held(migration.record):
            self._postponed.append(message)
            return
        match message:
            case Accept():
                migration.on_accept(message)
            case Refuse():
                migration.on_refuse(message.reason, now)
            case Committed():
                migration.on_committed(now)
            case Cancelled():
                migration.on_cancelled(now)
            case TransferFailed():
                migration.on_transfer_failed(message.reason, now)
        self._report_if_final(migration, now)

    def _disown(self, message: Accept | TransferFailed) -> None:
        """The peer holds memory for a migration that is none of ours: let it go."""
        logger.debug("worker %d: migration %d unknown", message.worker_id, message.migration_id)
        self._host.send(
            message.worker_id,
            Cancel(
                migration_id=message.migration_id,
                source=self._host.worker_id,
                reason="migration unknown at the source",
            ),
        )

    # --- time -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Poll all transfers once and advance every migration; never waits."""
        if self._postponed:
            self._deliver_postponed(now)
        if not self.active:
            return
        outbound = list(self.outbound.values())
        inbound = list(self.inbound.values())
        receiving = [m for m in inbound if m.poller is not None]
        pollers: list[Any] = [p for m in outbound for p in m.pollers]
        pollers += [m.poller for m in receiving]
        states = self._host.link.poll(pollers)
        for i, source in enumerate(outbound):
            if self._held(source.record):
                continue
            was_final = source.record.final
            self._tick(source, now, states[2 * i], states[2 * i + 1])
            if not was_final:
                self._report_if_final(source, now)
            if source.closed:
                del self.outbound[source.record.migration_id]
        polls = dict(zip(map(id, receiving), states[2 * len(outbound) :], strict=True))
        for target in inbound:
            if self._held(target.record):
                continue
            self._tick(target, now, polls.get(id(target)))
            self._drop_if_final(target)

    def _tick(self, migration: SourceMigration | TargetMigration, now: float, *polls: Any) -> None:
        try:
            migration.tick(now, *polls)
        except Exception as error:
            what = f"migration {migration.record.migration_id} in {migration.record.state.value}"
            self._host.dropped.count(f"{what} failed", error=error)
            migration.on_fault("internal error", now)

    # --- endings ----------------------------------------------------------------------------

    def _report_if_final(self, migration: SourceMigration, now: float) -> None:
        record = migration.record
        if not record.final:
            return
        self.digest.add(record)
        self._report(
            MigrationResult(
                migration_id=record.migration_id,
                rid=record.rid,
                source=record.source,
                target=record.target,
                outcome=record.outcome,
                reason=record.reason,
                tokens=record.tokens,
                tokens_sent=record.tokens_sent,
                tokens_saved=record.tokens_saved,
                kv_bytes=migration.kv_bytes,
                duration_s=now - record.started_at,
            )
        )

    def _report(self, result: MigrationResult) -> None:
        """One line in the log of rank 0, and the controller."""
        logger.log(
            logging.INFO if self._host.speaks else logging.DEBUG,
            "migration %d rid=%s from=%d to=%d tokens=%d sent=%d saved=%d bytes=%d ms=%.1f "
            "outcome=%s%s",
            result.migration_id,
            result.rid,
            result.source,
            result.target,
            result.tokens,
            result.tokens_sent,
            result.tokens_saved,
            result.kv_bytes,
            1e3 * result.duration_s,
            result.outcome,
            f" reason={result.reason!r}" if result.reason else "",
        )
        self._host.report(result)

    def _drop_if_final(self, migration: TargetMigration) -> None:
        record = migration.record
        if not record.final:
            return
        if self.inbound.pop(record.migration_id, None) is None:
            return
        self.digest.add(record)
        if record.state is TargetState.RELEASED:
            self._host.forget(record.rid)
        if record.state is TargetState.COMMITTED:
            self._host.report(
                Adopted(
                    migration_id=record.migration_id,
                    rid=record.rid,
                    worker_id=self._host.worker_id,
                )
            )
            self._committed[record.migration_id] = (record.rid, record.source)
            while len(self._committed) > _REMEMBERED:
                self._committed.popitem(last=False)
