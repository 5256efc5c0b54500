"""Memory relief: the pure policy, what the controller's side learns, and the metrics about it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import msgspec
import prometheus_client
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from sglang_ares.srt.managers.cluster_documents import status_document
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    CAUSES,
    MEMORY,
    MovingRequest,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import MigrationResult, PoolCounters, WorkerReport
from sglang_ares.srt.managers.memory_relief import MemoryRelief
from sglang_ares.srt.observability.metrics import ControllerMetrics
from sglang_ares.srt.policy.memory_relief import ReliefLimits, is_short, memory_relief
from sglang_ares.srt.policy.types import DECODE, PREFILL, Move, RequestLoad, WorkerLoad

LIMITS = ReliefLimits(horizon_s=1.0, min_steps=10, floor=0.05, reserved_tokens=20)


def load_of(
    worker_id: int,
    tokens: Sequence[int] = (),
    *,
    capacity: int = 1000,
    queued_tokens: int = 0,
    step_ms: float = 0.0,
    movable: bool = True,
) -> WorkerLoad:
    """A decode worker with running requests of the given sizes."""
    return WorkerLoad(
        worker_id=worker_id,
        role=DECODE,
        kv_tokens=sum(tokens),
        kv_capacity=capacity,
        running=len(tokens),
        queued=0,
        queued_tokens=queued_tokens,
        decode_step_ms=step_ms,
        requests=tuple(
            RequestLoad(
                rid=f"{worker_id}-{i}", tokens=n, output_tokens=1, age_s=0.0, since_move_s=0.0,
                movable=movable,
            )
            for i, n in enumerate(tokens)
        ),
    )  # fmt: skip


def applied(workers: Sequence[WorkerLoad], moves: Sequence[Move]) -> list[WorkerLoad]:
    """The loads once every move is done."""
    loads = {w.worker_id: w for w in workers}
    for move in moves:
        source, target = loads[move.source], loads[move.target]
        (request,) = [r for r in source.requests if r.rid == move.rid]
        loads[move.source] = msgspec.structs.replace(
            source,
            kv_tokens=source.kv_tokens - request.tokens,
            running=source.running - 1,
            requests=tuple(r for r in source.requests if r is not request),
        )
        loads[move.target] = msgspec.structs.replace(
            target,
            kv_tokens=target.kv_tokens + request.tokens,
            running=target.running + 1,
            requests=(*target.requests, request),
        )
    return [loads[w.worker_id] for w in workers]


# --- when, what and where to ------------------------------------------------------------------


def test_nothing_moves_while_nobody_is_short() -> None:
    assert memory_relief([load_of(0, [300, 300]), load_of(1)], LIMITS) == ()


def test_a_short_worker_gives_the_smallest_request_that_is_enough() -> None:
    # 30 tokens free; 50 (the floor) wanted: any request is enough, the smallest moves.
    moves = memory_relief([load_of(0, [500, 400, 70]), load_of(1)], LIMITS)
    assert moves == (Move(rid="0-2", source=0, target=1),)


def test_several_move_where_one_is_not_enough() -> None:
    # 30 requests want 300 tokens, 10 are free: 290 are missing, 10 for each that leaves.
    workers = [load_of(0, [33] * 30), load_of(1, capacity=5000)]
    moves = memory_relief(workers, LIMITS)
    assert len(moves) == 7
    source, target = applied(workers, moves)
    assert not is_short(source, LIMITS) and not is_short(target, LIMITS)


@pytest.mark.parametrize("step_ms,short", [(0.0, False), (100.0, False), (5.0, True)])
def test_fast_steps_look_further_ahead(step_ms: float, short: bool) -> None:
    """Within the horizon a fast worker writes more; a step time of 0 is unknown."""
    assert is_short(load_of(0, [400, 400], step_ms=step_ms), LIMITS) is short


def test_requests_that_wait_for_memory_count() -> None:
    assert not is_short(load_of(0, [400, 400]), LIMITS)
    assert is_short(load_of(0, [400, 400], queued_tokens=180), LIMITS)


def test_an_idle_worker_is_never_short() -> None:
    assert not is_short(load_of(0, queued_tokens=2000), LIMITS)


def test_what_cannot_move_stays() -> None:
    assert memory_relief([load_of(0, [980], movable=False), load_of(1)], LIMITS) == ()


def test_a_request_that_moved_just_now_may_move_again() -> None:
    """A cooldown would leave it to be retracted."""
    assert memory_relief([load_of(0, [490, 490]), load_of(1)], LIMITS)


def test_no_move_to_a_closed_or_a_full_worker() -> None:
    workers = [load_of(0, [490, 490]), load_of(1), load_of(2, [700])]
    assert memory_relief(workers, LIMITS)[0].target == 1
    assert memory_relief(workers, LIMITS, closed={1}) == ()


def test_a_target_keeps_what_upstream_reserves() -> None:
    """Upstream admits a request only where every running one could still grow."""
    workers = [load_of(0, [490, 490]), load_of(1, [10] * 5)]
    assert memory_relief(workers, LIMITS)
    greedy = msgspec.structs.replace(LIMITS, reserved_tokens=100)
    assert memory_relief(workers, greedy) == ()


def test_the_roomiest_target_is_taken() -> None:
    workers = [load_of(0, [490, 490]), load_of(1, [100]), load_of(2)]
    assert [m.target for m in memory_relief(workers, LIMITS)] == [2]


# --- properties -----------------------------------------------------------------------------

WORKERS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 900), max_size=8),
        st.integers(0, 300),  # queued tokens
        st.sampled_from([0.0, 5.0, 50.0]),  # step (ms)
        st.integers(0, 2000),  # capacity beyond what is held
        st.integers(0, 255),  # which requests are movable
    ),
    max_size=5,
)


def workers_from(shapes: list[Any]) -> list[WorkerLoad]:
    workers = []
    for i, (tokens, queued, step, spare, movable) in enumerate(shapes):
        worker = load_of(
            i, tokens, capacity=sum(tokens) + spare + 1, queued_tokens=queued, step_ms=step
        )
        requests = tuple(
            msgspec.structs.replace(r, movable=bool(movable >> n & 1))
            for n, r in enumerate(worker.requests)
        )
        workers.append(msgspec.structs.replace(worker, requests=requests))
    return workers


@given(WORKERS)
def test_moves_are_legal_and_leave_no_target_short(shapes: list[Any]) -> None:
    workers = workers_from(shapes)
    moves = memory_relief(workers, LIMITS)
    short = {w.worker_id for w in workers if is_short(w, LIMITS)}
    movable = {(w.worker_id, r.rid) for w in workers for r in w.requests if r.movable}
    assert len({m.rid for m in moves}) == len(moves) <= LIMITS.max_moves
    for move in moves:
        assert (move.source, move.rid) in movable
        assert move.source in short and move.target not in short
    after = {w.worker_id: w for w in applied(workers, moves)}
    for target in {m.target for m in moves}:
        worker = after[target]
        free = worker.kv_capacity - worker.load_tokens
        assert free >= worker.running * LIMITS.reserved_tokens
        doubled = msgspec.structs.replace(
            LIMITS, floor=2 * LIMITS.floor, min_steps=2 * LIMITS.min_steps, horizon_s=2.0
        )
        assert not is_short(worker, doubled), "twice what makes a worker short stays free"


@given(WORKERS)
def test_no_ping_pong(shapes: list[Any]) -> None:
    """The next round, on the loads that the first one leaves, sends nothing back."""
    workers = workers_from(shapes)
    first = memory_relief(workers, LIMITS)
    second = memory_relief(applied(workers, first), LIMITS)
    assert not {m.rid for m in first} & {m.rid for m in second}
    assert not {m.source for m in second} & {m.target for m in first}


@given(WORKERS)
def test_the_order_of_the_snapshots_is_nothing_to_the_plan(shapes: list[Any]) -> None:
    workers = workers_from(shapes)
    backwards = [msgspec.structs.replace(w, requests=w.requests[::-1]) for w in reversed(workers)]
    assert memory_relief(workers, LIMITS) == memory_relief(backwards, LIMITS)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=7), st.integers(0, 60))
def test_no_smaller_set_would_do(sizes: list[int], spare: int) -> None:
    """With room enough elsewhere: the shortage ends, and no fewer requests could end it."""
    limits = msgspec.structs.replace(LIMITS, floor=0.2)
    workers = [load_of(0, sizes, capacity=sum(sizes) + spare), load_of(1, capacity=100_000)]
    moves = memory_relief(workers, limits)
    assert not is_short(applied(workers, moves)[0], limits)
    for fewer in range(len(moves)):
        for chosen in combinations(workers[0].requests, fewer):
            others = [Move(rid=r.rid, source=0, target=1) for r in chosen]
            assert is_short(applied(workers, others)[0], limits)


@example([60] * 12, 20)
@given(st.lists(st.integers(5, 120), min_size=2, max_size=12), st.integers(5, 25))
def test_nothing_runs_out_while_another_worker_has_room(prompts: list[int], delay: int) -> None:
    """Every request grows by a token a step; reports come every 10 steps and a move takes
    ``delay`` steps, which the horizon covers. No pool is ever full, and few requests move."""
    capacity, steps = 2400, 300
    limits = ReliefLimits(
        horizon_s=2 * (10 + delay) * 1e-2, min_steps=1, floor=0.0, reserved_tokens=1,
        headroom_tokens=0,
    )  # fmt: skip
    while sum(prompts) + steps * len(prompts) > 1.4 * capacity:
        prompts = prompts[:-1]
    outgrow = sum(prompts) + steps * len(prompts) > capacity
    where = {f"r{i}": 0 for i in range(len(prompts))}
    tokens = {rid: prompts[i] for i, rid in enumerate(where)}
    under_way: dict[str, tuple[int, int]] = {}
    started = 0
    for step in range(steps):
        for rid, (end, target) in list(under_way.items()):
            if step >= end:
                where[rid] = target
                del under_way[rid]
        for rid in tokens:
            tokens[rid] += 1
        held = [sum(n for r, n in tokens.items() if where[r] == w) for w in (0, 1)]
        assert max(held) <= capacity
        if step % 10 == 0:
            loads = [load_of(w, capacity=capacity, step_ms=10.0) for w in (0, 1)]
            loads = [
                msgspec.structs.replace(
                    load,
                    kv_tokens=held[w],
                    running=sum(at == w for at in where.values()),
                    requests=tuple(
                        RequestLoad(rid=r, tokens=tokens[r], output_tokens=1, age_s=0.0,
                                    since_move_s=0.0, movable=r not in under_way)
                        for r, at in where.items() if at == w
                    ),
                )
                for w, load in enumerate(loads)
            ]  # fmt: skip
            for move in memory_relief(loads, limits):
                under_way[move.rid] = (step + delay, move.target)
                started += 1
    assert started <= len(where)
    assert started or not outgrow
    event(f"outgrow: {outgrow}")


# --- the controller's side ------------------------------------------------------------------


def report_of(load: WorkerLoad, retracted: int = 0) -> WorkerReport:
    return WorkerReport(
        worker_id=load.worker_id,
        incarnation=0,
        load=load,
        finished=[],
        pools=PoolCounters(
            kv_free=0, kv_cached=0, kv_locked=0, request_slots_free=0, metadata_slots_free=0,
            requests=0, idle=False,
        ),
        migrations_in=0,
        migrations_out=0,
        retracted=retracted,
        decode_step_ms=load.decode_step_ms,
    )  # fmt: skip


def result_of(
    migration_id: int = 1, *, outcome: str = "completed", reason: str = "", duration_s: float = 0.1
) -> MigrationResult:
    return MigrationResult(
        migration_id=migration_id, rid="0-0", source=0, target=1, outcome=outcome, reason=reason,
        tokens=10, tokens_sent=10, tokens_saved=0, kv_bytes=10, duration_s=duration_s,
    )  # fmt: skip


def cluster(*loads: WorkerLoad) -> ClusterState:
    state = ClusterState(
        [
            WorkerView(worker_id=w.worker_id, role=w.role, pids=[], kv_capacity=w.kv_capacity)
            for w in loads
        ]
    )
    for load in loads:
        state.note_report(report_of(load))
    return state


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def relief_with(clock: Clock) -> MemoryRelief:
    return MemoryRelief(report_interval_s=0.1, floor=0.05, reserved_tokens=20, clock=clock)


def test_a_report_of_a_short_worker_leads_to_moves() -> None:
    full, empty = load_of(0, [490, 490]), load_of(1)
    state = cluster(full, empty)
    relief = relief_with(Clock())
    assert relief.plan(report_of(empty), state) == ()
    (move,) = relief.plan(report_of(full), state)
    assert (move.source, move.target) == (0, 1)
    state.note_migration_started(1, MovingRequest(move.rid, 0, 1, MEMORY))
    assert relief.plan(report_of(full), state) == (), "what is on its way has been counted"


def test_prefill_workers_are_left_alone() -> None:
    full = msgspec.structs.replace(load_of(0, [490, 490]), role=PREFILL)
    assert relief_with(Clock()).plan(report_of(full), cluster(full, load_of(1))) == ()


def test_a_target_without_memory_is_left_alone_for_a_while() -> None:
    full = load_of(0, [490, 490])
    state, clock = cluster(full, load_of(1)), Clock()
    relief = relief_with(clock)
    relief.note_result(result_of(outcome="refused", reason="no KV memory"))
    assert relief.plan(report_of(full), state) == ()
    clock.now += 2
    assert relief.plan(report_of(full), state)


def test_a_worker_that_is_kept_for_a_waiting_request_is_no_target() -> None:
    full = load_of(0, [490, 490])
    state = cluster(full, load_of(1))
    relief = relief_with(Clock())
    state.kept = 1
    assert relief.plan(report_of(full), state) == ()
    state.kept = 0
    assert relief.plan(report_of(full), state)


def test_the_horizon_follows_the_measured_moves() -> None:
    relief = relief_with(Clock())
    guessed = relief.limits.horizon_s
    for _ in range(40):
        relief.note_result(result_of(duration_s=0.05))
    relief.note_result(result_of(outcome="failed", reason="timeout", duration_s=10.0))
    assert relief.limits.horizon_s == pytest.approx(2 * (0.1 + 0.05))
    assert relief.limits.horizon_s < guessed


def test_status_counts_the_causes() -> None:
    state = cluster(load_of(0, [10]), load_of(1))
    for migration_id, cause in enumerate(CAUSES):
        state.note_migration_started(migration_id, MovingRequest("0-0", 0, 1, cause))
    assert status_document(state, {})["migrations"]["causes"] == dict.fromkeys(CAUSES, 1)
    move = state.note_migration_result(result_of(CAUSES.index(MEMORY)))
    assert move is not None and move.cause == MEMORY
    assert state.note_migration_result(result_of(99)) is None


def test_metrics_count_retractions_and_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker tells its total since its start; one that started anew counts from 0 again."""
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        original = getattr(prometheus_client, kind)
        monkeypatch.setattr(
            prometheus_client,
            kind,
            lambda *args, original=original, **kwargs: original(*args, registry=registry, **kwargs),
        )
    metrics = ControllerMetrics("m")
    for total in (0, 3, 3, 5, 2):
        metrics.reported(report_of(load_of(0, [10]), retracted=total))
    where = {"model_name": "m", "worker": "0", "role": DECODE}
    assert registry.get_sample_value("sglang_ares:retractions_total", where) == 7
    metrics.migrated(result_of(), MEMORY)
    labels = {"model_name": "m", "cause": MEMORY, "outcome": "completed", "reason": ""}
    assert registry.get_sample_value("sglang_ares:migrations_total", labels) == 1
