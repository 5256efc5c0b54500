"""Migration within its means: reuse of cached prefixes, bandwidth, memory, chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.disaggregation.budgets import BandwidthBudget, InboundMemory
from sglang_ares.srt.disaggregation.migration import (
    CANCELLED,
    COMPLETED,
    FAILED,
    REFUSED,
    SourceState,
)
from unit.migration_world import CACHED, DEFAULT_LIMITS, World


def finish(world: World) -> None:
    """Until quiet, then until every request has ended."""
    world.settle()
    world.check_quiet()
    world.run_out()
    world.settle()
    world.check_quiet()


def limited(**changes: Any) -> World:
    """A world with other limits."""
    return World(limits=replace(DEFAULT_LIMITS, **changes))


# --- the prefix cache -----------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_prefix_that_another_request_left_is_not_sent(page_size: int) -> None:
    world = World(page_size=page_size)
    world.submit("before", worker=1, prompt=24, max_new=4, text="t")
    world.run_out()
    world.submit("r", prompt=30, max_new=60, text="t")
    migration = world.start("r", 0, 1)
    world.settle()
    result = world.result(migration)
    assert result.outcome == COMPLETED
    assert result.tokens_saved == 24
    assert result.tokens_sent == result.tokens - 24
    finish(world)


@pytest.mark.parametrize("overlap", [False, True])
def test_moving_back_sends_only_what_was_written_since(overlap: bool) -> None:
    world = World(page_size=4, overlap=overlap)
    world.submit("r", prompt=50, max_new=200)
    there = world.start("r", 0, 1)
    world.settle()
    for _ in range(8):
        world.round()
    back = world.start("r", 1, 0)
    world.settle()
    first, second = world.result(there), world.result(back)
    assert (first.tokens_saved, first.tokens_sent) == (0, first.tokens)
    assert second.tokens_saved == first.tokens // 4 * 4
    assert second.tokens_sent == second.tokens - second.tokens_saved
    finish(world)


@pytest.mark.parametrize("page_size", [1, 4])
def test_all_but_the_last_token_may_be_there_already(page_size: int) -> None:
    world = World(page_size=page_size, prefix_tokens=999)
    world.submit("r", prompt=29, max_new=60)
    migration = world.start("r", 0, 1)
    world.settle()
    result = world.result(migration)
    assert result.tokens_saved == 28
    assert 0 < result.tokens_sent == result.tokens - 28
    finish(world)


def test_other_texts_are_other_prefixes() -> None:
    world = World()
    world.submit("before", worker=1, prompt=24, max_new=4, text="a")
    world.run_out()
    world.submit("r", prompt=30, max_new=60, text="b")
    migration = world.start("r", 0, 1)
    world.settle()
    assert world.result(migration).tokens_saved == 0
    finish(world)


@pytest.mark.parametrize("why", ["memory", "share"])
def test_a_refusal_unlocks_the_prefix(why: str) -> None:
    world = limited(memory_share=0.01) if why == "share" else World(budget=30)
    world.submit("before", worker=1, prompt=24, max_new=4, text="t")
    world.run_out()
    world.submit("r", prompt=60, max_new=60, text="t")
    migration = world.start("r", 0, 1)
    world.settle()
    assert world.result(migration).outcome == REFUSED
    assert world.result(migration).tokens_saved == 0
    assert world.workers[1].memory.owner.count(CACHED) == 27
    assert not world.workers[1].memory.locks.total()
    finish(world)


# --- memory ---------------------------------------------------------------------------------


def test_more_than_the_share_is_refused_until_some_is_free() -> None:
    world = limited(memory_share=0.1)  # 60 of 600 tokens
    for rid in ("a", "b"):
        world.submit(rid, prompt=30, max_new=80)
    first, second = world.start("a", 0, 1), world.start("b", 0, 1)
    world.settle()
    assert world.result(first).outcome == COMPLETED
    assert world.result(second).outcome == REFUSED
    assert world.result(second).reason == "memory share of inbound migrations used up"
    third = world.start("b", 0, 1)
    world.settle()
    assert world.result(third).outcome == COMPLETED
    finish(world)


def test_a_cached_prefix_does_not_count_against_the_share() -> None:
    world = World(
        limits=replace(DEFAULT_LIMITS, memory_share=0.05), prefix_tokens=40
    )  # 30 of 600 tokens
    world.submit("r", prompt=45, max_new=60)
    migration = world.start("r", 0, 1)
    world.settle()
    assert world.result(migration).outcome == COMPLETED
    finish(world)


def test_no_more_than_so_many_leave_at_once() -> None:
    world = limited(max_outbound=1)
    for rid in ("a", "b"):
        world.submit(rid, max_new=80)
    first, second = world.start("a", 0, 1), world.start("b", 0, 1)
    world.settle()
    assert world.result(first).outcome == COMPLETED
    assert world.result(second).reason == "too many migrations outbound"
    finish(world)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=30))
def test_inbound_memory_never_exceeds_its_limit(actions: list[tuple[int, int]]) -> None:
    memory = InboundMemory(100)
    for migration, tokens in actions:
        if tokens == 0:
            memory.release(migration)
        elif migration not in memory._held and memory.admits(tokens):
            memory.hold(migration, tokens)
        assert memory.held_tokens <= 100


# --- chunks and bandwidth -------------------------------------------------------------------


def test_the_copy_goes_in_chunks() -> None:
    world = limited(chunk_tokens=10, headroom_tokens=20)
    world.submit("r", prompt=95, max_new=100)
    migration = world.start("r", 0, 1)
    source = world.workers[0].manager.outbound[migration]
    sizes = []
    before = 0
    while not source.closed:
        world.round()
        if source.record.tokens_sent > before:
            sizes.append(source.record.tokens_sent - before)
            before = source.record.tokens_sent
    assert max(sizes) <= 10 and len(sizes) >= 10
    assert world.result(migration).outcome == COMPLETED
    finish(world)


def test_bandwidth_delays_the_copy_and_the_headroom_grows_with_it() -> None:
    """100 tokens of 1,000 bytes at 0.3 MB/s are a third of a second; in the half that it takes
    with what is written meanwhile, the world makes 50 steps."""
    world = limited(chunk_tokens=10, bandwidth_mb_s=0.3)
    world.submit("r", prompt=100, max_new=150)
    migration = world.start("r", 0, 1)
    started = world.now
    world.settle(rounds=400)
    result = world.result(migration)
    assert result.outcome == COMPLETED
    assert 0.4 < world.now - started < 1.0
    finish(world)


def test_a_copy_may_take_longer_than_the_timeout_while_chunks_go_out() -> None:
    """Ten tokens take a thirtieth of a second, all of them half of one."""
    world = limited(chunk_tokens=10, bandwidth_mb_s=0.3, timeout_s=0.1)
    world.submit("r", prompt=100, max_new=150)
    migration = world.start("r", 0, 1)
    world.settle(rounds=400)
    assert world.result(migration).outcome == COMPLETED
    assert world.result(migration).duration_s > 4 * world.limits.timeout_s
    finish(world)


def test_without_budget_the_request_decodes_on() -> None:
    world = limited(chunk_tokens=10, bandwidth_mb_s=0.3)
    req = world.submit("r", prompt=100, max_new=150)
    migration = world.start("r", 0, 1)
    source = world.workers[0].manager.outbound[migration]
    for _ in range(5):
        world.round()
    before = len(req.output_ids)
    for _ in range(20):
        world.round()
    assert source.record.state is SourceState.COPYING
    assert len(req.output_ids) == before + 20
    finish(world)


def test_a_copy_that_could_never_catch_up_is_refused() -> None:
    """The world's requests write 100 tokens a second each."""
    world = limited(chunk_tokens=10, bandwidth_mb_s=0.15)
    for rid in ("a", "b"):
        world.submit(rid, prompt=10, max_new=150)
    first, second = world.start("a", 0, 1), world.start("b", 0, 1)
    finish(world)
    assert world.result(first).outcome == COMPLETED
    assert world.result(second).reason == "bandwidth budget used up"


