"""Placement and rescheduling policies, and their registry: pure functions of snapshots."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.policy import placement, rescheduling  # noqa: F401  (they register)
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING, Registry
from sglang_ares.srt.policy.snapshot import Snapshot, WorkerTable
from sglang_ares.srt.policy.types import (
    DECODE,
    Move,
    NewRequest,
    RequestLoad,
    RescheduleLimits,
    WorkerLoad,
)

PLACEMENTS = PLACEMENT.names()


def placed(name: str, request: NewRequest, workers: list[WorkerLoad]) -> int:
    """The id of the worker that placement policy ``name`` chooses."""
    return workers[PLACEMENT.get(name)(request, WorkerTable.of(workers))].worker_id


def planned(
    workers: list[WorkerLoad], limits: RescheduleLimits, name: str = "reactive"
) -> tuple[Move, ...]:
    """The moves that rescheduling policy ``name`` plans."""
    return RESCHEDULING.get(name)(Snapshot.of(workers), limits)


def load_of(
    worker_id: int,
    tokens: list[int] | None = None,
    *,
    capacity: int = 100_000,
    queued_tokens: int = 0,
    running: int | None = None,
    extra_tokens: int = 0,
) -> WorkerLoad:
    """A decode worker with movable requests of the given sizes."""
    requests = tuple(
        RequestLoad(
            rid=f"{worker_id}-{i}",
            tokens=n,
            output_tokens=1,
            age_s=100.0,
            since_move_s=100.0,
            movable=True,
        )
        for i, n in enumerate(tokens or [])
    )
    return WorkerLoad(
        worker_id=worker_id,
        role=DECODE,
        kv_tokens=sum(tokens or []) + extra_tokens,
        kv_capacity=capacity,
        running=len(requests) if running is None else running,
        queued=0,
        queued_tokens=queued_tokens,
        requests=requests,
    )


def new(sequence: int, prompt: int = 10) -> NewRequest:
    return NewRequest(prompt_tokens=prompt, sequence=sequence)


REQUEST_SHAPES = st.tuples(
    st.integers(1, 3000),  # tokens
    st.floats(0, 5),  # since_move_s
    st.booleans(),  # movable
)
WORKER_SHAPES = st.tuples(
    st.lists(REQUEST_SHAPES, max_size=6),
    st.integers(0, 2000),  # tokens of no listed request
    st.integers(0, 2000),  # queued tokens
    st.integers(0, 20_000),  # capacity beyond what is held
)


def worker_from(
    worker_id: int, shape: tuple[list[tuple[int, float, bool]], int, int, int]
) -> WorkerLoad:
    requests, extra, queued_tokens, spare = shape
    held = sum(r[0] for r in requests) + extra
    return WorkerLoad(
        worker_id=worker_id,
        role=DECODE,
        kv_tokens=held,
        kv_capacity=held + spare,
        running=len(requests),
        queued=1 if queued_tokens else 0,
        queued_tokens=queued_tokens,
        requests=tuple(
            RequestLoad(
                rid=f"{worker_id}-{i}",
                tokens=tokens,
                output_tokens=1,
                age_s=10.0,
                since_move_s=since,
                movable=movable,
            )
            for i, (tokens, since, movable) in enumerate(requests)
        ),
    )


CLUSTERS = st.lists(WORKER_SHAPES, min_size=1, max_size=6).map(
    lambda shapes: [worker_from(3 + 2 * i, shape) for i, shape in enumerate(shapes)]
)
LIMITS = st.builds(
    RescheduleLimits,
    max_moves=st.integers(0, 6),
    threshold=st.floats(0, 1),
    min_gap_tokens=st.integers(0, 500),
    headroom_tokens=st.integers(0, 300),
    cooldown_s=st.floats(0, 4),
)


# --- snapshots ------------------------------------------------------------------------------


def test_load_and_room_of_a_worker() -> None:
    worker = load_of(0, [100, 50], capacity=400, queued_tokens=30)
    assert worker.load_tokens == 180 and worker.free_tokens == 220
    assert load_of(0, [500], capacity=400).free_tokens == 0


def test_snapshots_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        load_of(0).kv_tokens = 3  # type: ignore[misc]


# --- placement ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACEMENTS)
@given(workers=CLUSTERS, sequence=st.integers(0, 10**9), prompt=st.integers(0, 10**6))
def test_placement_chooses_one_of_the_workers(
    name: str, workers: list[WorkerLoad], sequence: int, prompt: int
) -> None:
    chosen = placed(name, new(sequence, prompt), workers)
    assert chosen in {w.worker_id for w in workers}
    assert placed(name, new(sequence, prompt), list(workers)) == chosen, (
        "not a function of its input"
    )


@given(workers=CLUSTERS, rounds=st.integers(1, 4), start=st.integers(0, 1000))
def test_round_robin_is_fair(workers: list[WorkerLoad], rounds: int, start: int) -> None:
    total = rounds * len(workers)
    chosen = Counter(placed("round_robin", new(start + i), workers) for i in range(total))
    assert chosen == {w.worker_id: rounds for w in workers}


def test_round_robin_takes_turns_in_order() -> None:
    workers = [load_of(i) for i in (4, 7, 9)]
    assert [placed("round_robin", new(i), workers) for i in range(5)] == [4, 7, 9, 4, 7]


@given(workers=CLUSTERS, sequence=st.integers(0, 1000))
def test_least_tokens_picks_a_minimum(workers: list[WorkerLoad], sequence: int) -> None:
    chosen = placed("least_tokens", new(sequence), workers)
    by_id = {w.worker_id: w for w in workers}
    assert by_id[chosen].load_tokens == min(w.load_tokens for w in workers)


def test_least_tokens_counts_what_is_on_its_way() -> None:
    workers = [load_of(0, [100], queued_tokens=200), load_of(1, [250])]
    assert placed("least_tokens", new(0), workers) == 1


def test_least_tokens_breaks_ties_by_requests_and_then_in_turn() -> None:
    assert placed("least_tokens", new(0), [load_of(0, [100], running=3), load_of(1, [100])]) == 1
    equal = [load_of(i) for i in range(3)]
    assert [placed("least_tokens", new(i), equal) for i in range(4)] == [0, 1, 2, 0]


# --- rescheduling ---------------------------------------------------------------------------


def apply(workers: list[WorkerLoad], moves: tuple[Move, ...]) -> list[dict[int, int]]:
    """The workers' loads before and after each move."""
    load = {w.worker_id: w.load_tokens for w in workers}
    size = {r.rid: r.tokens for w in workers for r in w.requests}
    history = [dict(load)]
    for move in moves:
        load[move.source] -= size[move.rid]
        load[move.target] += size[move.rid]
        history.append(dict(load))
    return history


