"""Decode workers in memory, for the migration protocol's tests.

Real are the state machines, their manager, the messages (encoded and decoded), upstream's ``Req``
and the captured state. In memory are what the protocol is written against: the scheduler
(``MigrationHost``), the network (one FIFO per direction), the prefix cache and the KV transfers,
whose every step a test can order, delay or fail. A request's model counts: its n-th output token
is n, and its KV entry at a position names text, position and token, so that a lost, repeated or
misplaced token or page shows. Requests of one text share the cache; by default each has its own.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.disaggregation.checks import WorkerFacts
from sglang_ares.srt.disaggregation.kv_link import ChunkCounter, CopyProgress
from sglang_ares.srt.disaggregation.manager import MigrationManager
from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.disaggregation.request_state import tokenized_input, unpack_ids
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    Decoder,
    Message,
    MigrationResult,
    Offer,
    Peer,
    StartMigration,
    WorkerInbound,
    encode,
)
from sglang_ares.srt.security.dropped import DroppedFrames

PROMPT_TOKEN = 7_000
DEFAULT_LIMITS = MigrationLimits(timeout_s=5.0, headroom_tokens=8, final_tokens=2, max_inbound=2)


# --- KV transfer ----------------------------------------------------------------------------


@dataclass
class Transfer:
    """One room. ``advance`` does the next thing a transfer engine would do on its own."""

    room: int
    sender_side: SendingManager
    handshaken: bool = False
    receiver: Receiver | None = None
    announced: bool = False
    chunks: deque[tuple[npt.NDArray[np.int32], int, bool, int]] = field(default_factory=deque)
    under_way: tuple[npt.NDArray[np.int32], int, bool, int] | None = None

    def advance(self) -> bool:
        """One step; false if there is nothing to do."""
        receiver = self.receiver
        if self.under_way is not None:
            self._land(*self.under_way)
            self.under_way = None
            return True
        if receiver is not None and not receiver.ready:
            receiver.ready = True
            return True
        if receiver is not None and receiver.pages is not None and not self.announced:
            self.announced = True
            self.sender_side.update(self.room, KVPoll.WaitingForInput)
            return True
        if self.chunks:
            self._take_up()
            return True
        return False

    def _take_up(self) -> None:
        chunk = self.chunks.popleft()
        outstanding = self.sender_side._staging_outstanding
        if self.sender_side.status.get(self.room, KVPoll.Failed) == KVPoll.Failed:
            outstanding.pop(self.room, None)
            return
        outstanding[self.room] += 1
        self.under_way = chunk

    def _land(self, pages: npt.NDArray[np.int32], first: int, is_last: bool, slot: int) -> None:
        receiver = self.receiver
        assert receiver is not None and receiver.pages is not None
        target_pages = receiver.pages[first : first + len(pages)]
        assert len(target_pages) == len(pages), "more pages sent than the target reserved"
        source, target = self.sender_side.memory, receiver.memory
        for source_page, target_page in zip(pages, target_pages, strict=True):
            assert target.owner[target_page] is receiver.owner_of[target_page], (
                f"room {self.room} wrote into page {target_page}, which was given away"
            )
            target.content[target_page] = list(source.content[source_page])
        if is_last:
            target.metadata[receiver.slot] = source.metadata[slot]
            receiver.complete = True
            self.sender_side.update(self.room, KVPoll.Success)
        outstanding = self.sender_side._staging_outstanding
        outstanding[self.room] -= 1
        if is_last:
            outstanding.pop(self.room, None)

    def fail_source(self) -> None:
        """The transfer engine reports an error; what was under way has settled."""
        self.sender_side.update(self.room, KVPoll.Failed)
        if self.under_way is not None:
            self.under_way = None
            self.sender_side._staging_outstanding[self.room] -= 1

    def fail_target(self) -> None:
        """The receiver gives up (its own timeout, a lost peer)."""
        if self.receiver is not None and not self.receiver.complete:
            self.receiver.failed = True


class SendingManager:
    """Status of the rooms that one worker sends, as upstream's managers keep it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.status: dict[int, int] = {}
        self._staging_outstanding = ChunkCounter()

    def update(self, room: int, status: int) -> None:
        if room not in self.status:
            return
        if status == KVPoll.Failed or self.status[room] == KVPoll.Failed:
            self.status[room] = KVPoll.Failed
        else:
            self.status[room] = max(self.status[room], status)