def test_a_copy_that_would_take_more_tokens_than_an_offer_names_is_refused() -> None:
    """At just above the rate of writing it would catch up after 100,000 tokens or more. A request
    that ends long before is offered as before."""
    world = limited(chunk_tokens=10, bandwidth_mb_s=0.1001)
    world.submit("long", prompt=100, max_new=10**6)
    world.submit("short", prompt=100, max_new=150)
    long = world.start("long", 0, 1)
    assert world.result(long).reason == "bandwidth budget used up"
    assert world.start("short", 0, 1) in world.workers[0].manager.outbound


def test_what_would_pause_for_long_is_given_up() -> None:
    """The copy stays behind; what is left when the room is used up is more than one chunk."""
    world = limited(chunk_tokens=10)
    world.submit("r", prompt=100, max_new=150)
    migration = world.start("r", 0, 1)
    source = world.workers[0].manager.outbound[migration]
    for _ in range(4):
        world.round()
    for _ in range(60):
        world.workers[0].iterate()
    world.settle()
    result = world.result(migration)
    assert [s for s, _ in source.record.history[-2:]] == ["CANCELLING", "ENDED"]
    assert (result.outcome, result.reason) == (CANCELLED, "outgrew the reservation")
    assert world.owner("r") == 0
    finish(world)