def spread(load: dict[int, int]) -> int:
    return max(load.values()) - min(load.values())


@given(CLUSTERS, LIMITS)
def test_reactive_keeps_the_rules(workers: list[WorkerLoad], limits: RescheduleLimits) -> None:
    moves = planned(workers, limits)
    assert len(moves) <= limits.max_moves
    home = {r.rid: (w.worker_id, r) for w in workers for r in w.requests}
    assert len({m.rid for m in moves}) == len(moves), "a request is moved twice"
    for move in moves:
        source, request = home[move.rid]
        assert move.source == source
        assert move.source != move.target
        assert move.target in {w.worker_id for w in workers}
        assert request.movable
        assert request.since_move_s >= limits.cooldown_s


@given(CLUSTERS, LIMITS)
def test_reactive_never_widens_the_gap(workers: list[WorkerLoad], limits: RescheduleLimits) -> None:
    history = apply(workers, planned(workers, limits))
    for before, after in pairwise(history):
        assert spread(after) <= spread(before)


@given(CLUSTERS, LIMITS)
def test_reactive_leaves_room_on_the_target(
    workers: list[WorkerLoad], limits: RescheduleLimits
) -> None:
    """All moves of a round arrive at about the same time as others leave: what leaves a worker
    must not be needed to make room for what comes."""
    size = {r.rid: r.tokens for w in workers for r in w.requests}
    free = {w.worker_id: w.free_tokens for w in workers}
    for move in planned(workers, limits):
        free[move.target] -= size[move.rid]
        assert free[move.target] >= limits.headroom_tokens


@given(CLUSTERS, LIMITS)
def test_reactive_moves_only_from_overloaded_workers(
    workers: list[WorkerLoad], limits: RescheduleLimits
) -> None:
    moves = planned(workers, limits)
    history = apply(workers, moves)
    mean = sum(history[0].values()) / len(workers)
    for before, move in zip(history, moves):
        assert before[move.source] == max(before.values())
        assert before[move.target] == min(before.values())
        assert before[move.source] > (1 + limits.threshold) * mean
        assert spread(before) >= limits.min_gap_tokens