class Sender:
    """Upstream's sender, as far as the protocol uses it."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._manager = transfer.sender_side
        self._manager.status[transfer.room] = KVPoll.Bootstrapping
        self.curr_idx = 0
        self._total = -1
        self._slot = -1
        self.cleared = False

    def init(self, num_kv_indices: int, aux_index: int) -> None:
        self._total, self._slot = num_kv_indices, aux_index

    def send(self, pages: npt.NDArray[np.int32], state: None, *, num_kv_tokens: int) -> None:
        assert not self.cleared and num_kv_tokens > 0 and len(pages) > 0
        first = self.curr_idx
        self.curr_idx += len(pages)
        self._transfer.chunks.append((pages, first, self.curr_idx == self._total, self._slot))

    def poll(self) -> int:
        status = self._manager.status[self._transfer.room]
        if (
            status == KVPoll.Success
            and self._manager._staging_outstanding.get(self._transfer.room, 0) > 0
        ):
            return KVPoll.Transferring
        return status

    def abort(self) -> None:
        self._manager.update(self._transfer.room, KVPoll.Failed)

    def clear(self) -> None:
        assert not self.cleared
        self.cleared = True
        self._manager.status.pop(self._transfer.room, None)


class Receiver:
    """Upstream's receiver, as far as the protocol uses it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.ready = False
        self.pages: npt.NDArray[np.int32] | None = None
        self.owner_of: dict[int, Req | str | None] = {}
        self.slot = -1
        self.complete = False
        self.failed = False

    def send_metadata(
        self,
        pages: npt.NDArray[np.int32],
        slot: int,
        state: list[Any],
        *,
        decode_prefix_len: int,
    ) -> None:
        assert self.pages is None and state == []
        self.pages, self.slot = pages, slot
        self.owner_of = {int(p): self.memory.owner[p] for p in pages}
        assert all(isinstance(owner, Req) for owner in self.owner_of.values()), (
            "free or cached pages are offered for writing"
        )

    def poll(self) -> int:
        if self.failed:
            return KVPoll.Failed
        if self.complete:
            return KVPoll.Success
        return KVPoll.WaitingForInput if self.ready else KVPoll.Bootstrapping

    def abort(self) -> None:
        self.failed = True

    def clear(self) -> None:
        pass


CACHED = "the prefix cache"


