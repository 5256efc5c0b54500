"""The supervisor: who counts as dead, when a worker comes back, and when it is given up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares.srt.managers.cluster import WorkerStartError
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    DYING,
    FAILED_FOR_GOOD,
    READY,
    RESTARTING,
    WorkerView,
)
from sglang_ares.srt.managers.supervisor import Supervisor

TIMEOUT = 5.0


class Process:
    def __init__(self) -> None:
        self.alive, self.exitcode = True, None

    def is_alive(self) -> bool:
        return self.alive

    def end(self, code: int) -> None:
        if self.alive:
            self.alive, self.exitcode = False, code  # type: ignore[assignment]


class FakeWorker:
    """``WorkerProcess`` as far as the supervisor uses it."""

    def __init__(self, worker_id: int, ranks: int) -> None:
        self.spec = SimpleNamespace(worker_id=worker_id)
        self.name = f"decode worker {worker_id}"
        self.processes = [Process() for _ in range(ranks)]
        self.info = {"max_total_num_tokens": 4321}
        self.pids = [100 + worker_id]
        self.loaded: bool | str = False
        self.ranks = ranks
        self.left, self.ending = False, None

    @property
    def cause_of_death(self) -> str:
        return f"died (exit code {next(p.exitcode for p in self.processes if not p.alive)})"

    @property
    def alive(self) -> bool:
        return all(p.alive for p in self.processes)

    @property
    def gone(self) -> bool:
        return not any(p.alive for p in self.processes)


class Cluster:
    def __init__(self, count: int, ranks: int) -> None:
        self.ranks = ranks
        self.workers = [FakeWorker(i, ranks) for i in range(count)]
        self.restarts: list[tuple[int, float]] = []
        self.slow_to_die = False
        self.now = 0.0

    def kill(self, worker_id: int) -> None:
        if not self.slow_to_die:
            for process in self.workers[worker_id].processes:
                process.end(-9)

    def restart(self, worker_id: int) -> None:
        self.restarts.append((worker_id, self.now))
        self.workers[worker_id] = FakeWorker(worker_id, self.ranks)

    def poll_ready(self, worker: FakeWorker) -> bool:
        if isinstance(worker.loaded, str):
            raise WorkerStartError(worker.loaded)
        return worker.loaded


class World:
    """A cluster, its supervisor, and the controller's part."""

    def __init__(self, workers: int = 2, ranks: int = 1, max_restarts: int = 3) -> None:
        self.cluster = Cluster(workers, ranks)
        self.state = ClusterState(
            [WorkerView(i, "decode", pids=[], kv_capacity=1) for i in range(workers)]
        )
        self.calls: list[tuple[str, int]] = []
        self.unsettled: set[int] = set()
        self.silent: set[tuple[int, int]] = set()
        cluster: Any = self.cluster
        self.restart = cluster.restart
        self.supervisor = Supervisor(self, cluster, self.state, TIMEOUT, max_restarts, 0.0)

    def leave_out(self, worker_id: int) -> None:
        self.calls.append(("leave out", worker_id))

    def on_worker_dead(self, worker_id: int) -> None:
        assert self.cluster.workers[worker_id].gone, "it could still speak"
        self.calls.append(("dead", worker_id))

    def settled(self, worker_id: int) -> bool:
        return worker_id not in self.unsettled

    def take_in(self, worker: Any) -> None:
        self.calls.append(("take in", worker.spec.worker_id))

    def run(self, seconds: float, step: float = 0.25) -> None:
        """Time passes; ranks that are not silent speak."""
        for _ in range(round(seconds / step)):
            self.cluster.now += step
            for worker in self.cluster.workers:
                worker_id = worker.spec.worker_id
                view = self.state.workers[worker_id]
                for rank in range(self.cluster.ranks):
                    if (worker_id, rank) not in self.silent and worker.alive:
                        self.supervisor.on_heartbeat(
                            worker_id, view.incarnation, rank, self.cluster.now
                        )
            self.supervisor.tick(self.cluster.now)

    def view(self, worker_id: int = 0) -> WorkerView:
        return self.state.workers[worker_id]

    def crash(self, worker_id: int = 0, code: int = -11) -> None:
        self.cluster.workers[worker_id].processes[0].end(code)


