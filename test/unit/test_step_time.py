"""The fits that learn from a worker's own steps and from the migrations that were made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.policy.move_cost import MoveCostFit
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.step_law import step_laws
from sglang_ares.srt.policy.step_time import StepTimeFit
from sglang_ares.srt.policy.types import MoveCost, StepTime
from unit.policy_clusters import STEP, request, worker


def steps_of(
    law: StepTime, count: int, seed: int, *, noise: float = 0.03, slow: float = 0.1
) -> list[tuple[int, int, float]]:
    """Steps of a batch that wanders; of them the share ``slow`` waits for something else."""
    rng = np.random.default_rng(seed)
    steps = []
    requests, each = 20.0, 2000.0
    for _ in range(count):
        requests = float(np.clip(requests * rng.lognormal(0, 0.1), 1, 200))
        each = float(np.clip(each * rng.lognormal(0, 0.1), 100, 20_000))
        n, t = round(requests), round(requests * each)
        ms = law.ms(n, t) * rng.lognormal(0, 0.03)
        steps.append((n, t, ms * (5 if rng.random() < 0.1 else 1)))
    return steps


def learned(steps: list[tuple[int, int, float]]) -> StepTimeFit:
    fit = StepTimeFit()
    for step in steps:
        fit.observe(*step)
    return fit


@pytest.mark.parametrize(
    "law",
    [
        STEP,
        StepTime(fixed_ms=20.0, per_request_ms=0.0, per_token_ms=7e-5),
        StepTime(fixed_ms=3.0, per_request_ms=0.5, per_token_ms=0.0),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_law_in_spite_of_slow_steps(law: StepTime, seed: int) -> None:
    """Within 5 % wherever the steps were, though every tenth took five times as long."""
    steps = steps_of(law, 3000, seed)
    found = learned(steps).law()
    assert found is not None
    errors = [found.ms(n, t) / law.ms(n, t) - 1 for n, t, _ in steps]
    assert np.abs(errors).mean() < 0.05


def test_it_says_nothing_of_steps_that_are_too_much_alike() -> None:
    assert StepTimeFit().law() is None
    assert learned([(8, 8000, 10.0)] * 500).law() is None
    assert learned(steps_of(STEP, 4, 0)).law() is None


def test_it_follows_a_change() -> None:
    twice = StepTime(fixed_ms=10.0, per_request_ms=0.04, per_token_ms=1e-4)
    fit = learned(steps_of(STEP, 3000, 0))
    for step in steps_of(twice, 6000, 0):
        fit.observe(*step)
    found = fit.law()
    assert found is not None
    assert found.ms(20, 40_000) == pytest.approx(twice.ms(20, 40_000), rel=0.1)


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 500),
            st.integers(-1, 1_000_000),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=300,
    )
)
def test_coefficients_are_never_negative(steps: list[tuple[int, int, float]]) -> None:
    law = learned(steps * 5).law()
    assert law is None or min(law.fixed_ms, law.per_request_ms, law.per_token_ms) >= 0


def test_a_worker_without_a_law_gets_the_mean_of_the_others() -> None:
    known = worker(0, [request("a", 100)])
    unknown = worker(1, [request("b", 300)], step=None)
    laws = step_laws(WorkerTable.of([known, unknown]))
    assert laws[1].tolist() == laws[0].tolist() == [5.0, 0.02, 5e-5]
    by_tokens = step_laws(WorkerTable.of([unknown, unknown]))
    assert by_tokens.tolist() == [[0, 0, pytest.approx(20 / 300)]] * 2


# --- moves ----------------------------------------------------------------------------------


def test_the_cost_of_a_move_is_learned() -> None:
    fit = MoveCostFit(MoveCost(budget_tokens=7))
    assert fit.cost == MoveCost(budget_tokens=7)
    rng = np.random.default_rng(0)
    for i in range(64):
        tokens = int(rng.integers(100, 20_000))
        fit.observe_move(tokens, 0.08 + tokens / 50_000 + (5.0 if i % 16 == 0 else 0.0))
        fit.observe_pause(0.02 if i % 16 else 3.0)
    assert fit.cost.fixed_s == pytest.approx(0.08, abs=0.05)
    assert fit.cost.tokens_per_s == pytest.approx(50_000, rel=0.25)
    assert fit.cost.pause_s == pytest.approx(0.02)
    assert fit.cost.budget_tokens == 7


@given(
    st.lists(st.tuples(st.integers(0, 100_000), st.floats(0, 10), st.floats(-1, 10)), max_size=80)
)
def test_a_learned_cost_is_sane(moves: list[tuple[int, float, float]]) -> None:
    fit = MoveCostFit(MoveCost(tokens_per_s=1000.0))
    for tokens, seconds, pause in moves:
        fit.observe_move(tokens, seconds)
        fit.observe_pause(pause)
    cost = fit.cost
    assert min(cost.fixed_s, cost.pause_s, cost.tokens_per_s) >= 0
    assert cost.tokens_per_s > 0, "no noise makes copying free"
    assert 0 <= cost.seconds(10_000) < 1e9


def test_moves_of_one_size_tell_nothing_of_copying() -> None:
    fit = MoveCostFit(MoveCost(tokens_per_s=1000.0))
    for _ in range(20):
        fit.observe_move(100, 0.3)
    assert fit.cost.tokens_per_s == 1000
    assert fit.cost.seconds(100) == pytest.approx(0.3)
