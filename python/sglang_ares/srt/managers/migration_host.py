"""What migrations do to the scheduler: stop and resume requests, reserve and free memory.

All contact of the migration code with the internals of upstream's scheduler is in this file.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.mem_cache.common import release_kv_cache

from sglang_ares.plugin import RESUMED_WITH_OUTPUT
from sglang_ares.srt.disaggregation.checks import WorkerFacts
from sglang_ares.srt.disaggregation.kv_link import KvLink
from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.disaggregation.refusals import REQUEST, first_refusal
from sglang_ares.srt.disaggregation.request_state import tokenized_input, unpack_ids
from sglang_ares.srt.managers.io_struct import Message, Offer, Peer

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.scheduler import AresScheduler


class SchedulerMigrationHost:
    """Implements ``MigrationHost`` on an :class:`AresScheduler` in decode mode."""

    def __init__(self, scheduler: AresScheduler, link: KvLink, limits: MigrationLimits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self.link = link
        self.dropped = scheduler.ares.dropped
        self.facts = WorkerFacts(
            vocab_size=scheduler.model_config.vocab_size,
            max_tokens=min(
                scheduler.req_to_token_pool.max_context_len, scheduler.max_total_num_tokens
            ),
        )
        self.worker_id: int = scheduler.ares.worker_id
        # Requests about to enter a batch with output they did not produce in it.
        self._resumed: list[Req] = []

    # --- requests ---------------------------------------------------------------------------

    def find_running(self, rid: str) -> tuple[Req, TokenizedGenerateReqInput] | None:
        """A request that decodes here, and what the front sent for it."""
        recv_req = self._scheduler.ares.received.get(rid)
        for req in self._scheduler.running_batch.reqs:
            if req.rid == rid and not req.finished() and recv_req is not None:
                return req, recv_req
        return None

    def immovable(self, req: Req, recv_req: TokenizedGenerateReqInput) -> str | None:
        """The row of the refusal table that keeps the request here, if one does."""
        row = first_refusal(REQUEST, recv_req)
        if row is not None:
            return f"{row.key}: {row.reason}"
        if req.to_finish is not None:
            return "ending: the request is being aborted."
        if req.weight_version_events:
            return "weight_update: weights changed while the request decoded."
        return None

    def is_running(self, req: Req) -> bool:
        """Whether the request decodes here."""
        return not req.finished() and any(r is req for r in self._scheduler.running_batch.reqs)

    def stop(self, req: Req) -> None:
        """Take the request out of the running batch."""
        batch = self._scheduler.running_batch
        batch.filter_batch(keep_indices=[i for i, r in enumerate(batch.reqs) if r is not req])
        batch.batch_is_full = False

    def has_stopped(self, req: Req) -> bool:
        """Under overlap scheduling the result of the last step arrives one iteration later."""
        if not self._scheduler.enable_overlap:
            return True
        return not any(
            any(r is req for r in batch.reqs) for batch, _ in self._scheduler.result_queue
        )

    def resume(self, req: Req) -> None:
        """Put a stopped request, or one that has just arrived, into the next batch."""
        self._resumed.append(req)
        self._scheduler.waiting_queue.append(req)

    def pop_resumed(self, reqs: list[Req]) -> list[Req]:
        """Those of ``reqs`` that enter the batch with output."""
        entering = [r for r in self._resumed if any(r is q for q in reqs)]
        # The rest still waits, or was aborted while it did.
        waiting = self._scheduler.waiting_queue
        self._resumed = [r for r in self._resumed if any(r is q for q in waiting)]
        if self._scheduler.enable_overlap:
            for req in entering:
                setattr(req, RESUMED_WITH_OUTPUT, True)
        return entering

    def release(self, req: Req) -> None:
        """Free the memory of a request that another worker owns now."""
        release_kv_cache(req, self._scheduler.tree_cache)
        self._scheduler.ares.forget_moved(req.rid)

    def forget(self, rid: str) -> None:
        """A request that was built for a migration does not come after all."""
        self._scheduler.ares.forget_moved(rid)

    def adopt(self, req: Req, migration_id: int, stopped_at: float, aborted: bool) -> None:
        """Let a landed request decode here."""
        req.time_stats.set_wait_queue_entry_time()
        self.resume(req)
        self._scheduler.ares.note_landed(req, migration_id, stopped_at)
        if aborted:
            self.abort_here(req.rid)

    def abort_here(self, rid: str) -> None:
        """End a request that is owned here, as the client asked."""
        self._scheduler.abort_request(AbortReq(rid=rid))

    def build(self, offer: Offer, source: Peer) -> None:
        """Receive the request as upstream receives any; it comes back through ``take_built``."""
        self._scheduler.handle_generate_request(
            tokenized_input(
                offer.spec,
                bootstrap_host=source.bootstrap_host,
                bootstrap_port=source.bootstrap_port,
                bootstrap_room=offer.room,
            )
        )

    # --- memory -----------------------------------------------------------------------------

    def refusal(self, offer: Offer) -> str | None:
        """Why this worker takes no further request now."""
        scheduler = self._scheduler
        if offer.spec.rid in scheduler.ares.received:
            return "the request is here already"
        adapters = scheduler.tp_worker.model_runner.lora_manager
        lora_id = offer.spec.lora_id
        if lora_id is not None and (adapters is None or lora_id not in adapters.lora_refs):
            return "the LoRA adapter is not loaded here"
        if scheduler._engine_paused:
            return "engine paused"
        if len(scheduler.inbound_migrations()) > self._limits.max_inbound:
            return "too many migrations inbound"
        if scheduler.disagg_decode_prealloc_queue.retracted_queue:
            return "no KV memory: requests are retracted here"
        if len(scheduler.running_batch.reqs) >= scheduler.max_running_requests:
            return "no running slot"
        return None

    def reserve(self, req: Req, offer: Offer) -> int | None:
        """Allocate a row and KV for the request's tokens and its growth during the copy."""
        scheduler = self._scheduler
        queue = scheduler.disagg_decode_prealloc_queue
        if scheduler.req_to_token_pool.available_size() <= 0:
            return None
        budget = queue._allocatable_token_budgets(
            count_retracted=True, extra_reserved_reqs=len(scheduler.inbound_migrations())
        )
        if self.link.page_count(offer.tokens + offer.headroom) * self.link.page_size > budget:
            return None
        # Upstream sizes the allocation by the output; pad it to tokens + headroom.
        output = unpack_ids(offer.output_ids)
        req.output_ids = output[:-1] + array("q", [0]) * offer.headroom
        req.pd_rebootstrap_in_progress = True
        queue._pre_alloc(req)
        return 0

    def trim(self, req: Req, tokens: int) -> None:
        """Free the reserved KV beyond ``tokens``."""
        page = self.link.page_size
        first_unused = -(-tokens // page) * page
        allocator = self._scheduler.token_to_kv_pool_allocator
        if first_unused < req.kv.kv_allocated_len:
            rows = self._scheduler.req_to_token_pool.req_to_token
            allocator.free(rows[req.kv.req_pool_idx, first_unused : req.kv.kv_allocated_len])
        req.kv.kv_allocated_len = tokens
        req.kv.kv_committed_len = tokens
        # It was built from the padded output; upstream rebuilds it when it is empty.
        req.full_untruncated_fill_ids = array("q")

    def unreserve(self, req: Req) -> None:
        """Free all reserved KV."""
        release_kv_cache(req, self._scheduler.tree_cache, is_insert=False)

    def alloc_metadata(self) -> int | None:
        """A slot of upstream's metadata buffers, if there is one."""
        slot: int | None = self._scheduler.req_to_metadata_buffer_idx_allocator.alloc()
        return slot

    def free_metadata(self, slot: int) -> None:
        """Give the slot back, unstamped."""
        self._scheduler.disagg_metadata_buffers.bootstrap_room[slot] = 0
        self._scheduler.req_to_metadata_buffer_idx_allocator.free(slot)

    def write_room(self, slot: int, room: int) -> None:
        """Stamp the slot with the transfer's room."""
        self._scheduler.disagg_metadata_buffers.bootstrap_room[slot, 0] = room

    def room_in(self, slot: int) -> int:
        """The room that arrived in the slot."""
        return int(self._scheduler.disagg_metadata_buffers.bootstrap_room[slot, 0].item())

    # --- the world --------------------------------------------------------------------------

    def send(self, worker_id: int, message: Message) -> None:
        """Send to a peer."""
        self._scheduler.ares.send(worker_id, message)

    def report(self, message: Message) -> None:
        """Tell the controller."""
        self._scheduler.ares.report(message)

    def wall_clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()
