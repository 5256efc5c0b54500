"""Emptying a worker: every request goes where it fits, and only where it fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.policy.draining import drain_moves
from sglang_ares.srt.policy.types import DECODE, RequestLoad, RescheduleLimits, WorkerLoad

CAPACITY = 10_000


def worker(worker_id: int, tokens: list[int], movable: bool = True) -> WorkerLoad:
    return WorkerLoad(
        worker_id=worker_id,
        role=DECODE,
        kv_tokens=sum(tokens),
        kv_capacity=CAPACITY,
        running=len(tokens),
        queued=0,
        queued_tokens=0,
        requests=tuple(
            RequestLoad(
                rid=f"{worker_id}-{i}",
                tokens=t,
                output_tokens=1,
                age_s=0.0,
                since_move_s=0.0,
                movable=movable,
            )
            for i, t in enumerate(tokens)
        ),
    )


def test_the_largest_goes_first_and_to_the_emptiest() -> None:
    moves = drain_moves(
        worker(0, [100, 900]),
        [worker(0, [100, 900]), worker(1, [5000]), worker(2, [10])],
        RescheduleLimits(max_moves=8),
    )
    assert [(m.rid, m.target) for m in moves] == [("0-1", 2), ("0-0", 2)]


def test_nothing_moves_where_nothing_fits() -> None:
    full = [worker(1, [CAPACITY - 300])]
    assert drain_moves(worker(0, [100]), full, RescheduleLimits(headroom_tokens=256)) == ()
    assert drain_moves(worker(0, [100]), [], RescheduleLimits()) == ()
    assert drain_moves(worker(0, [100], movable=False), [worker(1, [])], RescheduleLimits()) == ()


loads = st.lists(st.integers(1, 3000), max_size=6)


@given(source=loads, others=st.lists(loads, max_size=4), max_moves=st.integers(0, 10))
def test_targets_keep_their_headroom(
    source: list[int], others: list[list[int]], max_moves: int
) -> None:
    limits = RescheduleLimits(max_moves=max_moves, headroom_tokens=256)
    targets = [worker(i + 1, tokens) for i, tokens in enumerate(others)]
    moves = drain_moves(worker(0, source), targets, limits)
    assert len(moves) <= max_moves
    assert len({m.rid for m in moves}) == len(moves)
    sizes = {f"0-{i}": t for i, t in enumerate(source)}
    for target in targets:
        coming = sum(sizes[m.rid] for m in moves if m.target == target.worker_id)
        assert not coming or target.free_tokens - coming >= limits.headroom_tokens
