"""The migration world with workers that die, and what the controller then believes.

``kill`` ends a worker between two of its steps: what it had sent may still arrive, up to where the
test says; what is sent to it goes nowhere; its transfers stop. Each survivor hears of it when the
test says so (``tell``), and answers; ``believed`` is where the controller then looks for requests.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_ares.srt.managers.io_struct import Adopted, MigrationResult
from unit.migration_world import World


class MortalWorld(World):
    """Workers may be killed; a controller keeps the books as ``ClusterState`` does."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.dead: set[int] = set()
        # (survivor, dead one) that has not been told yet.
        self.untold: set[tuple[int, int]] = set()
        self.believed: dict[str, int] = {}
        self._noted = (0, 0)

    def submit(self, rid: str, *, worker: int = 0, **fields: Any) -> Any:
        self.believed[rid] = worker
        return super().submit(rid, worker=worker, **fields)

    # --- death ------------------------------------------------------------------------------

    def kill(self, worker_id: int, heard: int = 0) -> None:
        """All but the first ``heard`` messages on each of its links are lost with it."""
        if worker_id in self.dead:
            return
        self.note_reports()
        self.dead.add(worker_id)
        for source, target in self.links():
            queue = self.network[source, target]
            while len(queue) > (heard if source == worker_id else 0) and worker_id in (
                source,
                target,
            ):
                queue.pop()
        self.front[worker_id].clear()
        dead = self.workers[worker_id]
        for transfer in self.transfers.values():
            if transfer.sender_side is dead.link._manager:
                transfer.chunks.clear()
                transfer.under_way = None
        dead.running.clear()
        dead.waiting.clear()
        dead.results.clear()
        dead.building.clear()
        survivors = [w.worker_id for w in self.workers if w.worker_id not in self.dead]
        self.untold = {(s, d) for s, d in self.untold if s != worker_id}
        self.untold |= {(s, worker_id) for s in survivors}

    def tell(self, survivor: int, dead: int) -> None:
        """``PeerDied`` arrives; the survivor lets go, and acknowledges."""
        if (survivor, dead) in self.untold:
            self.untold.discard((survivor, dead))
            manager = self.workers[survivor].manager
            manager.on_peer_died(dead, self.now)
            assert manager.forget_peer(dead) is not None
            involved = [m for m in manager.outbound.values() if m.record.target == dead]
            assert all(m.record.final for m in involved)
            assert not [m for m in manager.inbound.values() if m.record.source == dead]
            self.note_reports()

    def tell_all(self) -> None:
        for survivor, dead in sorted(self.untold):
            self.tell(survivor, dead)

    # --- the world, without its dead --------------------------------------------------------

    def deliver(self, source: int, target: int) -> bool:
        if target in self.dead:
            self.network[source, target].clear()
            return False
        return super().deliver(source, target)

    def advance(self, transfer: Any) -> bool:
        """As ``Transfer.advance``; what goes to a dead worker fails in the transfer engine."""
        receiving = [
            w for w in self.workers if transfer.receiver and transfer.receiver.memory is w.memory
        ]
        sending = [w for w in self.workers if w.link._manager is transfer.sender_side]
        if sending[0].worker_id in self.dead:
            return False
        if receiving and receiving[0].worker_id in self.dead:
            if transfer.under_way is None and not transfer.chunks:
                return False
            transfer.chunks.clear()
            transfer.fail_source()
            return True
        return bool(transfer.advance())

    def round(self, dt: float = 0.01) -> None:
        for link in self.links():
            while self.deliver(*link):
                pass
        for worker in self.workers:
            if worker.worker_id not in self.dead:
                while self.deliver_front(worker.worker_id):
                    pass
                while worker.finish_build():
                    pass
        for transfer in list(self.transfers.values()):
            while self.advance(transfer):
                pass
        for worker in self.workers:
            if worker.worker_id not in self.dead:
                worker.iterate()
        self.now += dt
        self.note_reports()

    @property
    def quiet(self) -> bool:
        living = [w for w in self.workers if w.worker_id not in self.dead]
        return (
            not self.untold
            and not any(w.manager.active or w.building for w in living)
            and not any(self.network.values())
            and not any(self.front[w.worker_id] for w in living)
        )

    # --- the controller ---------------------------------------------------------------------

    def note_reports(self) -> None:
        """What has been reported so far."""
        adopted, results = self._noted
        new: list[Adopted | MigrationResult] = [*self.adopted[adopted:], *self.results[results:]]
        self._noted = len(self.adopted), len(self.results)
        for message in new:
            if isinstance(message, Adopted):
                self.believed[message.rid] = message.worker_id
            elif message.outcome == "completed":
                self.believed[message.rid] = message.target

    def to_recover(self) -> set[str]:
        """Requests that the controller gives a new attempt."""
        lost = {rid for _, rid in self.lost}
        return lost | {rid for rid, worker in self.believed.items() if worker in self.dead}

    # --- invariants -------------------------------------------------------------------------

    def check(self) -> None:
        """One emitter at most, dead ones aside; every request is somewhere, or is recovered."""
        living = [w for w in self.workers if w.worker_id not in self.dead]
        for rid in self.streams:
            emitters = [(w.worker_id, r) for w in living for r in w.emits(rid)]
            assert len(emitters) <= 1, f"{rid} can be emitted by {emitters}"

    def check_quiet(self) -> None:
        """When all that live have let go of the dead: each request that has not ended has one
        owner or gets a new attempt, never both; the living hold the memory of what they own."""
        assert self.quiet
        for rid in self.streams:
            owners = [
                w.worker_id
                for w in self.workers
                if w.worker_id not in self.dead
                for _ in w.emits(rid)
            ]
            if self.ends[rid]:
                assert not owners
            else:
                recovered = rid in self.to_recover()
                assert len(owners) + recovered == 1, f"{rid}: {owners}, {self.to_recover()}"
                assert recovered or owners == [self.believed[rid]]
        for worker in self.workers:
            if worker.worker_id in self.dead:
                continue
            live = [r for rid in self.streams for r in worker.emits(rid)]
            memory = worker.memory
            assert set(memory.table) == {id(r) for r in live}, "pages leaked"
            matched = {id(r): memory.matched.get(id(r), 0) for r in live}
            own = sum(len(memory.table[id(r)]) - matched[id(r)] for r in live)
            assert memory.free_pages + len(memory.cache) + own == self.pages, "pages leaked"
            assert memory.locks.total() == sum(matched.values()), "locks leaked"
            assert not worker.manager.reserved_inbound, "the memory budget leaked"
            assert len(worker.memory.free_slots) == worker.memory.slots, "metadata slots leaked"
            assert not worker.manager.stopped_requests() and not worker.manager._building
            rooms = worker.link._manager.status.values()
            assert not any(r not in (KVPoll.Success, KVPoll.Failed) for r in rooms)
        told = [r.migration_id for r in self.results]
        assert len(told) == len(set(told)), "reported twice"
        by_the_dead = {m for m in self.commanded if self.sources[m] in self.dead}
        assert set(self.commanded) - set(told) <= by_the_dead, "a migration was never reported"

    def start(self, rid: str, source: int, target: int) -> int:
        migration_id = len(self.commanded) + 1
        self.sources[migration_id] = source
        return super().start(rid, source, target)

    @property
    def sources(self) -> dict[int, int]:
        """The worker that was commanded, by migration."""
        found: dict[int, int] = self.__dict__.setdefault("_sources", {})
        return found