def test_workers_that_give_signs_of_life_are_left_alone() -> None:
    world = World(ranks=2)
    world.run(60)
    assert not world.calls and all(w.state == READY for w in world.state.workers.values())


def test_a_death_is_noticed_at_once_and_the_worker_comes_back() -> None:
    world = World()
    world.crash()
    world.run(0.25)
    assert world.view().state == DYING and world.calls == [("leave out", 0)]
    assert "died (exit code -11)" in world.view().reason
    world.run(0.25)
    assert world.view().state == RESTARTING and world.calls[-1] == ("dead", 0)
    world.run(0.25)
    assert [w for w, _ in world.cluster.restarts] == [0] and world.view().incarnation == 1
    world.run(20)
    assert world.view().state == RESTARTING, "it still loads; nobody expects a heartbeat"
    world.cluster.workers[0].loaded = True
    world.run(0.25)
    assert world.view().state == READY and world.view().reason == ""
    assert (world.view().pids, world.view().kv_capacity) == ([100], 4321)
    assert world.calls == [("leave out", 0), ("dead", 0), ("take in", 0)]
    world.run(20)
    assert world.view().state == READY and world.view(1).state == READY


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_hangs_is_enough(rank: int) -> None:
    world = World(ranks=2)
    world.silent = {(1, rank)}
    world.run(TIMEOUT)
    assert world.view(1).state == READY
    world.run(0.5)
    assert world.view(1).state in (DYING, RESTARTING)
    assert "gave no sign of life for 5." in world.view(1).reason
    assert world.cluster.workers[1].gone, "it was ended for certain"
    assert world.view(0).state == READY


def test_one_rank_that_dies_takes_the_others_along() -> None:
    world = World(ranks=3)
    world.crash()
    world.run(0.5)
    assert world.cluster.workers[0].gone and ("dead", 0) in world.calls


def test_it_is_not_buried_before_its_processes_are_gone() -> None:
    """A process in uninterruptible sleep outlives SIGKILL for a while; it may still write."""
    world = World()
    world.cluster.slow_to_die = True
    world.silent = {(0, 0)}
    world.run(30)
    assert world.view().state == DYING and ("dead", 0) not in world.calls
    world.cluster.workers[0].processes[0].end(-9)
    world.run(0.25)
    assert world.calls[-1] == ("dead", 0)


def test_it_does_not_come_back_before_the_others_have_let_go() -> None:
    world = World()
    world.unsettled = {0}
    world.crash()
    world.run(10)
    assert world.view().state == RESTARTING and not world.cluster.restarts
    world.unsettled = set()
    world.run(0.25)
    assert len(world.cluster.restarts) == 1


def test_heartbeats_of_an_earlier_incarnation_or_a_stranger_do_not_count() -> None:
    world = World()
    world.silent = {(0, 0)}
    world.view().incarnation = 1
    for _ in range(30):
        world.supervisor.on_heartbeat(0, 0, 0, world.cluster.now)
        world.supervisor.on_heartbeat(77, 0, 0, world.cluster.now)
        world.run(0.25)
    assert world.calls[0] == ("leave out", 0)


def test_the_controllers_own_pause_is_not_held_against_the_workers() -> None:
    """The machine was suspended for an hour; heartbeats of that time do not exist."""
    world = World()
    world.run(5)
    world.cluster.now += 3600
    world.supervisor.tick(world.cluster.now)
    assert not world.calls
    world.silent = {(0, 0)}
    world.run(TIMEOUT + 0.5)
    assert world.calls[0] == ("leave out", 0), "but silence after it is"


