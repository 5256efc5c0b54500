"""Admission: who has room, whose turn it is, and that nobody is forgotten."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.ares_args import AresArgs
from sglang_ares.bench.workloads import RequestStream, lognormal
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulator import Simulation, SimulationConfig
from sglang_ares.simulator.config import SimulationError
from sglang_ares.simulator.decode_worker import DecodeWorker
from sglang_ares.simulator.roles import RolesConfig
from sglang_ares.srt.managers.admission_queue import AdmissionQueue
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import Ownership, WorkerView
from sglang_ares.srt.managers.dispatcher import Dispatcher, Sent
from sglang_ares.srt.managers.io_struct import LoadUpdate, WorkerReport
from sglang_ares.srt.managers.length_predictions import LengthPredictions
from sglang_ares.srt.managers.mover import Mover
from sglang_ares.srt.policy.admission import kept_for_oldest, next_in_turn, room
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import DECODE, PREFILL, RequestLoad, StepTime, WorkerLoad

SLO_S = 2.0
PROFILE = load_profile("24gb-qwen2.5-7b")


# --- room -----------------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 2000),
    held=st.integers(0, 2000),
    promised=st.integers(0, 500),
    running=st.integers(0, 4),
    reserved=st.integers(1, 300),
)
def test_there_is_room_where_upstream_would_admit(
    tokens: int, held: int, promised: int, running: int, reserved: int
) -> None:
    """The same as the simulated worker, which admits as upstream does."""
    law = StepTime(fixed_ms=1, per_request_ms=0, per_token_ms=0)
    worker = DecodeWorker(law, capacity=2000, max_running=99, reserved=reserved, gaps=[0.0] * 9)
    for request in range(running):
        worker.take(request, held // running, 5, 0.0)
    if promised:
        worker.promise(promised)
    table = WorkerTable.of(
        [
            WorkerLoad(
                worker_id=0,
                role=DECODE,
                kv_tokens=worker.tokens,
                kv_capacity=2000,
                running=running,
                queued=worker.coming,
                queued_tokens=worker.promised,
                decode_step_ms=0.0,
            )
        ]
    )
    assert (room(table, reserved)[0] >= tokens) == worker.has_room(tokens)


# --- turns ----------------------------------------------------------------------------------------


def turn(
    arrived: list[float],
    now: float,
    admitted: int = 0,
    tokens: list[int] | None = None,
    free: tuple[int, ...] = (10,),
) -> int | None:
    """Whose turn it is; all are alike and there is room unless it is said otherwise."""
    tokens = tokens or [10] * len(arrived)
    found = next_in_turn(arrived, tokens, np.array(free), now, SLO_S, admitted)
    return None if found is None else found.request


def test_the_oldest_of_those_in_time_is_next() -> None:
    arrived = [0.0, 5.0, 8.5, 9.0, 9.9]
    assert turn(arrived, 10.0) == 2
    assert turn(arrived, 9.0) == 2
    assert turn([9.0], 10.0) == 0


def test_the_oldest_is_next_when_all_are_late() -> None:
    assert turn([0.0, 1.0, 2.0], 10.0) == 0


def test_small_ones_pass_what_does_not_fit_but_for_the_oldest_in_its_turn() -> None:
    arrived, tokens = [0.0, 9.0, 9.5], [50, 80, 20]
    for most, admitted, expected in (
        (100, 0, 1),
        (60, 0, 2),
        (10, 0, None),
        (60, 7, 0),
        (40, 7, None),
        (40, 8, 2),
    ):
        assert turn(arrived, 10.0, admitted, tokens, (most,)) == expected
    assert turn([0.0, 9.0], 10.0, 0, [50, 80], (60,)) == 0


def test_in_the_turn_of_the_oldest_the_roomiest_worker_is_kept_for_it() -> None:
    """If it is late; before, nobody passes it."""
    tokens = [50, 35, 20]

    def next_one(*free: int, oldest_s: float = 0.0) -> tuple[int, list[int], bool] | None:
        arrived = [oldest_s, 9.0, 9.5]
        found = next_in_turn(arrived, tokens, np.array(free), 10.0, SLO_S, 7)
        return None if found is None else (found.request, found.rows.tolist(), found.counts)

    assert next_one(30, 40, 25) == (2, [0, 2], False)
    assert next_one(30, 60, 50) == (0, [1, 2], True)
    assert next_one(40, 40, 10) == (1, [1], False)
    assert next_one(10, 40, 10) is None
    assert next_one(30, 40, 25, oldest_s=8.5) is None
    assert next_one(30, 60, 50, oldest_s=8.5) == (0, [1, 2], True)


def test_the_worker_that_is_kept_stays_the_same_until_the_oldest_is_in() -> None:
    """However much room there is elsewhere, as long as it is not enough."""
    arrived, tokens = [0.0, 9.0, 9.5], [50, 35, 20]

    def kept(*free: int, kept: int | None, admitted: int = 7, now: float = 10.0) -> int | None:
        return kept_for_oldest(arrived, tokens, np.array(free), now, SLO_S, admitted, kept)

    assert kept(30, 40, kept=None) == 1
    assert kept(45, 40, kept=1) == 1
    assert kept(50, 40, kept=1) is None
    assert kept(45, 40, kept=1, admitted=8) is None
    assert kept(45, 40, kept=1, now=1.0) is None
    found = next_in_turn(arrived, tokens, np.array([45, 48]), 10.0, SLO_S, 7, kept=0)
    assert found is not None and (found.request, found.rows.tolist()) == (1, [1])
    assert kept_for_oldest([], [], np.array([5]), 10.0, SLO_S, 7, 0) is None


@given(
    ages=st.lists(st.floats(0, 9), max_size=6),
    sizes=st.lists(st.integers(1, 100), min_size=6, max_size=6),
    free=st.lists(st.integers(-50, 100), min_size=2, max_size=4),
    admitted=st.integers(0, 16),
    before=st.sampled_from([None, 0, 1]),
)
def test_nobody_is_let_into_the_worker_that_is_kept(
    ages: list[float], sizes: list[int], free: list[int], admitted: int, before: int | None
) -> None:
    tokens = sizes[: len(ages)]
    waiting = sorted(9.0 - age for age in ages), tokens, np.array(free), 9.0, SLO_S, admitted
    kept = kept_for_oldest(*waiting, before)
    found = next_in_turn(*waiting, kept)
    if kept is not None:
        assert before in (None, kept)
        assert found is None or (found.request and kept not in found.rows)
    elif admitted % 8 == 7:
        assert found is None or found.request == 0


@given(
    ages=st.lists(st.floats(0, 9), max_size=6),
    sizes=st.lists(st.integers(1, 100), min_size=6, max_size=6),
    free=st.lists(st.integers(-50, 100), min_size=1, max_size=4),
    admitted=st.integers(0, 16),
)
def test_who_is_let_in_fits_and_keeps_the_oldest_from_nothing(
    ages: list[float], sizes: list[int], free: list[int], admitted: int
) -> None:
    tokens = sizes[: len(ages)]
    arrived = sorted(9.0 - age for age in ages)
    found = next_in_turn(arrived, tokens, np.array(free), 9.0, SLO_S, admitted)
    fitting = [i for i, size in enumerate(tokens) if size <= max(free)]
    if found is None:
        others = sorted(free)[:-1] or [-1]
        in_time = bool(tokens) and arrived[0] > 9.0 - 0.85 * SLO_S
        kept = min(tokens, default=0) > max(others) or (in_time and tokens[0] > max(free))
        assert not fitting or (admitted % 8 == 7 and kept)
        return
    assert found.request in fitting and len(found.rows)
    assert all(free[row] >= tokens[found.request] for row in found.rows)
    if admitted % 8 == 7 and found.request:
        assert tokens[0] > max(free)
        most_left = max(
            free[row] - tokens[found.request] * (row in found.rows) for row in range(len(free))
        )
        assert most_left == max(free) and not found.counts


@given(rate=st.integers(1, 20), seed=st.integers(0, 1000))
def test_nobody_waits_for_ever(rate: int, seed: int) -> None:
    """However many arrive in time, the late ones come to their turn, in order."""
    rng = np.random.default_rng(seed)
    waiting = [(-100.0, i) for i in range(5)]
    let_in: list[int] = []
    for admitted in range(40):
        now = float(admitted)
        waiting += sorted((now - rng.random(), 99) for _ in range(rate))
        at = turn([arrived for arrived, _ in waiting], now, admitted)
        assert at is not None
        let_in.append(waiting.pop(at)[1])
    assert [i for i in let_in if i != 99] == [0, 1, 2, 3, 4]


# --- the queue of the controller ------------------------------------------------------------------


class Queue(AdmissionQueue):
    """The real one; workers with ``rooms`` for more tokens, the roomiest of which is chosen."""

    def __init__(self, *rooms: int) -> None:
        self.ids = np.arange(len(rooms))
        self.free_tokens = np.array(rooms)
        self.no_worker = False
        # Requests that have to stay on the server's host, and what becomes of them.
        self.tied: dict[str, Sent] = {}
        self.missing: str | None = None
        self.sent: list[str] = []
        self.answered: list[tuple[str, int | None, str]] = []
        self.state = ClusterState([])
        super().__init__(
            self.state,
            SLO_S,
            lambda: None if self.no_worker else (self.ids, self.free_tokens),
            self.try_to_send,
            lambda: self.missing,
            self.answer,
        )
        self.use("slo")

    def try_to_send(self, owner: Ownership, among: Collection[int] | None) -> Sent:
        if owner.rid in self.tied:
            return self.tied[owner.rid]
        size = len(owner.request.input_ids)
        chosen = max(among or range(len(self.free_tokens)), key=lambda i: self.free_tokens[i])
        assert among is None or size <= self.free_tokens[chosen]
        self.free_tokens[chosen] -= size
        self.sent.append(owner.rid)
        return Sent.SENT

    def answer(self, owner: Ownership, status: int | None, reason: str) -> None:
        self.answered.append((owner.rid, status, reason))

    def come(self, rid: str, at: float, tokens: int = 1) -> Ownership:
        request = SimpleNamespace(input_ids=[1] * tokens)
        owner = Ownership(rid, request, -1, -1, dispatched_at=at)
        self.arrive(owner)
        self.let_in(at)
        return owner

    def free(self, room: int, now: float, worker: int = 0) -> None:
        self.free_tokens[worker] = room
        self.cluster_changed()
        self.let_in(now)


def test_requests_pass_while_there_is_room_and_then_wait() -> None:
    queue = Queue(1)
    queue.come("a", 0.0)
    queue.come("b", 0.1)
    assert queue.sent == ["a"] and len(queue) == 1 and queue.admitted == 0
    queue.let_in(0.2)
    assert queue.sent == ["a"]
    queue.free(1, 0.3)
    assert queue.sent == ["a", "b"] and not len(queue) and queue.admitted == 1


def test_late_ones_yield_and_come_last() -> None:
    queue = Queue(0)
    for rid, at in (("late", 0.0), ("later", 0.5), ("in time", 3.0), ("new", 3.5)):
        queue.come(rid, at)
    queue.free(4, 4.0)
    assert queue.sent == ["in time", "new", "late", "later"]


def test_small_ones_that_never_wait_do_not_starve_a_large_one() -> None:
    """Each fits as it comes; after some of them the large one has its turn, and they wait."""
    queue = Queue(10)
    queue.come("large", 0.0, tokens=50)
    for i in range(20):
        queue.free(10, float(i))
        queue.come(f"small {i}", i + 0.5)
    assert len([rid for rid in queue.sent if rid.startswith("small")]) == 7
    queue.free(60, 30.0)
    assert queue.sent[7] == "large"


def test_while_one_worker_is_kept_for_a_large_one_the_others_go_on() -> None:
    queue = Queue(10, 20)
    queue.come("large", 0.0, tokens=50)
    for i in range(20):
        queue.free(10, float(i))
        queue.come(f"small {i}", i + 0.5)
    # Seven took from the roomier one before it was kept.
    assert len(queue.sent) == 20 and queue.free_tokens[1] == 20 - 7
    queue.free(50, 30.0, worker=1)
    assert queue.sent[20:] == ["large"]


def with_a_large_one_that_waits() -> tuple[Queue, Ownership]:
    """Late, in its turn, and worker 1 is kept for it."""
    queue = Queue(10, 20)
    large = queue.come("large", 0.0, tokens=50)
    assert queue.state.kept is None
    for i in range(8):
        queue.come(f"small {i}", 5.0)
    assert queue.state.kept == 1
    return queue, large


def test_the_worker_that_is_kept_is_known_until_the_large_one_is_in() -> None:
    queue, _ = with_a_large_one_that_waits()
    queue.free(40, 6.0, worker=0)
    assert queue.state.kept == 1
    queue.come("small", 6.1, tokens=30)
    assert queue.sent[-1] == "small" and queue.state.kept == 1
    queue.free(50, 7.0, worker=1)
    assert queue.sent[-1] == "large" and queue.state.kept is None


def test_no_worker_is_kept_for_one_that_has_left() -> None:
    queue, large = with_a_large_one_that_waits()
    queue.remove(large)
    queue.let_in(6.0)
    assert queue.state.kept is None
    queue, _ = with_a_large_one_that_waits()
    queue.use("worker")
    queue.let_in(6.0)
    assert queue.sent[-1] == "large" and queue.state.kept is None


def test_another_worker_is_kept_when_the_one_that_was_is_lost() -> None:
    queue, _ = with_a_large_one_that_waits()
    queue.ids, queue.free_tokens = np.array([0, 2]), np.array([5, 15])
    queue.cluster_changed()
    queue.let_in(6.0)
    assert queue.state.kept == 2


def test_one_that_is_tied_to_a_host_holds_up_nobody() -> None:
    """Neither while its host is full nor, in the turn of the oldest, ever."""
    queue = Queue(0)
    queue.tied["tied"] = Sent.NOT_AMONG
    queue.come("tied", 0.0)
    for i in range(20):
        queue.come(f"free {i}", 1.0 + i)
    queue.free(20, 50.0)
    assert queue.sent == [f"free {i}" for i in range(20)]
    queue.tied["tied"] = Sent.NO_WORKER
    queue.free(1, 51.0)
    assert queue.answered == [("tied", 503, "no worker of the server's own host takes requests")]


def test_those_that_wait_go_to_the_workers_when_it_is_to_be_waited_there() -> None:
    queue = Queue(0)
    for i in range(3):
        queue.come(str(i), float(i))
    assert queue.use("worker") is None
    queue.let_in(10.0)
    assert queue.sent == ["0", "1", "2"] and not len(queue)


def test_who_leaves_does_not_hold_up_the_others() -> None:
    queue = Queue(0)
    first = queue.come("first", 0.0)
    queue.come("second", 0.1)
    queue.remove(first)
    queue.free(1, 0.2)
    assert queue.sent == ["second"]
    assert "first" not in queue.state.owners


def test_without_workers_new_ones_are_told_and_old_ones_wait() -> None:
    """Workers that start anew come back; those that are given up do not."""
    queue = Queue(0)
    queue.come("old", 0.0)
    queue.no_worker = True
    queue.free(0, 0.1)
    assert not queue.answered and len(queue) == 1
    empty = Queue(0)
    empty.no_worker = True
    empty.come("new", 0.0)
    assert empty.answered == [("new", 503, "all workers of a role are starting anew")]
    queue.missing = "no decode worker is left"
    queue.free(0, 0.3)
    assert queue.answered == [("old", 503, "no decode worker is left")]
    assert not queue.state.owners and not len(queue)


def test_admission_by_slo_needs_one() -> None:
    queue = AdmissionQueue(
        ClusterState([]),
        0.0,
        lambda: None,
        lambda owner, among: Sent.SENT,
        lambda: None,
        lambda *answer: None,
        AresArgs().why_not_by_slo,
    )
    assert "--ares-ttft-slo-ms" in str(queue.use("slo"))
    assert queue.admission == "worker" and queue.use("worker") is None


# --- simulated ------------------------------------------------------------------------------------


def stream(rate: float) -> RequestStream:
    return lognormal(rate=rate, duration_s=120, seed=3, output_mean=600, output_cv=1.5, cap=8000)


def run(capacity: int, rate: float, **changes: Any) -> Any:
    config = SimulationConfig(
        decode_workers=4,
        profile=msgspec.structs.replace(PROFILE, kv_capacity_tokens=capacity),
        placement="least_tokens",
        ttft_slo_ms=2000.0,
        **changes,
    )
    return Simulation(config, stream(rate)).run()


def test_where_nobody_has_to_wait_nothing_changes() -> None:
    bound, held = run(1_000_000, 2.0), run(1_000_000, 2.0, admission="slo")
    np.testing.assert_array_equal(bound.finished_s, held.finished_s)


def test_where_memory_is_short_more_are_in_time() -> None:
    bound, held = run(20_000, 8.0), run(20_000, 8.0, admission="slo")
    assert bound.attainment() < 0.9
    assert held.attainment() > bound.attainment() + 0.05


def wait_of_a_large_one(rescheduling: str) -> float:
    """Seconds to the first token of a prompt that needs most of a worker, among small ones that
    fill both workers before and after it."""
    rng = np.random.default_rng(1)
    small = 500
    arrival_s = np.cumsum(rng.exponential(1 / 2.5, small))
    prompt, output = rng.integers(1000, 3000, small), rng.integers(500, 1500, small)
    large = int(np.searchsorted(arrival_s, 50.0))
    config = SimulationConfig(
        prefill_workers=8,
        decode_workers=2,
        placement="least_tokens",
        admission="slo",
        rescheduling=rescheduling,
        ttft_slo_ms=5000.0,
    )
    requests = RequestStream(
        name="one large",
        origin="drawn",
        arrival_s=np.insert(arrival_s, large, 50.0),
        prompt_tokens=np.insert(prompt, large, 0.8 * PROFILE.kv_capacity_tokens),
        output_tokens=np.insert(output, large, 200),
    )
    return float(Simulation(config, requests).run().ttft_s[large])


@pytest.mark.parametrize("rescheduling", ["reactive", "star", "ares"])
def test_no_moves_fill_the_worker_that_is_kept_for_a_large_one(rescheduling: str) -> None:
    assert wait_of_a_large_one(rescheduling) < 1.25 * wait_of_a_large_one("none")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"admission": "slo", "ttft_slo_ms": 0.0}, "set ttft_slo_ms"),
        ({"admission": "nobodys"}, "choose one of: worker, slo"),
        (
            {"admission": "slo", "tpot_slo_ms": 50.0, "roles": RolesConfig(policy="arrow")},
            "set admission to 'worker'",
        ),
    ],
)
def test_what_cannot_be_simulated_is_said(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(SimulationError, match=remedy):
        SimulationConfig(**({"ttft_slo_ms": 2000.0} | changes))


# --- what the controller knows of room ------------------------------------------------------------


def load(worker_id: int, kv_tokens: int, *rids: str) -> WorkerLoad:
    requests = tuple(
        RequestLoad(rid=rid, tokens=10, output_tokens=1, age_s=0.0, since_move_s=0.0, movable=True)
        for rid in rids
    )
    return WorkerLoad(
        worker_id=worker_id,
        role=DECODE,
        kv_tokens=kv_tokens,
        kv_capacity=1000,
        running=len(rids),
        queued=0,
        queued_tokens=0,
        requests=requests,
    )


def two_decode_workers() -> ClusterState:
    state = ClusterState([WorkerView(i, role, [], 1000) for i, role in enumerate(ROLES)])
    for worker_id in (1, 2):
        pools: Any = None
        state.note_report(
            WorkerReport(
                worker_id=worker_id,
                incarnation=0,
                load=load(worker_id, 900, "a#00", "b#00"),
                finished=[],
                pools=pools,
                migrations_in=0,
                migrations_out=0,
                retracted=0,
                decode_step_ms=1.0,
            )
        )
    return state


ROLES = (PREFILL, DECODE, DECODE)


def test_an_early_load_replaces_the_reported_one() -> None:
    state = two_decode_workers()
    view = state.workers[2]
    view.dispatched = {"c#00": 30, "d#00": 40}
    state.note_load(LoadUpdate(worker_id=2, incarnation=0, load=load(2, 300, "c#00")))
    assert (view.load().kv_tokens, view.load().queued_tokens) == (300, 40)
    assert [r.rid for r in view.load().requests] == ["c#00"]
    state.note_load(LoadUpdate(worker_id=2, incarnation=7, load=load(2, 0)))
    assert view.load().kv_tokens == 300
    assert state.fault(LoadUpdate(worker_id=0, incarnation=0, load=load(0, 0))) is not None
    state.note_lost(2)
    state.note_load(LoadUpdate(worker_id=2, incarnation=0, load=load(2, 5)))
    assert view.report is None


def test_a_request_goes_to_one_of_the_workers_that_are_named() -> None:
    """By the worker's id, not by its place among those that are."""
    state = two_decode_workers()
    nothing: Any = None
    dispatcher = Dispatcher(
        state, nothing, [], "least_tokens", nothing, nothing, LengthPredictions(use_prior=True), 100
    )

    def rooms() -> dict[int, int] | None:
        found = dispatcher.rooms()
        return None if found is None else dict(zip(*map(np.ndarray.tolist, found), strict=True))

    assert rooms() == {1: 1000 - 900 - 3 * 100, 2: 1000 - 900 - 3 * 100}
    assert dispatcher.choose(50, among={0}) is Sent.NOT_AMONG
    assert dispatcher.choose(50) == (0, 1)
    state.note_load(LoadUpdate(worker_id=2, incarnation=0, load=load(2, 300, "a#00")))
    assert rooms() == {1: -200, 2: 500}
    assert dispatcher.choose(500, among={2}) == (0, 2)
    assert dispatcher.choose(500, among={1}) == (0, 1)
    state.workers[0].draining = True
    assert rooms() is None
    assert dispatcher.choose(1, among={1, 2}) is Sent.NO_WORKER


def test_nothing_is_moved_to_the_worker_that_is_kept() -> None:
    """Off it, requests may still be moved."""
    state = two_decode_workers()
    args = AresArgs(move_cooldown=0.0, rescheduling="reactive", min_gap_tokens=1)
    mover = Mover(state, args, 0, lambda *_: None, LengthPredictions(use_prior=True), now=0.0)

    def moves(kept: int | None) -> set[tuple[int, int]]:
        state.kept = kept
        state.moving.clear()
        mover.run_round()
        return {(move.source, move.target) for move in state.moving.values()}

    state.note_load(LoadUpdate(worker_id=2, incarnation=0, load=load(2, 300, "c#00")))
    assert moves(kept=None) == {(1, 2)}
    assert moves(kept=2) == set()
    assert moves(kept=1) == {(1, 2)}