class Memory:
    """A worker's KV pages, metadata slots and prefix cache.

    A cached page is found by the text and all tokens up to its end. A request's table starts with
    the cached pages it was matched with (``matched`` many); these are locked, the rest is its own.
    """

    def __init__(self, pages: int, page_size: int, slots: int = 4) -> None:
        self.page_size = page_size
        self.content: list[list[Any]] = [[None] * page_size for _ in range(pages)]
        self.owner: list[Req | str | None] = [None] * pages
        self.table: dict[int, list[int]] = {}
        self.matched: dict[int, int] = {}
        self.cache: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locks: Counter[int] = Counter()
        self.free_slots = list(range(slots))
        self.metadata = [0] * slots
        self.slots = slots

    @property
    def free_pages(self) -> int:
        return sum(owner is None for owner in self.owner)

    @property
    def evictable_pages(self) -> int:
        return sum(not self.locks[page] for page in self.cache.values())

    def grow(self, req: Req, tokens: int) -> bool:
        """Have pages for ``tokens`` tokens; cached ones that nobody uses make way."""
        table = self.table.get(id(req), [])
        wanted = -(-tokens // self.page_size) - len(table)
        self._evict(wanted - self.free_pages)
        free = [p for p, owner in enumerate(self.owner) if owner is None]
        if wanted > len(free):
            return False
        self.table[id(req)] = table
        for page in free[: max(0, wanted)]:
            self.owner[page] = req
            self.content[page] = [None] * self.page_size
            table.append(page)
        req.kv.kv_allocated_len = tokens
        return True

    def shrink(self, req: Req, tokens: int) -> None:
        """Give back the pages beyond ``tokens``; all of them, and the locks, for 0."""
        table = self.table.get(id(req), [])
        keep = -(-tokens // self.page_size)
        if not tokens:
            for page in table[: self.matched.pop(id(req), 0)]:
                self.locks[page] -= 1
                assert self.locks[page] >= 0, "unlocked twice"
                table[table.index(page)] = -1
        for page in table[keep:]:
            if page >= 0:
                assert self.owner[page] is req, "freed twice"
                self.owner[page] = None
        del table[keep:]
        if not table:
            self.table.pop(id(req), None)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = tokens

    # --- prefix cache -----------------------------------------------------------------------

    def lock_prefix(self, req: Req, ids: list[int]) -> int:
        """Start the request's table with the cached pages of its first tokens; how many tokens."""
        table: list[int] = []
        for page in self._cached_pages(req, ids):
            self.locks[page] += 1
            table.append(page)
        if table:
            self.table[id(req)] = table
            self.matched[id(req)] = len(table)
        return len(table) * self.page_size

    def insert(self, req: Req, tokens: int) -> None:
        """Give the whole pages of the request's first ``tokens`` to the cache and let go of it."""
        ids = [*req.origin_input_ids, *req.output_ids][:tokens]
        table = self.table[id(req)]
        for i in range(self.matched.get(id(req), 0), tokens // self.page_size):
            key = self._key(req, ids, i)
            if key not in self.cache:
                self.cache[key] = table[i]
                self.owner[table[i]] = CACHED
                table[i] = -1
        self.shrink(req, 0)

    def warm(self, req: Req, ids: list[int]) -> None:
        """Have the whole pages of ``ids`` cached."""
        for i in range(len(ids) // self.page_size):
            key = self._key(req, ids, i)
            if key not in self.cache:
                self.cache[key] = page = self.owner.index(None)
                self.owner[page] = CACHED
                span = range(i * self.page_size, (i + 1) * self.page_size)
                self.content[page] = [(text_of(req), at, ids[at]) for at in span]

    def _cached_pages(self, req: Req, ids: list[int]) -> Iterator[int]:
        for i in range(len(ids) // self.page_size):
            page = self.cache.get(self._key(req, ids, i))
            if page is None:
                return
            yield page

    def _key(self, req: Req, ids: list[int], page: int) -> tuple[str, tuple[int, ...]]:
        return text_of(req), tuple(ids[: (page + 1) * self.page_size])

    def _evict(self, pages: int) -> None:
        """Longest prefixes first, as from a tree's leaves."""
        for key in sorted(self.cache, key=lambda k: -len(k[1])):
            if pages <= 0:
                return
            page = self.cache[key]
            if not self.locks[page]:
                del self.cache[key]
                assert self.owner[page] == CACHED
                self.owner[page] = None
                pages -= 1

    def write(self, req: Req, position: int, value: Any) -> None:
        page = self.table[id(req)][position // self.page_size]
        assert self.owner[page] is req, "a write into a page that is not the request's own"
        self.content[page][position % self.page_size] = value

    def read(self, req: Req, tokens: int) -> list[Any]:
        slots = [s for page in self.table[id(req)] for s in self.content[page]]
        return slots[:tokens]


def text_of(req: Req) -> str:
    """What separates the caches of requests with equal tokens."""
    return req.extra_key or req.rid


def expected_kv(req: Req, tokens: int) -> list[Any]:
    """What the first ``tokens`` KV entries of a request must hold."""
    ids = [*req.origin_input_ids, *req.output_ids][:tokens]
    return [(text_of(req), position, token) for position, token in enumerate(ids)]


class Link:
    """``KvLink`` over the world's transfers."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._manager = SendingManager(worker.memory)
        self.page_size = worker.memory.page_size
        self.page_bytes = 1000 * worker.memory.page_size

    def open_sender(self, room: int) -> Sender:
        transfer = self._worker.world.transfers[room] = Transfer(room, self._manager)
        return Sender(transfer)

    def open_receiver(self, host: str, port: int, room: int) -> Receiver:
        receiver = Receiver(self._worker.memory)
        transfer = self._worker.world.transfers[room]
        assert transfer.sender_side is self._worker.world.workers[port].link._manager
        transfer.receiver = receiver
        return receiver

    def copied(self, room: int) -> CopyProgress:
        return CopyProgress(self._manager, room)

    def poll(self, pollers: list[Any]) -> list[int]:
        return [int(p.poll()) for p in pollers]

    def pages(self, req: Req, start: int, end: int) -> npt.NDArray[np.int32]:
        assert start % self.page_size == 0
        table = self._worker.memory.table[id(req)]
        return np.array(table[start // self.page_size : -(-end // self.page_size)], np.int32)

    def checksum(self, req: Req, start: int, end: int) -> int:
        return zlib.crc32(repr(self._worker.memory.read(req, end)[start:]).encode())

    def page_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def bytes_of(self, sender: Sender) -> int:
        return sender.curr_idx * self.page_size


# --- a worker -------------------------------------------------------------------------------


class StrictlyDropped(DroppedFrames):
    """What the product survives, a test must see: errors while handling a message go on."""

    def count(self, reason: str, *, error: BaseException | None = None) -> None:
        super().count(reason)
        if error is not None:
            raise error


class Worker:
    """A decode worker: upstream's loop in miniature, and ``MigrationHost`` for the manager.

    ``overlap``: as upstream's overlap scheduling, a step's result is processed one iteration
    after its launch, and the next step is launched before that. While ``paused`` nothing is
    launched or processed, but migrations go on.
    """

    def __init__(self, world: World, worker_id: int) -> None:
        self.world = world
        self.worker_id = worker_id
        self.speaks = True
        self.memory = Memory(world.pages, world.page_size)
        self.kv_capacity = world.pages * world.page_size
        self.link = Link(self)
        self.running: list[Req] = []
        self.waiting: list[Req] = []
        self.results: deque[list[Req]] = deque()
        self.received: dict[str, TokenizedGenerateReqInput] = {}
        self.building: list[Req] = []
        self.refuses: str | None = None
        self.paused = False
        self.facts = WorkerFacts(vocab_size=10_000, max_tokens=world.pages)
        self.dropped = StrictlyDropped(f"worker-{worker_id}")
        self.manager = MigrationManager(self, world.limits)
        self.manager.connect(
            [
                Peer(
                    worker_id=i,
                    role="decode",
                    control_endpoint="",
                    bootstrap_host="here",
                    bootstrap_port=i,
                )
                for i in range(world.worker_count)
            ]
        )

    # --- the loop ---------------------------------------------------------------------------

    def iterate(self) -> None:
        """One iteration of the scheduler's event loop."""
        self.manager.tick(self.world.now)
        if self.paused:
            return
        self.running += self.waiting
        self.waiting.clear()
        self.running = [r for r in self.running if not r.finished()]
        launched = list(self.running)
        for req in launched:
            assert self.memory.grow(req, req.kv.kv_committed_len + 1), (
                "the test's pool is too small"
            )
            req.kv.kv_committed_len += 1
        if self.world.overlap:
            if self.results:
                self._process(self.results.popleft())
            if launched:
                self.results.append(launched)
        elif launched:
            self._process(launched)

    def _process(self, batch: list[Req]) -> None:
        for req in batch:
            if req.finished():
                continue
            position = len(req.origin_input_ids) + len(req.output_ids) - 1
            fed = req.output_ids[-1] if req.output_ids else req.origin_input_ids[-1]
            self.memory.write(req, position, (text_of(req), position, fed))
            req.output_ids.append(len(req.output_ids))
            if req.to_finish is not None:
                req.finished_reason = req.to_finish
            elif len(req.output_ids) >= req.sampling_params.max_new_tokens:
                req.finished_reason = FINISH_LENGTH(length=len(req.output_ids))
            self.stream(req)
            if req.finished():
                self.end(req)

    def stream(self, req: Req) -> None:
        """Send the client what it has not got yet."""
        news = list(req.output_ids[req.send_token_offset :])
        req.send_token_offset = len(req.output_ids)
        self.world.client_receives(req.rid, news, self.worker_id)

    def end(self, req: Req) -> None:
        """The request is over here."""
        assert isinstance(req.finished_reason, (FINISH_ABORT, FINISH_LENGTH))
        kind = "aborted" if isinstance(req.finished_reason, FINISH_ABORT) else "finished"
        self.world.client_learns_end(req.rid, kind)
        self.running = [r for r in self.running if r is not req]
        self.memory.insert(req, len(req.origin_input_ids) + len(req.output_ids) - 1)
        self.received.pop(req.rid, None)

    def abort_request(self, rid: str) -> None:
        """A client's abort, as upstream's scheduler and ours apply it."""
        self.manager.on_abort(rid, False, self.world.now)
        for req in [r for r in self.waiting if r.rid == rid]:
            self.waiting.remove(req)
            req.finished_reason = FINISH_ABORT()
            self.end(req)
        for req in self.building:
            if req.rid == rid:
                req.to_finish = FINISH_ABORT()
        for batch in (self.running, *self.results):
            for req in batch:
                if req.rid == rid and not req.finished():
                    req.to_finish = FINISH_ABORT()

    def finish_build(self) -> bool:
        """The oldest pending build (its grammar) is ready."""
        if not self.building:
            return False
        req = self.building.pop(0)
        assert self.manager.take_built(req, self.world.now), (
            "a request built for a migration was left to the scheduler's own queue"
        )
        return True

    def emits(self, rid: str) -> list[Req]:
        """The objects of a request from which this worker can still emit tokens."""
        found = {id(r): r for r in (*self.running, *self.waiting) if r.rid == rid}
        for batch in self.results:
            found |= {id(r): r for r in batch if r.rid == rid}
        return [r for r in found.values() if not r.finished()]

    # --- MigrationHost ----------------------------------------------------------------------

    def find_running(self, rid: str) -> tuple[Req, TokenizedGenerateReqInput] | None:
        for req in self.running:
            if req.rid == rid and not req.finished():
                return req, self.received[rid]
        return None

    def immovable(self, req: Req, recv_req: TokenizedGenerateReqInput) -> str | None:
        return "ending: the request is being aborted." if req.to_finish is not None else None

    def is_running(self, req: Req) -> bool:
        return not req.finished() and any(r is req for r in self.running)

    def can_stop(self, req: Req) -> bool:
        return not self.paused or self.has_stopped(req)

    def stop(self, req: Req) -> None:
        assert any(r is req for r in self.running)
        self.running = [r for r in self.running if r is not req]

    def has_stopped(self, req: Req) -> bool:
        return not any(r is req for batch in self.results for r in batch)

    def resume(self, req: Req) -> None:
        assert not req.finished(), f"{req.rid} has ended: its memory is free, it must not run"
        assert self.has_stopped(req), f"{req.rid} would run the step under way twice"
        self.waiting.append(req)

    def release(self, req: Req) -> None:
        self.memory.insert(req, req.kv.kv_committed_len)
        self.received.pop(req.rid, None)

    def alloc_metadata(self) -> int | None:
        return self.memory.free_slots.pop() if self.memory.free_slots else None

    def free_metadata(self, slot: int) -> None:
        assert slot not in self.memory.free_slots, "freed twice"
        self.memory.metadata[slot] = 0
        self.memory.free_slots.append(slot)

    def write_room(self, slot: int, room: int) -> None:
        self.memory.metadata[slot] = room

    def room_in(self, slot: int) -> int:
        return self.memory.metadata[slot]

    def refusal(self, offer: Offer) -> str | None:
        rid = offer.spec.rid
        if any(r.rid == rid for r in (*self.running, *self.waiting)):
            return "the request is here already"
        if len(self.manager.inbound) > self.world.limits.max_inbound:
            return "too many migrations inbound"
        return "engine paused" if self.paused else self.refuses

    def build(self, offer: Offer, source: Peer) -> None:
        recv_req = tokenized_input(
            offer.spec,
            bootstrap_host=source.bootstrap_host,
            bootstrap_port=source.bootstrap_port,
            bootstrap_room=offer.room,
        )
        self.received[recv_req.rid] = recv_req
        self.building.append(new_req(recv_req))
        if not self.world.slow_builds:
            self.finish_build()

    def lock_prefix(self, req: Req, offer: Offer) -> int:
        ids = [*req.origin_input_ids, *unpack_ids(offer.output_ids)][: offer.tokens - 1]
        self.memory.warm(req, ids[: self.world.prefix_tokens])
        return self.memory.lock_prefix(req, ids)

    def unlock_prefix(self, req: Req) -> None:
        self.memory.shrink(req, 0)

    def reserve(self, req: Req, offer: Offer) -> bool:
        wanted = offer.tokens + offer.headroom
        memory = self.memory
        resident = self.world.pages - memory.free_pages - memory.evictable_pages
        own = self.link.page_count(wanted) - memory.matched.get(id(req), 0)
        if resident + own > self.world.budget or not memory.grow(req, wanted):
            return False
        req.output_ids = unpack_ids(offer.output_ids)
        return True

    def trim(self, req: Req, tokens: int) -> None:
        assert tokens <= req.kv.kv_allocated_len, "the request outgrew its reservation"
        self.memory.shrink(req, tokens)

    def unreserve(self, req: Req) -> None:
        self.memory.shrink(req, 0)

    def adopt(self, req: Req, migration_id: int, stopped_at: float, aborted: bool) -> None:
        tokens = req.kv.kv_committed_len
        assert tokens == len(req.origin_input_ids) + len(req.output_ids) - 1
        assert self.memory.read(req, tokens) == expected_kv(req, tokens)
        self.resume(req)
        if aborted:
            self.abort_here(req.rid)

    def abort_here(self, rid: str) -> None:
        self.abort_request(rid)

    def forget(self, rid: str) -> None:
        """Nothing is kept here beyond the queues."""

    def lost(self, req: Req, reason: str) -> None:
        self.world.lost.append((self.worker_id, req.rid))
        self.release(req)

    def send(self, worker_id: int, message: Message) -> None:
        self.world.network[self.worker_id, worker_id].append(encode(message))

    def report(self, message: Message) -> None:
        if isinstance(message, Adopted):
            self.world.adopted.append(message)
        else:
            assert isinstance(message, MigrationResult)
            self.world.results.append(message)

    def decode_step_s(self) -> float:
        return 0.01

    def wall_clock(self) -> float:
        return self.world.now


def new_req(recv_req: TokenizedGenerateReqInput) -> Req:
    """Upstream's request object of a tokenized request."""
    return Req(
        recv_req.rid,
        recv_req.input_text or "",
        recv_req.input_ids,
        recv_req.sampling_params,
        bootstrap_host=recv_req.bootstrap_host,
        bootstrap_port=recv_req.bootstrap_port,
        bootstrap_room=recv_req.bootstrap_room,
        extra_key=recv_req.extra_key,
    )


# --- the world ------------------------------------------------------------------------------


class World:
    """Workers, network, transfers, clients and the clock."""

    def __init__(
        self,
        *,
        workers: int = 2,
        page_size: int = 1,
        budget: int = 600,
        overlap: bool = False,
        slow_builds: bool = False,
        prefix_tokens: int = 0,
        limits: MigrationLimits | None = None,
    ) -> None:
        self.limits = limits or DEFAULT_LIMITS
        self.worker_count = workers
        self.page_size = page_size
        self.pages = 600
        self.budget = budget
        self.overlap = overlap
        self.slow_builds = slow_builds
        self.prefix_tokens = prefix_tokens
        self.now = 0.0
        self.transfers: dict[int, Transfer] = {}
        self.network: dict[tuple[int, int], deque[bytes]] = defaultdict(deque)
        self.front: dict[int, deque[str]] = defaultdict(deque)
        self.results: list[MigrationResult] = []
        self.adopted: list[Adopted] = []
        # (worker, request): it asked for a new attempt.
        self.lost: list[tuple[int, str]] = []
        self.commanded: list[int] = []
        self.streams: dict[str, list[int]] = {}
        self.ends: dict[str, list[str]] = {}
        self.aborts: set[str] = set()
        self._decoder = Decoder(WorkerInbound)
        self.workers = [Worker(self, i) for i in range(workers)]

    # --- clients ----------------------------------------------------------------------------

    def submit(
        self,
        rid: str,
        *,
        worker: int = 0,
        prompt: int = 5,
        max_new: int = 40,
        text: str | None = None,
    ) -> Req:
        """A request that starts to decode on ``worker``, its prompt's KV present."""
        params = SamplingParams(max_new_tokens=max_new)
        params.normalize(None)  # as upstream's front does
        recv_req = TokenizedGenerateReqInput(
            rid=rid,
            input_text=None,
            input_ids=array("q", range(PROMPT_TOKEN, PROMPT_TOKEN + prompt)),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=True,
            extra_key=text,
        )
        host = self.workers[worker]
        req = new_req(recv_req)
        assert host.memory.grow(req, prompt)
        req.kv.kv_committed_len = prompt
        req.output_ids = array("q", [0])  # the prefill worker's token
        for position, entry in enumerate(expected_kv(req, prompt)):
            host.memory.write(req, position, entry)
        self.streams[rid] = []
        self.ends[rid] = []
        host.received[rid] = recv_req
        host.running.append(req)
        host.stream(req)
        return req

    def abort(self, rid: str) -> None:
        """The client aborts; the controller tells every worker."""
        self.aborts.add(rid)
        for worker in self.workers:
            self.front[worker.worker_id].append(rid)

    def client_receives(self, rid: str, tokens: list[int], worker_id: int) -> None:
        stream = self.streams[rid]
        assert not self.ends[rid], f"{rid}: tokens {tokens} after its end"
        expected = list(range(len(stream), len(stream) + len(tokens)))
        assert tokens == expected, f"{rid}: worker {worker_id} sent {tokens}, not {expected}"
        stream.extend(tokens)

    def client_learns_end(self, rid: str, kind: str) -> None:
        assert not self.ends[rid], f"{rid} ended twice: {self.ends[rid]}, {kind}"
        self.ends[rid].append(kind)

    # --- what a test may do -----------------------------------------------------------------

    def start(self, rid: str, source: int, target: int) -> int:
        """The controller commands a migration; its id."""
        migration_id = len(self.commanded) + 1
        self.commanded.append(migration_id)
        command = StartMigration(migration_id=migration_id, rid=rid, target=target)
        self.workers[source].manager.start(command, self.now)
        return migration_id

    def deliver(self, source: int, target: int) -> bool:
        """The oldest message from one worker to another arrives."""
        queue = self.network[source, target]
        if not queue:
            return False
        message = self._decoder.decode(queue.popleft())
        self.workers[target].manager.handle(message, self.now)
        return True

    def deliver_front(self, worker_id: int) -> bool:
        """The oldest abort for a worker arrives."""
        if not self.front[worker_id]:
            return False
        self.workers[worker_id].abort_request(self.front[worker_id].popleft())
        return True

    def links(self) -> Iterator[tuple[int, int]]:
        """Every direction of the network."""
        for source in range(self.worker_count):
            for target in range(self.worker_count):
                yield source, target

    def round(self, dt: float = 0.01) -> None:
        """Everything that is under way arrives, every worker iterates once."""
        for link in self.links():
            while self.deliver(*link):
                pass
        for worker in self.workers:
            while self.deliver_front(worker.worker_id):
                pass
            while worker.finish_build():
                pass
        for transfer in list(self.transfers.values()):
            while transfer.advance():
                pass
        for worker in self.workers:
            worker.iterate()
        self.now += dt

    @property
    def quiet(self) -> bool:
        """Nothing of the protocol is under way."""
        return (
            not any(w.manager.active or w.building for w in self.workers)
            and not any(self.network.values())
            and not any(self.front.values())
        )

    def settle(self, rounds: int = 60, dt: float = 0.01) -> None:
        """Rounds until quiet; more than ``rounds`` is an error."""
        for _ in range(rounds):
            if self.quiet:
                return
            self.round(dt)
        states = [
            (w.worker_id, m.record)
            for w in self.workers
            for m in (*w.manager.outbound.values(), *w.manager.inbound.values())
        ]
        raise AssertionError(f"not quiet after {rounds} rounds: {states}")

    # --- invariants -------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold at any moment."""
        for rid in self.streams:
            emitters = [(w.worker_id, r) for w in self.workers for r in w.emits(rid)]
            assert len(emitters) <= 1, f"{rid} can be emitted by {emitters}"
            stopped = [
                w.worker_id
                for w in self.workers
                for r in w.manager.stopped_requests()
                if r.rid == rid
            ]
            assert len(stopped) <= 1, f"{rid} is stopped on {stopped}"
            if not self.ends[rid]:
                assert emitters or stopped, f"{rid} is lost"

    def check_quiet(self) -> None:
        """What must hold when nothing is under way any more."""
        assert self.quiet
        for rid in self.streams:
            owners = [w.worker_id for w in self.workers for _ in w.emits(rid)]
            assert len(owners) + len(self.ends[rid]) == 1, (rid, owners, self.ends[rid])
        for worker in self.workers:
            live = [r for rid in self.streams for r in worker.emits(rid)]
            assert set(worker.memory.table) == {id(r) for r in live}, "pages leaked"
            memory = worker.memory
            matched = {id(r): memory.matched.get(id(r), 0) for r in live}
            own = sum(len(memory.table[id(r)]) - matched[id(r)] for r in live)
            assert memory.free_pages + len(memory.cache) + own == self.pages, "pages leaked"
            assert memory.locks.total() == sum(matched.values()), "locks leaked"
            assert not worker.manager.reserved_inbound, "the memory budget leaked"
            assert len(worker.memory.free_slots) == worker.memory.slots, "metadata slots leaked"
            assert not worker.manager.stopped_requests()
        assert not any(t.under_way for t in self.transfers.values()), "a write is under way"
        assert sorted(r.migration_id for r in self.results) == self.commanded

    def run_out(self, rounds: int = 200) -> None:
        """Decode until every request has ended, and check every stream."""
        for _ in range(rounds):
            if all(self.ends.values()):
                break
            self.round()
        for rid, end in self.ends.items():
            assert end, f"{rid} never ended"
            if rid not in self.aborts:
                assert end == ["finished"], (rid, end)

    def result(self, migration_id: int) -> MigrationResult:
        """The report of a migration, which there must be exactly one of."""
        (result,) = [r for r in self.results if r.migration_id == migration_id]
        return result

    def owner(self, rid: str) -> int:
        """The worker that decodes a request."""
        (owner,) = [w.worker_id for w in self.workers for _ in w.emits(rid)]
        return owner
