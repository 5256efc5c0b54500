"""Elastic roles: Arrow's algorithms as published, ours, and what both must never do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_ares.srt.policy import elastic  # noqa: F401  (they register)
from sglang_ares.srt.policy.elastic.decisions import (
    REQUEST_SCHEDULING,
    ROLES,
    Assignment,
    Flip,
    FlipMemory,
    FlipRules,
    Moment,
)
from sglang_ares.srt.policy.elastic.forecast import ArrivalForecast, Demand
from sglang_ares.srt.policy.elastic.instances import InstanceTable, Slo, max_tokens
from sglang_ares.srt.policy.types import StepTime

SLO = Slo(ttft_ms=1000.0, tpot_ms=100.0)
P, D = False, True


def instances(labels: list[bool], **columns: list[float]) -> InstanceTable:
    """Idle workers with these labels; ``columns`` replace single ones."""
    n = len(labels)
    defaults: dict[str, Any] = {
        "prefill_tokens": [0] * n,
        "prefill_ms": [0.0] * n,
        "decode_tokens": [0] * n,
        "decode_requests": [0] * n,
        "max_tokens": [10_000] * n,
        "token_ms": [0.0] * n,
        "kv_tokens": columns.get("decode_tokens", [0] * n),
        "kv_capacity": [20_000] * n,
        **columns,
    }
    floats = {"prefill_ms", "token_ms"}
    return InstanceTable(
        worker_id=np.arange(n, dtype=np.int64),
        decodes=np.array(labels),
        **{k: np.array(v, np.float64 if k in floats else np.int64) for k, v in defaults.items()},
    )


def moment(labels: list[bool], *, now: float = 1000.0, **columns: Any) -> Moment:
    """``rules``, ``memory``, ``demand`` and ``sequence`` are the moment's; the rest are columns."""
    told = {k: columns.pop(k) for k in ("rules", "memory", "demand", "sequence") if k in columns}
    return Moment(instances=instances(labels, **columns), slo=SLO, now=now, **told)


@st.composite
def moments(draw: st.DrawFn) -> Moment:
    """Any cluster with at least one worker of each role."""
    labels = draw(st.lists(st.booleans(), min_size=2, max_size=8))
    assume(any(labels) and not all(labels))
    n = len(labels)

    def column(most: int) -> list[int]:
        return draw(st.lists(st.integers(0, most), min_size=n, max_size=n))

    decode_tokens = column(20_000)
    return moment(
        labels,
        now=draw(st.floats(0, 100)),
        prefill_tokens=column(50_000),
        prefill_ms=column(5000),
        decode_tokens=decode_tokens,
        token_ms=[0 if t == 0 else m for t, m in zip(decode_tokens, column(300), strict=True)],
        max_tokens=column(20_000),
        sequence=draw(st.integers(0, 10**6)),
        memory=FlipMemory(
            held_passes=draw(st.integers(0, 5)),
            last_to_decode_s=draw(st.floats(-100, 0)),
            last_flip_s=draw(st.floats(-100, 0)),
        ),
        demand=Demand(
            prefill_ms_per_s=draw(st.floats(0, 8000)),
            prefill_ms_trend=draw(st.floats(-500, 500)),
            requests_per_s=draw(st.floats(0, 100)),
            prompt_tokens=draw(st.floats(0, 10_000)),
            output_tokens=draw(st.floats(0, 10_000)),
        ),
    )


# --- laws -----------------------------------------------------------------------------------


def test_max_tokens_inverts_the_line() -> None:
    step = StepTime(fixed_ms=10, per_request_ms=0.5, per_token_ms=0.01)
    most = max_tokens(step, 20, SLO, capacity=10**6)
    assert most == 8000 and step.ms(20, most) == pytest.approx(SLO.tpot_ms)
    assert max_tokens(step, 20, SLO, capacity=500) == 500
    assert max_tokens(step, 200, SLO, capacity=10**6) == 0
    flat = StepTime(fixed_ms=10, per_request_ms=0, per_token_ms=0)
    assert max_tokens(flat, 5, SLO, capacity=777) == 777


def test_loads_are_means_over_the_pool_relative_to_the_slo() -> None:
    at = instances([P, P, D], prefill_ms=[500, 1500, 9e9], token_ms=[9e9, 0, 50])
    assert at.prefill_load(SLO) == pytest.approx(1.0)
    assert at.decode_load(SLO) == pytest.approx(0.5)