@given(CLUSTERS, LIMITS)
def test_reactive_is_a_function_of_its_input(
    workers: list[WorkerLoad], limits: RescheduleLimits
) -> None:
    copies = [msgspec.structs.replace(w) for w in workers]
    assert planned(workers, limits) == planned(copies, limits)
    assert workers == copies, "the policy changed its input"


@given(CLUSTERS)
def test_reactive_comes_to_rest(workers: list[WorkerLoad]) -> None:
    """Applied again to its own result (no cooldown, nothing grows) it stops moving."""
    limits = RescheduleLimits(max_moves=2, threshold=0.0, min_gap_tokens=1, cooldown_s=0.0)
    seen = 0
    while moves := planned(workers, limits):
        seen += len(moves)
        assert seen <= 200, "requests are moved back and forth"
        moving = {m.rid: m.target for m in moves}
        stock = {r.rid: r for w in workers for r in w.requests}
        after = []
        for w in workers:
            kept = [r for r in w.requests if r.rid not in moving]
            came = [stock[rid] for rid, target in moving.items() if target == w.worker_id]
            left = sum(r.tokens for r in w.requests if r.rid in moving)
            after.append(
                msgspec.structs.replace(
                    w,
                    requests=tuple(kept + came),
                    kv_tokens=w.kv_tokens - left + sum(r.tokens for r in came),
                )
            )
        workers = after


@given(WORKER_SHAPES, LIMITS)
def test_one_worker_keeps_its_requests(
    shape: tuple[list[tuple[int, float, bool]], int, int, int], limits: RescheduleLimits
) -> None:
    assert planned([worker_from(0, shape)], limits) == ()


@pytest.mark.parametrize("name", RESCHEDULING.names())
def test_nothing_to_do(name: str) -> None:
    assert planned([], RescheduleLimits(), name) == ()
    assert planned([load_of(0), load_of(1)], RescheduleLimits(), name) == ()


def test_reactive_takes_the_request_nearest_to_half_the_gap() -> None:
    workers = [load_of(0, [1000, 420, 90]), load_of(1, [310])]
    assert planned(workers, RescheduleLimits(max_moves=1)) == (Move(rid="0-1", source=0, target=1),)


def test_reactive_does_not_swap_the_workers_places() -> None:
    assert planned([load_of(0, [1000]), load_of(1, [])], RescheduleLimits()) == ()


@pytest.mark.parametrize(
    "limits",
    [
        RescheduleLimits(max_moves=0),
        RescheduleLimits(threshold=0.51),
        RescheduleLimits(min_gap_tokens=601),
        RescheduleLimits(cooldown_s=100.1),
        RescheduleLimits(headroom_tokens=99_401),
    ],
    ids=["max_moves", "threshold", "min_gap", "cooldown", "headroom"],
)
def test_each_limit_forbids_the_move(limits: RescheduleLimits) -> None:
    workers = [load_of(0, [300, 300, 300]), load_of(1, [300])]
    open_limits = RescheduleLimits(
        threshold=0.49, min_gap_tokens=600, cooldown_s=100.0, headroom_tokens=99_400
    )
    assert len(planned(workers, open_limits)) == 1
    assert planned(workers, limits) == ()


def test_reactive_spreads_over_several_targets() -> None:
    workers = [load_of(0, [300] * 4), load_of(1), load_of(2)]
    moves = planned(workers, RescheduleLimits(max_moves=2))
    assert [m.target for m in moves] == [1, 2]


def test_none_never_moves() -> None:
    workers = [load_of(0, [300] * 8), load_of(1)]
    assert planned(workers, RescheduleLimits(max_moves=9), "none") == ()


# --- the registry ---------------------------------------------------------------------------


def test_policies_are_registered() -> None:
    assert {"round_robin", "least_tokens"} <= set(PLACEMENT.names())
    assert {"none", "reactive"} <= set(RESCHEDULING.names())


def test_an_unknown_policy_names_the_choices() -> None:
    with pytest.raises(KeyError, match=r"unknown placement policy 'x'; .*round_robin"):
        PLACEMENT.get("x")


def test_a_name_is_registered_once() -> None:
    registry: Registry[object] = Registry("test")
    registry.register("a")(object())
    with pytest.raises(ValueError, match="test policy 'a' is registered twice"):
        registry.register("a")(object())
    assert registry.names() == ("a",)
