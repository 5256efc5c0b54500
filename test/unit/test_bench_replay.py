"""Workloads, replays and the comparison of answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.bench.compare import first_difference, mismatches
from sglang_ares.bench.replay import Chunk, RequestResult, Run, replay
from sglang_ares.bench.workload import WorkItem, poisson_workload

PROMPTS = [f"count 1 {n}\n" for n in range(2, 402)]
STOP = {"type": "stop"}


def workload(seed: int, n: int = 400) -> list[WorkItem]:
    return poisson_workload(PROMPTS[:n], rate=8.0, seed=seed, max_new_tokens=50)


def answered(rid: str, *token_ids: int, error: str = "") -> RequestResult:
    return RequestResult(rid, token_ids=list(token_ids), finish_reason="stop", error=error)


def test_same_seed_same_workload() -> None:
    assert workload(3) == workload(3)
    assert workload(3) != workload(4)


def test_workload_shape() -> None:
    items = workload(0)
    assert [i.prompt for i in items] == PROMPTS
    assert len({i.rid for i in items}) == len(items)
    assert len({i.sampling_params["sampling_seed"] for i in items}) == len(items)
    arrivals = [i.arrival_s for i in items]
    assert arrivals[0] == 0.0 and arrivals == sorted(arrivals)
    assert len(items) / arrivals[-1] == pytest.approx(8.0, rel=0.2)


def test_workload_refuses_a_rate_of_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        poisson_workload(["a"], rate=0.0, seed=0, max_new_tokens=1)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_first_difference(a: list[int], b: list[int]) -> None:
    position = first_difference(a, b)
    if position is None:
        assert a == b
    else:
        assert a[:position] == b[:position]
        assert a[position : position + 1] != b[position : position + 1]


def test_mismatches_name_the_first_different_token() -> None:
    reference = [answered("a", 1, 2, 3), answered("b", 1, 2), answered("c", 5)]
    results = [answered("a", 1, 9, 3), answered("b", 1, 2), answered("c", 5, 6)]
    found = mismatches(reference, results)
    assert [(m.rid, m.position, m.expected, m.got) for m in found] == [
        ("a", 1, 2, 9),
        ("c", 1, None, 6),
    ]
    assert str(found[0]) == "a differs first at output token 1: expected 2, got 9"


def test_failed_requests_are_not_mismatches() -> None:
    assert mismatches([answered("a", 1)], [answered("a", error="aborted")]) == []


def test_mismatches_of_different_workloads_are_refused() -> None:
    with pytest.raises(ValueError, match="'b'"):
        mismatches([answered("a", 1)], [answered("b", 1)])


def items(*rids: str) -> list[WorkItem]:
    return [WorkItem(rid, 0.02 * i, "p") for i, rid in enumerate(rids)]


async def test_replay_times_every_token() -> None:
    async def stream(item: WorkItem) -> AsyncIterator[Chunk]:
        await asyncio.sleep(0.05)
        yield Chunk([1])
        await asyncio.sleep(0.04)
        yield Chunk([2, 3])
        yield Chunk([], STOP)

    run = await replay(items("a", "b"), stream)
    assert [r.token_ids for r in run.results] == [[1, 2, 3]] * 2
    assert all(r.completed and r.finish_reason == "stop" for r in run.results)
    assert (run.done, run.tokens) == (2, 6)
    for index, result in enumerate(run.results):
        assert result.sent_s >= 0.02 * index - 0.002  # a loop's timers tick in milliseconds
        assert result.ttft_s is not None and result.ttft_s >= 0.045
        assert result.tpot_s is not None and result.tpot_s >= 0.018
    assert run.duration_s >= 0.1


async def test_replay_reports_each_kind_of_failure() -> None:
    async def stream(item: WorkItem) -> AsyncIterator[Chunk]:
        yield Chunk([7])
        if item.rid == "raises":
            raise ConnectionError("gone")
        if item.rid == "aborted":
            yield Chunk([], {"type": "abort", "message": "no room"})
        if item.rid == "hangs":
            await asyncio.sleep(60)
        if item.rid == "fine":
            yield Chunk([8], STOP)

    rids = ("raises", "aborted", "cut off", "hangs", "fine")
    run = await replay(items(*rids), stream, timeout_s=0.5)
    errors = {r.rid: r.error for r in run.results}
    assert errors == {
        "raises": "ConnectionError: gone",
        "aborted": "no room",
        "cut off": "the stream ended without a finish reason",
        "hangs": "no answer within 0.5 s",
        "fine": "",
    }


async def test_replay_samples_the_cluster() -> None:
    asked = 0

    async def stream(item: WorkItem) -> AsyncIterator[Chunk]:
        await asyncio.sleep(0.1)
        yield Chunk([1], STOP)

    async def status() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {
            "workers": [
                {"id": 0, "role": "prefill", "kv_tokens": 9},
                {"id": 1, "role": "decode", "kv_tokens": 10 * asked},
            ],
            "migrations": {"completed": 5 + asked},
        }

    seen: list[int] = []

    def note(run: Run) -> None:
        seen.append(run.done)

    run = await replay(items("a"), stream, status, sample_interval_s=0.02, on_progress=note)
    assert len(run.samples) >= 3
    assert [s.kv_tokens for s in run.samples] == [
        {1: 10 * (n + 2)} for n in range(len(run.samples))
    ]
    # Migrations from before the replay do not count.
    assert run.migrations == len(run.samples)
    assert seen[0] == 0 and seen[-1] == 1


async def test_a_failing_status_query_ends_the_replay() -> None:
    async def stream(item: WorkItem) -> AsyncIterator[Chunk]:
        await asyncio.sleep(60)
        yield Chunk([1], STOP)

    answers = iter([{"workers": [], "migrations": {"completed": 0}}])

    async def status() -> dict[str, Any]:
        try:
            return next(answers)
        except StopIteration:
            raise TimeoutError("the controller is gone") from None

    with pytest.raises(TimeoutError, match="gone"):
        await replay(items("a"), stream, status)