def test_thresholds_that_meet_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shrink is 1\.0 and expand 1\.0"):
        FlipRules(shrink=1.0, expand=1.0)


# --- any policy -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", REQUEST_SCHEDULING.names())
@given(at=moments(), ms=st.floats(0, 5000), tokens=st.integers(1, 30_000))
def test_a_phase_runs_on_a_worker_of_its_role_or_one_that_becomes_it(
    name: str, at: Moment, ms: float, tokens: int
) -> None:
    scheduling = REQUEST_SCHEDULING.get(name)
    table = at.instances
    first = scheduling.prefill(ms, at)
    assert table.decodes[first.row] == first.flip
    second = scheduling.decode(tokens, int(table.pool(decodes=False)[0]), at)
    assert table.decodes[second.row] != second.flip
    for assignment, role in ((first, P), (second, D)):
        if assignment.flip:
            assert len(table.pool(decodes=not role)) > 1, "the last worker of a role changed it"
    assert scheduling.prefill(ms, at) == first


@pytest.mark.parametrize("name", ROLES.names())
@given(at=moments())
def test_a_plan_keeps_one_worker_of_each_role_and_the_cooldown(name: str, at: Moment) -> None:
    flip, memory = ROLES.get(name)(at)
    assert ROLES.get(name)(at) == (flip, memory)
    if flip is None:
        assert memory.last_flip_s == at.memory.last_flip_s
        return
    table = at.instances
    assert table.decodes[flip.row] != flip.to_decode and flip.reason
    assert len(table.pool(decodes=not flip.to_decode)) > 1
    assert memory.last_flip_s == at.now and memory.held_passes == 0
    if flip.to_decode:
        assert at.now - at.memory.last_to_decode_s >= at.rules.cooldown_s


# --- Arrow ----------------------------------------------------------------------------------

arrow = REQUEST_SCHEDULING.get("arrow")


def test_prefill_goes_to_the_cheapest_that_meets_the_slo() -> None:
    # Decode work counts first: row 1 still decodes from before its flip.
    at = moment([P, P, P, D], prefill_ms=[500, 0, 300, 0], decode_tokens=[0, 50, 0, 0])
    assert arrow.prefill(100, at) == Assignment(2)
    busy = moment([P, P, P, D], prefill_ms=[950, 0, 950, 0], decode_tokens=[0, 50, 0, 0])
    assert arrow.prefill(100, busy) == Assignment(1), "the others would be late"


def test_late_prefill_flips_a_decode_worker_only_while_decode_load_is_low() -> None:
    late = {"prefill_ms": [2000, 0, 0], "decode_tokens": [0, 900, 400]}
    low = moment([P, D, D], token_ms=[0, 40, 40], **late)
    assert arrow.prefill(100, low) == Assignment(2, flip=True), "the one with least decode work"
    high = moment([P, D, D], token_ms=[0, 60, 60], **late)
    assert arrow.prefill(100, high) == Assignment(0)


def test_decode_stays_where_its_prompt_was_computed_if_that_worker_decodes_now() -> None:
    at = moment([D, P, D], decode_tokens=[9000, 0, 0])
    assert arrow.decode(5000, 0, at) == Assignment(0)


def test_decode_goes_where_it_keeps_the_slo_or_flips_a_prefill_worker() -> None:
    at = moment([P, D, D], decode_tokens=[0, 9000, 3000])
    assert arrow.decode(500, 0, at) == Assignment(2)
    full = {"decode_tokens": [0, 0, 9900], "prefill_ms": [800, 300, 0]}
    assert arrow.decode(500, 0, moment([P, P, D], **full)) == Assignment(1, flip=True)
    cooling = FlipMemory(last_to_decode_s=995.0)
    assert arrow.decode(500, 0, moment([P, P, D], memory=cooling, **full)) == Assignment(2)
    assert arrow.decode(500, 0, moment([P, D], decode_tokens=[0, 9900])) == Assignment(1)


def test_a_worker_whose_flip_is_unfinished_flips_back_first() -> None:
    at = moment(
        [P, D, D], prefill_ms=[2000, 0, 0], prefill_tokens=[99, 0, 7], decode_tokens=[0, 1, 100]
    )
    assert arrow.prefill(100, at) == Assignment(2, flip=True)


