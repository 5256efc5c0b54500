"""The search for the highest rate, against systems whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.bench.goodput import Arm
from sglang_ares.bench.rate_search import RateSearch


def run(search: RateSearch, limit: float, *, noise: float = 0.0) -> float:
    """Attainment falls from 1 to 0 around ``limit``, where it is the target."""
    rng = np.random.default_rng(0)
    while not search.done:
        rate = search.next_rate
        search.note(rate, search.target + limit - rate + rng.normal(0, noise))
    return search.good


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("star", ("least_tokens", "worker", "star")),
        ("round_robin+star", ("round_robin", "worker", "star")),
        ("slo+ares", ("least_tokens", "slo", "ares")),
        ("round_robin+slo+ares", ("round_robin", "slo", "ares")),
    ],
)
def test_what_an_arm_is_called(text: str, arm: tuple[str, str, str]) -> None:
    found = Arm.parse(text, "least_tokens")
    assert (found.name, found.placement, found.admission, found.rescheduling) == (text, *arm)


@given(st.floats(0.05, 200))
def test_the_answer_is_found_within_the_precision(limit: float) -> None:
    search = RateSearch(0.9, start=1.0, precision=0.05, most_probes=40)
    found = run(search, limit)
    assert found <= limit <= found * 1.05 * (1 + 1e-9)


def test_a_system_that_never_meets_the_target_has_none() -> None:
    search = RateSearch(0.9, start=8.0, most_probes=40)
    assert run(search, -1.0) == 0
    assert search.probes < 10


def test_probes_are_counted_and_bounded() -> None:
    search = RateSearch(0.9, start=1.0, precision=1e-9, most_probes=7)
    run(search, 3.3)
    assert search.probes == 7
    assert search.good <= 3.3


def test_the_answer_is_a_rate_that_was_tried_and_met_the_target() -> None:
    search = RateSearch(0.9, start=1.0, most_probes=30)
    found = run(search, 5.0, noise=0.3)
    assert search._tried.get(found)
    assert not any(met is False and rate <= found for rate, met in search._tried.items())


def test_what_another_search_tried_is_learnt_from_for_free() -> None:
    search = RateSearch(0.99, start=1.0)
    search.note(4.0, 1.0, own=False)
    search.note(8.0, 0.5, own=False)
    assert (search.good, search.bad, search.probes) == (4.0, 8.0, 0)
    assert search.next_rate == pytest.approx((4 * 8) ** 0.5)
