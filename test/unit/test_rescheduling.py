"""What every rescheduling policy keeps to, whatever the cluster; and what ours and STAR are for."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import RequestTable, Snapshot, WorkerTable
from sglang_ares.srt.policy.types import (
    LEVELS,
    Move,
    MoveCost,
    RescheduleLimits,
    WorkerLoad,
)
from unit.policy_clusters import (
    LIMITS,
    after,
    clusters,
    exactly,
    planned,
    request,
    worker,
)

ALL = RESCHEDULING.names()
SERVED = RESCHEDULING.served_names()
PREDICTIVE = ("star", "ares")


def test_the_oracle_is_no_choice_of_a_controller() -> None:
    assert set(ALL) - set(SERVED) == {"oracle"}
    assert set(SERVED) == {"none", "reactive", "star", "ares"}


def test_reactive_does_not_spend_room_that_a_move_has_yet_to_clear() -> None:
    # The second move would go to worker 3, where only what the first takes away leaves room.
    workers = [
        worker(3, [request("a", 2)], capacity=3, queued_tokens=2),
        worker(5, [], capacity=2),
        worker(7, [request("b", 3, movable=False), request("c", 1)], capacity=5),
    ]
    limits = RescheduleLimits(
        max_moves=2, threshold=0.0, min_gap_tokens=0, headroom_tokens=0, cooldown_s=0.0
    )
    assert [m.rid for m in planned("reactive", workers, limits)] == ["a"]


# --- rules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@given(workers=clusters(), limits=LIMITS)
def test_moves_are_possible(name: str, workers: list[WorkerLoad], limits: RescheduleLimits) -> None:
    moves = planned(name, workers, limits)
    home = {r.rid: (w.worker_id, r) for w in workers for r in w.requests}
    free = {w.worker_id: w.free_tokens for w in workers}
    assert len({m.rid for m in moves}) == len(moves), "a request is moved twice"
    for move in moves:
        source, request = home[move.rid]
        assert move.source == source
        assert move.target != source
        assert request.movable
        # What leaves a worker must not be needed to make room for what comes.
        free[move.target] -= request.tokens
        assert free[move.target] >= limits.headroom_tokens


@pytest.mark.parametrize("name", SERVED)
@given(workers=clusters(), limits=LIMITS)
def test_limits_are_kept(name: str, workers: list[WorkerLoad], limits: RescheduleLimits) -> None:
    moves = planned(name, workers, limits)
    requests = {r.rid: r for w in workers for r in w.requests}
    moved = [requests[m.rid] for m in moves]
    assert len(moves) <= limits.max_moves
    assert all(r.since_move_s >= limits.cooldown_s for r in moved)
    budget = limits.cost.budget_tokens
    assert not budget or sum(r.tokens for r in moved) <= budget


@pytest.mark.parametrize("name", ALL)
@given(workers=clusters(), limits=LIMITS, closed=st.sets(st.sampled_from([3, 5, 7, 9])))
def test_nothing_is_moved_to_a_closed_worker(
    name: str, workers: list[WorkerLoad], limits: RescheduleLimits, closed: set[int]
) -> None:
    limits = msgspec.structs.replace(limits, closed=frozenset(closed))
    assert not {m.target for m in planned(name, workers, limits)} & closed


@pytest.mark.parametrize("name", ALL)
@given(workers=clusters(), limits=LIMITS)
def test_a_policy_is_a_function(
    name: str, workers: list[WorkerLoad], limits: RescheduleLimits
) -> None:
    cluster = Snapshot.of(workers)
    first = RESCHEDULING.get(name)(cluster, limits)
    assert RESCHEDULING.get(name)(cluster, limits) == first, "it wrote into its input"
    assert planned(name, workers, limits) == first


@pytest.mark.parametrize("name", SERVED)
@given(workers=clusters())
@settings(deadline=None)
def test_a_cluster_comes_to_rest(name: str, workers: list[WorkerLoad]) -> None:
    """Applied to its own result (no cooldown, nothing grows), a policy stops moving."""
    limits = RescheduleLimits(max_moves=4, threshold=0.0, min_gap_tokens=1, cooldown_s=0.0)
    seen = 0
    while moves := planned(name, workers, limits):
        seen += len(moves)
        assert seen <= 200, "requests are moved back and forth"
        workers = after(workers, moves)


@pytest.mark.parametrize("name", ALL)
@given(workers=clusters(min_size=1))
def test_one_worker_keeps_its_requests(name: str, workers: list[WorkerLoad]) -> None:
    assert planned(name, workers[:1], RescheduleLimits()) == ()


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_do(name: str) -> None:
    assert planned(name, [], RescheduleLimits()) == ()
    assert planned(name, [worker(0, []), worker(1, [])], RescheduleLimits()) == ()


# --- what they are for ----------------------------------------------------------------------

# Two workers hold the same now; the requests of one have just begun, those of the other are ending.
LASTING = [
    worker(0, [request(f"long{i}", 20_000, exactly(20_000)) for i in range(8)]),
    worker(1, [request(f"short{i}", 20_000, exactly(100)) for i in range(8)]),
]


@pytest.mark.parametrize("name", PREDICTIVE)
def test_a_gap_that_is_only_predicted_is_closed(name: str) -> None:
    assert planned("reactive", LASTING, RescheduleLimits()) == ()
    moves = planned(name, LASTING, RescheduleLimits())
    assert moves
    assert all((m.source, m.target) == (0, 1) for m in moves)


@pytest.mark.parametrize("name", ["reactive", *PREDICTIVE])
def test_requests_leave_a_closed_worker_and_pass_by_another(name: str) -> None:
    crowded = [request(f"r{i}", 20_000, exactly(20_000)) for i in range(8)]
    workers = [worker(0, crowded), worker(1, []), worker(2, [])]
    moves = planned(name, workers, RescheduleLimits(max_moves=4, closed=frozenset({0, 1})))
    assert {(m.source, m.target) for m in moves} == {(0, 2)}


@pytest.mark.parametrize("name", PREDICTIVE)
def test_a_request_about_to_end_stays(name: str) -> None:
    slow = MoveCost(tokens_per_s=1000.0)
    ending = [request(f"e{i}", 5000, exactly(20)) for i in range(8)]
    lasting = [request(f"l{i}", 5000, exactly(20_000)) for i in range(8)]
    workers = [worker(0, ending + lasting), worker(1, [])]
    moves = planned(name, workers, RescheduleLimits(max_moves=4, cost=slow))
    assert moves
    assert all(m.rid.startswith("l") for m in moves)
    assert planned(name, [worker(0, ending), worker(1, [])], RescheduleLimits(cost=slow)) == ()


@pytest.mark.parametrize("name", ["reactive", *PREDICTIVE])
def test_without_predictions_the_loaded_worker_is_relieved(name: str) -> None:
    workers = [worker(0, [request(f"r{i}", 20_000) for i in range(8)]), worker(1, [])]
    moves = planned(name, workers, RescheduleLimits(max_moves=4))
    assert {(m.source, m.target) for m in moves} == {(0, 1)}
    assert len(moves) == 4


def test_ares_foresees_that_memory_runs_out() -> None:
    """Both workers hold the same, and their steps are fast: only memory speaks for a move."""
    workers = [
        worker(0, [request(f"g{i}", 9000, exactly(9000)) for i in range(8)], capacity=80_000),
        worker(1, [request(f"s{i}", 9000, exactly(50)) for i in range(8)], capacity=95_000),
    ]
    moves = planned("ares", workers, RescheduleLimits())
    assert moves
    assert all((m.source, m.target) == (0, 1) for m in moves)


def uneven(capacity: int, queued_tokens: int = 0) -> list[WorkerLoad]:
    """Twelve requests on one worker and four on the other, and perhaps some that wait."""
    return [
        worker(
            0,
            [request(f"a{i}", 4000, exactly(4000)) for i in range(12)],
            capacity=1_000_000,
            queued_tokens=queued_tokens,
        ),
        worker(1, [request(f"b{i}", 4000, exactly(4000)) for i in range(4)], capacity=capacity),
    ]


@pytest.mark.parametrize(("reserved", "room"), [(0, 4000), (512, 4000 + 5 * 512)])
def test_ares_leaves_its_targets_room_for_arrivals(reserved: int, room: int) -> None:
    """A tenth of the memory, and what admission reserves for each request and for one more."""
    limits = RescheduleLimits(max_moves=1, headroom_tokens=256, reserved_tokens=reserved)
    needed = 16_000 + 256 + room
    enough = -(-needed * 10 // 9) + 2
    assert planned("ares", uneven(enough), limits)
    assert planned("ares", uneven(enough - 4), limits) == ()


def test_ares_counts_what_each_of_its_moves_reserves() -> None:
    limits = RescheduleLimits(max_moves=4, headroom_tokens=0, reserved_tokens=512)
    # Room for two: a tenth of 33,000 is kept, and 512 for each of six requests.
    assert len(planned("ares", uneven(16_000 + 2 * 4000 + 6 * 512 + 3300 + 500), limits)) == 2


@pytest.mark.parametrize("policy", ["star", "ares"])
def test_requests_that_wait_for_memory_are_let_in(policy: str) -> None:
    """Where the steps are equal, requests leave the worker that has a queue."""

    def even(queued_tokens: int) -> list[WorkerLoad]:
        return [
            worker(
                0,
                [request(f"a{i}", 4000, exactly(4000)) for i in range(8)],
                queued_tokens=queued_tokens,
            ),
            worker(1, [request(f"b{i}", 4000, exactly(4000)) for i in range(8)]),
        ]

    moves = planned(policy, even(16_000), RescheduleLimits())
    assert moves
    assert all((m.source, m.target) == (0, 1) for m in moves)
    assert planned(policy, even(0), RescheduleLimits()) == ()


def test_ares_does_not_move_what_does_not_pay() -> None:
    """The gap is above the threshold, but a pause costs more than it saves."""
    workers = [
        worker(0, [request(f"a{i}", 100, (10.0, 50.0, 90.0, 120.0)) for i in range(4)]),
        worker(1, [request("b", 100, (10.0, 50.0, 90.0, 120.0))]),
    ]
    limits = RescheduleLimits(min_gap_tokens=1)
    assert planned("reactive", workers, limits)
    assert planned("ares", workers, limits) == ()


def test_ares_counts_the_promised_time() -> None:
    """A small gap across the promised time per token is worth a move that it is not worth else."""
    workers = [
        worker(0, [request(f"a{i}", 4000, exactly(2000)) for i in range(30)]),
        worker(1, [request(f"b{i}", 4000, exactly(2000)) for i in range(26)]),
    ]
    limits = RescheduleLimits(threshold=0.0, cost=MoveCost(pause_s=0.5))
    slo = RescheduleLimits(threshold=0.0, cost=MoveCost(pause_s=0.5), tpot_slo_ms=11.5)
    assert len(planned("ares", workers, slo)) >= len(planned("ares", workers, limits))


# --- speed ----------------------------------------------------------------------------------


def large(workers: int, requests: int, seed: int = 0) -> Snapshot:
    """A cluster with lognormal lengths and predictions."""
    rng = np.random.default_rng(seed)
    count = workers * requests
    where = np.sort(rng.integers(0, workers, count))
    tokens = rng.lognormal(8, 1, count).astype(np.int64) + 1
    held = np.bincount(where, tokens, workers).astype(np.int64)
    running = np.bincount(where, minlength=workers)
    median = rng.lognormal(8, 1, count)
    table = WorkerTable(
        worker_id=np.arange(workers),
        kv_tokens=held,
        kv_capacity=np.full(workers, int(held.max() * 1.1)),
        running=running,
        queued=np.zeros(workers, np.int64),
        queued_tokens=np.zeros(workers, np.int64),
        remaining_tokens=np.bincount(where, median, workers),
        step_ms=np.tile([5.0, 0.02, 5e-5], (workers, 1)),
    )
    return Snapshot(
        table,
        RequestTable(
            rids=[str(i) for i in range(count)],
            worker=where,
            tokens=tokens,
            output_tokens=tokens // 2,
            remaining=median[:, None] * np.exp(np.linspace(-1, 1.5, len(LEVELS))),
            since_move_s=np.full(count, 100.0),
            movable=np.ones(count, np.bool_),
        ),
    )


@pytest.mark.parametrize("name", PREDICTIVE)
def test_a_large_cluster_is_planned_quickly(name: str) -> None:
    """1,024 workers; benchmark/bench_policies.py measures, this catches a wrong order of growth."""
    cluster, limits = large(1024, 64), RescheduleLimits(max_moves=16)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        moves: tuple[Move, ...] = RESCHEDULING.get(name)(cluster, limits)
        took.append(time.perf_counter() - start)
        assert len(moves) == 16
    assert min(took) < 1.0