@pytest.mark.parametrize("live", [True, False])
def test_a_stopped_request_does_not_wait_for_a_copy_that_stalls(live: bool) -> None:
    """Its last chunk is under way and does not arrive. Stop and copy has to wait for all of it."""
    world = limited(chunk_tokens=200, live_copy=live)
    req = world.submit("r", prompt=100, max_new=150)
    migration = world.start("r", 0, 1)
    record = world.workers[0].manager.outbound[migration].record
    while record.state is SourceState.OFFERED:
        world.round()
    for _ in range(100):
        if record.state is not SourceState.COPYING:
            break
        world.workers[0].iterate()
    assert record.state is (SourceState.STOPPING if live else SourceState.HANDOVER)
    written = len(req.output_ids)
    for _ in range(6):
        world.now += 0.1
        world.workers[0].iterate()
    if not live:
        assert len(req.output_ids) == written
        world.settle()
        assert world.result(migration).outcome == COMPLETED
        return
    assert record.state is SourceState.CANCELLING
    assert written < len(req.output_ids), "it goes on at once"
    world.settle()
    result = world.result(migration)
    assert (result.outcome, result.reason) == (FAILED, "timeout in STOPPING")
    assert world.owner("r") == 0
    finish(world)


def test_stop_and_copy_sends_everything_after_the_stop() -> None:
    world = limited(live_copy=False)
    world.submit("r", prompt=50, max_new=100)
    migration = world.start("r", 0, 1)
    source = world.workers[0].manager.outbound[migration]
    while not source.record.tokens_sent:
        world.round()
    assert source.record.state in (SourceState.HANDOVER, SourceState.DONE)
    world.settle()
    result = world.result(migration)
    assert result.tokens_sent == result.tokens > 50
    finish(world)


CHUNKS = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 50)), min_size=1, max_size=60)


@given(st.floats(1, 1000), st.floats(0, 20), CHUNKS)
def test_the_rate_holds_over_any_time(
    rate: float, burst: float, chunks: list[tuple[float, int]]
) -> None:
    """Sent so far never exceeds the rate by more than the burst and one chunk; and whoever waits
    long enough may send."""
    budget = BandwidthBudget(rate, burst)
    now = sent = 0.0
    for wait, pages in chunks:
        now += wait
        if budget.ready(now):
            budget.spend(pages, now)
            sent += pages
            assert sent <= rate * now + burst + pages + 1e-6
    assert budget.ready(now + (sent + 1) / rate) or burst == 0


def test_unlimited_bandwidth_is_always_ready() -> None:
    budget = BandwidthBudget(0.0)
    budget.spend(10**9, 0.0)
    assert budget.ready(0.0) and budget.seconds_for(10**9, 5.0) == 0


def test_a_chunk_larger_than_the_bucket_is_only_delayed() -> None:
    budget = BandwidthBudget(10.0)
    assert budget.ready(0.0)
    budget.spend(100, 0.0)
    assert not budget.ready(9.8)
    assert budget.ready(10.0)