def test_the_monitor_waits_until_the_condition_is_sustained() -> None:
    memory = FlipMemory()
    for held in (1, 2):
        at = moment([P, P, D], token_ms=[0, 0, 120], memory=memory)
        flip, memory = ROLES.get("arrow")(at)
        assert flip is None and memory.held_passes == held
    flip, _ = ROLES.get("arrow")(moment([P, P, D], token_ms=[0, 0, 120], memory=memory))
    assert flip == Flip(0, True, "decode load 1.20 is at or above 1")
    calm = moment([P, P, D], token_ms=[0, 0, 20], prefill_ms=[900, 900, 0], memory=memory)
    assert ROLES.get("arrow")(calm)[1].held_passes == 0


# --- ours -----------------------------------------------------------------------------------

PREFILL_HEAVY = Demand(prefill_ms_per_s=3500, requests_per_s=2, prompt_tokens=5000, output_tokens=9)
DECODE_HEAVY = Demand(prefill_ms_per_s=200, requests_per_s=4, resident_trend=5000)


def plan_until_rest(labels: list[bool], demand: Demand, **columns: Any) -> list[bool]:
    """The labels after as many passes as there are flips to make."""
    labels, memory, now = list(labels), FlipMemory(), 1000.0
    for _ in range(200):
        flip, memory = ROLES.get("ares")(
            moment(labels, now=now, demand=demand, memory=memory, **columns)
        )
        now += 5.0
        if flip is not None:
            labels[flip.row] = flip.to_decode
    return labels


def test_ours_moves_towards_the_demand_and_comes_to_rest() -> None:
    start = [P, P, P, P, D, D, D, D]
    for demand, fewer in ((PREFILL_HEAVY, D), (DECODE_HEAVY, P)):
        settled = plan_until_rest(start, demand)
        assert 1 <= settled.count(fewer) < 4
        assert plan_until_rest(settled, demand) == settled


def test_ours_does_not_empty_a_worker_that_the_others_have_no_room_for() -> None:
    labels = [P, D, D, D]
    held = {"decode_tokens": [0, 4000, 4500, 5000], "token_ms": [0, 30, 30, 30]}
    urgent = FlipMemory(held_passes=9)
    roomy = moment(labels, demand=PREFILL_HEAVY, memory=urgent, **held)
    flip, _ = ROLES.get("ares")(roomy)
    assert flip is not None and flip.row == 1 and not flip.to_decode
    tight = moment(
        labels, demand=PREFILL_HEAVY, memory=urgent, kv_capacity=[20_000, 6000, 6000, 6000], **held
    )
    assert ROLES.get("ares")(tight)[0] is None


def test_ours_leaves_an_idle_cluster_alone() -> None:
    assert ROLES.get("ares")(moment([P, P, P, D]))[0] is None


# --- forecast -------------------------------------------------------------------------------


def test_the_forecast_follows_level_and_trend() -> None:
    steady = ArrivalForecast()
    for _ in range(100):
        steady.observe(1.0, 5, 500, 50.0)
    steady.finished(200)
    demand = steady.demand
    assert demand.requests_per_s == pytest.approx(5) and demand.prompt_tokens == pytest.approx(100)
    assert demand.prefill_work_ms(10) == pytest.approx(500) and demand.output_tokens == 200
    rising = ArrivalForecast()
    for second in range(100):
        rising.observe(1.0, second, 100 * second, 10.0 * second)
    assert rising.demand.prefill_ms_trend > 0
    assert rising.demand.prefill_work_ms(10) > 10 * rising.demand.prefill_ms_per_s


def test_the_trend_of_resident_tokens_is_followed() -> None:
    forecast = ArrivalForecast()
    for second in range(100):
        forecast.observe_resident(1.0, 1000.0 + 50 * second)
    assert forecast.demand.resident_trend == pytest.approx(50, rel=0.01)
    for _ in range(100):
        forecast.observe_resident(1.0, 5950.0)
    assert abs(forecast.demand.resident_trend) < 0.1


@given(rate=st.floats(0, 1e4), trend=st.floats(-1e3, 1e3), horizon=st.floats(0.1, 100))
def test_work_within_a_horizon_is_an_integral(rate: float, trend: float, horizon: float) -> None:
    demand = Demand(prefill_ms_per_s=rate, prefill_ms_trend=trend)
    times = np.linspace(0, horizon, 20_001)
    expected = np.trapezoid(np.maximum(0, rate + trend * times), times)
    assert math.isclose(demand.prefill_work_ms(horizon), expected, rel_tol=1e-3, abs_tol=1.0)


def test_an_interval_of_no_length_is_refused() -> None:
    with pytest.raises(ValueError, match="interval_s is 0"):
        ArrivalForecast().observe(0, 1, 1, 1.0)