def restart_pause(world: World) -> float:
    """From the burial of worker 0 to its restart."""
    while world.view().state != RESTARTING:
        world.run(0.25)
    buried, before = world.cluster.now, len(world.cluster.restarts)
    while len(world.cluster.restarts) == before:
        world.run(0.25)
    return world.cluster.now - buried


def test_a_worker_that_served_comes_back_at_once_but_not_for_ever() -> None:
    world = World(max_restarts=4)
    for _ in range(4):
        world.crash()
        assert restart_pause(world) <= 0.3
        world.cluster.workers[0].loaded = True
        world.run(0.5)
        assert world.view().state == READY
    world.crash()
    world.run(60)
    assert world.view().state == FAILED_FOR_GOOD and len(world.cluster.restarts) == 4
    assert "restarted 4 times (--ares-max-restarts)" in world.view().reason
    assert world.calls[-1] == ("dead", 0), "its requests are recovered all the same"


def test_starts_that_fail_are_repeated_with_growing_pauses() -> None:
    world = World(max_restarts=20)
    world.crash()
    for expected in (0, 1, 2, 4, 8, 16, 32, 60, 60):
        assert restart_pause(world) == pytest.approx(expected, abs=0.3)
        world.cluster.workers[0].loaded = "out of memory"
        world.run(0.25)
    assert restart_pause(world) <= 60.3
    world.cluster.workers[0].loaded = True
    world.run(5)
    assert world.view().state == READY
    world.crash()
    assert restart_pause(world) <= 0.3, "it has served since"


def test_restarts_long_ago_do_not_count() -> None:
    world = World(max_restarts=1)
    for _ in range(3):
        world.crash()
        world.run(1)
        world.cluster.workers[0].loaded = True
        world.run(605)
        assert world.view().state == READY
    world.crash()
    world.run(1)
    world.cluster.workers[0].loaded = True
    world.run(60)
    world.crash()
    world.run(1)
    assert world.view().state == FAILED_FOR_GOOD


def test_no_restarts_at_all() -> None:
    world = World(max_restarts=0)
    world.crash()
    world.run(5)
    assert world.view().state == FAILED_FOR_GOOD and not world.cluster.restarts


def test_a_start_that_fails_counts_as_a_restart() -> None:
    world = World(max_restarts=2)
    world.crash()
    for _ in range(400):
        if world.cluster.restarts:
            world.cluster.workers[0].loaded = "out of memory"
        world.run(0.25)
    assert world.view().state == FAILED_FOR_GOOD
    assert "could not be started anew: out of memory" in world.view().reason
    assert len(world.cluster.restarts) == 2 and ("take in", 0) not in world.calls


@settings(max_examples=100)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["crash", "hang", "speak", "load", "fail"]), st.integers(0, 2)),
        max_size=40,
    )
)
def test_any_history(events: list[tuple[str, int]]) -> None:
    """Every death is told once, and before the worker comes back; in the end all are back or
    given up."""
    world = World(workers=3, max_restarts=3)
    for what, worker_id in events:
        if what == "crash":
            world.crash(worker_id)
        elif what == "hang":
            world.silent.add((worker_id, 0))
        elif what == "speak":
            world.silent.discard((worker_id, 0))
        else:
            world.cluster.workers[worker_id].loaded = True if what == "load" else "broken"
        world.run(1)
    world.silent.clear()
    for _ in range(60):
        for worker in world.cluster.workers:
            worker.loaded = True
        world.run(1)
    for worker_id in range(3):
        calls = [what for what, who in world.calls if who == worker_id]
        while calls[:2] == ["leave out", "dead"]:
            calls = calls[3:] if calls[2:3] == ["take in"] else calls[2:]
        assert calls == []
        view = world.view(worker_id)
        assert view.state in (READY, FAILED_FOR_GOOD)
        assert sum(w == worker_id for w, _ in world.cluster.restarts) == view.incarnation <= 3
