"""What migrations do to the scheduler: stop and resume requests, reserve and free memory.

All contact of the migration code with the internals of upstream's scheduler is in this file.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING, Any, Protocol

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_policy import match_prefix_for_req
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.runtime_context import get_disagg

from sglang_ares.plugin import RESUMED_WITH_OUTPUT
from sglang_ares.srt.disaggregation.checks import WorkerFacts
from sglang_ares.srt.disaggregation.kv_link import KvLink
from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.disaggregation.refusals import REQUEST, first_refusal
from sglang_ares.srt.disaggregation.request_state import tokenized_input, unpack_ids
from sglang_ares.srt.managers.io_struct import Message, Offer, Peer
from sglang_ares.srt.policy.types import DECODE

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.scheduler import AresScheduler


class _FromWorker(Protocol):
    """What names the KV bootstrap server of a worker."""

    @property
    def bootstrap_host(self) -> Any: ...

    @property
    def bootstrap_port(self) -> Any: ...


def facts_of(scheduler: AresScheduler) -> WorkerFacts:
    """What a worker can hold."""
    return WorkerFacts(
        vocab_size=scheduler.model_config.vocab_size,
        max_tokens=min(scheduler.req_to_token_pool.max_context_len, scheduler.max_total_num_tokens),
    )


class SchedulerMigrationHost:
    """Implements ``MigrationHost`` on an :class:`AresScheduler`, which decodes while there are
    migrations."""

    def __init__(self, scheduler: AresScheduler, link: KvLink, limits: MigrationLimits) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self.link = link
        self.dropped = scheduler.ares.dropped
        self.facts = facts_of(scheduler)
        self.worker_id: int = scheduler.ares.worker_id
        self.speaks: bool = scheduler.ares.speaks
        self.kv_capacity = int(scheduler.max_total_num_tokens)
        # KV addresses of workers that died.
        self._dead: set[str] = set()

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

    def can_stop(self, req: Req) -> bool:
        """While the engine is paused, the result of a step stays unprocessed."""
        return not self._scheduler._engine_paused or self.has_stopped(req)

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
        self._scheduler.waiting_queue.append(req)

    def entering_with_output(self, reqs: list[Req]) -> list[Req]:
        """Those of ``reqs`` that enter the batch with output they did not produce in it: moved,
        resumed, or retracted before. (The first output token is the prefill worker's.)"""
        entering = [r for r in reqs if len(r.output_ids) > 1]
        if self._scheduler.enable_overlap:
            for req in entering:
                setattr(req, RESUMED_WITH_OUTPUT, True)
        return entering

    def release(self, req: Req) -> None:
        """Free the memory of a request that another worker owns now; the prefix cache, where
        there is one, keeps its tokens."""
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

    def note_alive(self, peers: list[Peer]) -> None:
        """These serve; one may have the address that a dead one had."""
        self._dead -= {_kv_source(peer) for peer in peers}

    def comes_from_the_dead(self, req: _FromWorker) -> bool:
        """Whether the KV of this request was to come from a worker that died."""
        return _kv_source(req) in self._dead

    def stop_waiting_for(self, peer: Peer) -> None:
        """``peer`` is dead: requests that wait for KV from it fail now instead of never."""
        address = f"{peer.bootstrap_host}:{peer.bootstrap_port}"
        self._dead.add(address)
        scheduler = self._scheduler
        waiting = [
            *scheduler.disagg_decode_prealloc_queue.queue,
            *scheduler.disagg_decode_transfer_queue.queue,
        ]
        for decode_req in waiting:
            if _kv_source(decode_req.req) == address:
                decode_req.kv_receiver.abort()

    def release_what_the_dead_held(self) -> None:
        """Upstream keeps the memory of a failed transfer until its sender says that nothing is
        under way; a dead one never will, and writes nothing either."""
        transfers = self._scheduler.disagg_decode_transfer_queue
        if self._dead and transfers.has_pending_deferred_releases():
            transfers._deferred_releases = [
                (entry, 0.0 if self.comes_from_the_dead(entry.req) else deadline, slot, acks)
                for entry, deadline, slot, acks in transfers._deferred_releases
            ]

    def lost(self, req: Req, reason: str) -> None:
        """The request may have been owned by a worker that died: ask for a new attempt."""
        scheduler = self._scheduler
        scheduler.ares.request_failed(req.rid, reason)
        self.release(req)

    # --- memory -----------------------------------------------------------------------------

    @property
    def _caches_prefixes(self) -> bool:
        return bool(get_disagg().disaggregation_decode_enable_radix_cache)

    def refusal(self, offer: Offer) -> str | None:
        """Why this worker takes no further request now."""
        scheduler = self._scheduler
        if scheduler.ares.role != DECODE:
            return "the target does not decode"
        if offer.spec.rid in scheduler.ares.received:
            return "the request is here already"
        adapters = scheduler.tp_worker.model_runner.lora_manager
        lora_id = offer.spec.lora_id
        if lora_id is not None and (adapters is None or lora_id not in adapters.lora_refs):
            return "the LoRA adapter is not loaded here"
        if adapters is not None and not adapters.validate_lora_batch(self._adapters() | {lora_id}):
            return "no room for the LoRA adapter in a batch"
        if scheduler._engine_paused:
            return "engine paused"
        if len(scheduler.inbound_migrations()) > self._limits.max_inbound:
            return "too many migrations inbound"
        if scheduler.disagg_decode_prealloc_queue.retracted_queue:
            return "no KV memory: requests are retracted here"
        if len(scheduler.running_batch.reqs) >= scheduler.max_running_requests:
            return "no running slot"
        return None

    def _adapters(self) -> set[str | None]:
        """LoRA adapters (None: the model alone) that one batch may need: upstream's count, and
        those of requests on the move."""
        scheduler = self._scheduler
        transfers = scheduler.disagg_decode_transfer_queue
        queued = [*scheduler.waiting_queue, *(d.req for d in transfers.queue)]
        here = {req.lora_id for req in (*scheduler.running_batch.reqs, *queued)}
        return here | scheduler.adapters_on_the_move()

    def lock_prefix(self, req: Req, offer: Offer) -> int:
        """Match the request's tokens, output included, as upstream's decode side matches prompts.

        The key ends before the last token, so that a page is left for the source to send."""
        tree = self._scheduler.tree_cache
        if not self._caches_prefixes:
            return 0
        tokens = (req.origin_input_ids + unpack_ids(offer.output_ids))[: offer.tokens - 1]
        match = match_prefix_for_req(tree, req, tokens, include_req=True)
        lock = tree.inc_lock_ref(match.last_device_node)
        req.lock_receipt = lock.to_dec_params()
        req.kv.cache_protected_len = len(req.prefix_indices)
        return req.kv.cache_protected_len

    def unlock_prefix(self, req: Req) -> None:
        """Let go of the matched prefix; the request is not to be used any further."""
        if self._caches_prefixes:
            self._scheduler.tree_cache.unpin(req)
            req.last_node = None

    def reserve(self, req: Req, offer: Offer) -> bool:
        """Allocate a row, and KV behind the prefix for the request's tokens and its growth during
        the copy. What can be evicted counts as free; what was matched no longer can be."""
        scheduler = self._scheduler
        queue = scheduler.disagg_decode_prealloc_queue
        if scheduler.req_to_token_pool.available_size() <= 0:
            return False
        budget = queue._allocatable_token_budgets(
            count_retracted=True, extra_reserved_reqs=len(scheduler.inbound_migrations())
        )
        prefix = req.kv.cache_protected_len
        wanted = offer.tokens + offer.headroom
        if self.link.page_count(wanted - prefix) * self.link.page_size > budget:
            return False
        # Upstream sizes the allocation by the output; pad it to tokens + headroom.
        output = unpack_ids(offer.output_ids) + array("q", [0]) * offer.headroom
        req.output_ids = output[: wanted - len(req.origin_input_ids)]
        req.pd_rebootstrap_in_progress = True
        queue._pre_alloc(req, req.prefix_indices if prefix else None, prefix)
        return True

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
        """Free all reserved KV, and let go of the prefix."""
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

    def decode_step_s(self) -> float:
        """How long a decode step took lately, by rank 0's clock; 0 if there was none."""
        return self._scheduler.intake.decode_step_s

    def wall_clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()


def _kv_source(req: _FromWorker) -> str:
    return f"{req.bootstrap_host}:{req.bootstrap_port}"
