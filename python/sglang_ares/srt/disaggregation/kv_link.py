"""The worker's two ends of KV transfer, on upstream's own KV managers.

A worker has the receiving manager of upstream's decode side and the sending manager of its prefill
side (``roles.py``); migrations use both. Here is what opens transfers on them, and the page
arithmetic that both ends share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.utils import (
    KVClassType,
    get_kv_class,
    poll_and_all_reduce,
)
from sglang.srt.mem_cache.common import kv_to_page_indices

from sglang_ares.srt.disaggregation.kv_checksum import kv_buffers, kv_checksum

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler


class KvLink:
    """Opens senders and receivers, and polls them alike on all tensor-parallel ranks."""

    def __init__(
        self, scheduler: Scheduler, send_manager: Any, bootstrap_host: str, bootstrap_port: int
    ) -> None:
        queue = scheduler.disagg_decode_prealloc_queue
        self._scheduler = scheduler
        self._backend = scheduler.transfer_backend
        self._bootstrap_address = f"{bootstrap_host}:{bootstrap_port}"
        self._receive_manager = queue.kv_manager
        self._tp_rank = queue.tp_rank
        self._group = queue.gloo_group
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        self._buffers = kv_buffers(pool)
        self._send_manager = send_manager
        self._chunks = ChunkCounter()
        if hasattr(self._send_manager, "_staging_outstanding"):
            self._send_manager._staging_outstanding = self._chunks
        self._sender_class = get_kv_class(self._backend, KVClassType.SENDER)
        self._receiver_class = get_kv_class(self._backend, KVClassType.RECEIVER)
        self.page_size: int = scheduler.token_to_kv_pool_allocator.page_size
        # Bytes of one page over all layers, this rank's share.
        self.page_bytes = int(sum(send_manager.kv_args.kv_item_lens))

    def connect(self, bootstrap_host: str, bootstrap_port: int) -> bool:
        """Learn a peer's layout now, so that the first migration need not."""
        known: bool = self._receive_manager.try_ensure_parallel_info(
            f"{bootstrap_host}:{bootstrap_port}"
        )
        return known

    def open_sender(self, room: int) -> Any:
        """An upstream KV sender for transfer ``room``."""
        return self._sender_class(
            mgr=self._send_manager,
            bootstrap_addr=self._bootstrap_address,
            bootstrap_room=room,
            dest_tp_ranks=[self._tp_rank],
            pp_rank=0,
        )

    def open_receiver(self, bootstrap_host: str, bootstrap_port: int, room: int) -> Any:
        """An upstream KV receiver for transfer ``room`` from the named peer, handshake begun."""
        receiver = self._receiver_class(
            mgr=self._receive_manager,
            bootstrap_addr=f"{bootstrap_host}:{bootstrap_port}",
            bootstrap_room=room,
        )
        receiver.init(0)
        return receiver

    def poll(self, pollers: list[Any]) -> list[int]:
        """The states (:class:`KVPoll`) of senders and receivers, the least over all ranks."""
        if not pollers:
            return []
        states: list[int] = poll_and_all_reduce(pollers, self._group)
        return states

    def copied(self, room: int) -> CopyProgress:
        """A poller that succeeds when every chunk sent so far has arrived."""
        return CopyProgress(self._send_manager, room)

    def pages(self, req: Req, start: int, end: int) -> npt.NDArray[np.int32]:
        """Page indices of the request's tokens [start, end); ``start`` is page-aligned."""
        slots = self._scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start:end]
        return np.asarray(kv_to_page_indices(slots, self.page_size)).astype(np.int32)

    def checksum(self, req: Req, start: int, end: int) -> int:
        """CRC-32 of the KV of the request's tokens [start, end), this rank's share."""
        slots = self._scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, start:end]
        return kv_checksum(self._buffers, slots.long())

    def page_count(self, tokens: int) -> int:
        """Pages that ``tokens`` tokens need."""
        return -(-tokens // self.page_size)

    def bytes_of(self, sender: Any) -> int:
        """Bytes of KV handed to ``sender`` so far, on all ranks (each sends as much)."""
        ranks = torch.distributed.get_world_size(self._group)
        return ranks * int(sender.get_transfer_metric().transfer_total_bytes or 0)


# What a copy's progress may be, ordered so that the least over all ranks is that of the whole.
UNDER_WAY = int(KVPoll.Bootstrapping)
UNTOUCHED = int(KVPoll.WaitingForInput)
THROUGH = int(KVPoll.Success)


class ChunkCounter(defaultdict[int, int]):
    """Upstream's count of chunks, by room, that its transfer threads have taken up and not
    finished; of the rooms in ``finished`` it also remembers how many were finished."""

    def __init__(self) -> None:
        super().__init__(int)
        self.finished: dict[int, int] = {}

    def __setitem__(self, room: int, count: int) -> None:
        if room in self.finished and count < self.get(room, 0):
            self.finished[room] += 1
        super().__setitem__(room, count)


class CopyProgress:
    """How far the chunks of one room are; pollable like a sender.

    A copy is through when every chunk sent has been finished. A backend that does not count its
    chunks is through at once; the hand-over then waits for the copy instead.
    """

    def __init__(self, manager: Any, room: int) -> None:
        outstanding = getattr(manager, "_staging_outstanding", None)
        self._chunks = outstanding if isinstance(outstanding, ChunkCounter) else None
        self._room = room
        self._sent = 0
        if self._chunks is not None:
            self._chunks.finished[room] = 0

    def chunk_sent(self) -> None:
        """One more chunk was handed to the sender."""
        self._sent += 1

    def poll(self) -> int:
        """UNDER_WAY while a chunk is being written, THROUGH when every chunk sent is finished."""
        if self._chunks is None:
            return THROUGH
        if self._chunks.get(self._room, 0) > 0:
            return UNDER_WAY
        return THROUGH if self._chunks.finished.get(self._room, 0) >= self._sent else UNTOUCHED

    def close(self) -> None:
        """The room is done with."""
        if self._chunks is not None:
            self._chunks.finished.pop(self._room, None)


def drained(progress_poll: int) -> bool:
    """Polled after an abort: no chunk of the room is being written any more, on any rank."""
    return progress_poll != UNDER_WAY


class Arrival:
    """A receiver that has succeeded only once the right metadata is there too; pollable.

    The check is part of the poll so that all ranks learn of it in the same step.
    ``room_in_slot`` reads the room that arrived in this rank's metadata slot (0: none yet).
    """

    def __init__(self, receiver: Any, room: int, room_in_slot: Callable[[], int]) -> None:
        self._receiver = receiver
        self._room = room
        self._room_in_slot = room_in_slot

    def poll(self) -> int:
        """The receiver's state; a wrong room is a failure."""
        state = int(self._receiver.poll())
        if state != KVPoll.Success or self._room_in_slot() == self._room:
            return state
        return int(KVPoll.Failed if self._room_in_slot() else KVPoll.Transferring)
