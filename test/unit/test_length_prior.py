"""The length prior and the survival curves that policies make of quantiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.policy.length_prior import LengthPrior, with_prior
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.survival import known_or_guessed, relative_spread, survival
from sglang_ares.srt.policy.types import LEVELS
from unit.policy_clusters import exactly, request, worker

LENGTHS = st.lists(st.integers(0, 50_000), min_size=16, max_size=200)
DONE = np.array([0, 1, 10, 1000, 30_000, 2_000_000])


def learned(lengths: list[int] | np.ndarray, memory: float = 4096.0) -> LengthPrior:
    prior = LengthPrior(memory)
    for length in lengths:
        prior.observe(int(length))
    return prior


# --- the prior ------------------------------------------------------------------------------


def test_it_says_nothing_before_it_has_seen_enough() -> None:
    prior = learned([100] * 15)
    assert np.isnan(prior.remaining(DONE)).all()
    assert np.isnan(prior.expected_remaining(DONE)).all()
    assert prior.remaining_of_new() is None
    prior.observe(100)
    assert not np.isnan(prior.remaining(DONE)).any()
    assert prior.seen == 16


@given(LENGTHS)
def test_quantiles_ascend_and_something_is_left(lengths: list[int]) -> None:
    prior = learned(lengths)
    quantiles = prior.remaining(DONE)
    assert quantiles.shape == (len(DONE), len(LEVELS))
    assert (quantiles >= 1).all()
    assert (np.diff(quantiles) >= 0).all()
    assert (prior.expected_remaining(DONE) >= 1).all()
    assert (learned(lengths).remaining(DONE) == quantiles).all(), "not deterministic"


def test_it_learns_a_distribution() -> None:
    """Quantiles of what is left, at several ages, against those of 20,000 drawn lengths: within
    the width of a bin (an eighth of an octave to either side)."""
    lengths = np.random.default_rng(0).lognormal(7, 1, 20_000).astype(int)
    prior = learned(lengths, memory=1e9)
    for done in (0, 500, 3000):
        left = lengths[lengths > done] - done
        found = prior.remaining(np.array([done]))[0]
        wanted = np.quantile(left, LEVELS)
        assert found == pytest.approx(wanted, rel=0.15)
        mean = prior.expected_remaining(np.array([done]))[0]
        assert mean == pytest.approx(left.mean(), rel=0.1)


def test_what_lasts_long_is_expected_to_last_longer() -> None:
    """Two kinds of requests: whoever outlives the short kind is of the long one."""
    prior = learned([100, 10_000] * 500)
    new, older = prior.remaining(np.array([0, 200]))
    assert new[0] < 150
    assert older[0] > 5000


def test_it_forgets() -> None:
    prior = learned([10_000] * 500 + [100] * 500, memory=100)
    assert prior.remaining(np.array([0]))[0, 2] < 150


def test_it_fills_in_only_what_is_unknown() -> None:
    prior = learned([1000] * 100)
    known, unknown = request("k", 10, exactly(7)), request("u", 10)
    cluster = Snapshot.of([worker(0, [known, unknown]), worker(1, [])])
    filled = with_prior(cluster, prior)
    assert filled.requests.remaining[0].tolist() == [7, 7, 7, 7]
    assert (filled.requests.remaining[1] == prior.remaining(np.array([5]))[0]).all()
    assert filled.workers.remaining_tokens.tolist() == [7 + filled.requests.remaining[1, 1], 0]
    assert np.isnan(cluster.requests.remaining[1]).all(), "the snapshot was changed"
    everything = Snapshot.of([worker(0, [known])])
    assert with_prior(everything, prior) is everything


# --- survival -------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 1e6), min_size=4, max_size=4).map(sorted),
    st.lists(st.floats(0, 1e7), min_size=1, max_size=9).map(sorted),
)
def test_a_survival_curve_falls_from_one_to_zero(
    quantiles: list[float], steps: list[float]
) -> None:
    curve = survival(np.array([quantiles]), np.array([-1.0, *steps, 1e12]))[0]
    assert curve[0] == 1
    assert curve[-1] < 1e-3
    assert (np.diff(curve) <= 1e-12).all()
    assert (curve >= 0).all()


def test_it_goes_through_its_quantiles() -> None:
    quantiles = np.array([10.0, 50.0, 200.0, 900.0])
    assert survival(quantiles[None], quantiles)[0] == pytest.approx(1 - np.array(LEVELS))


def test_a_known_length_is_a_step() -> None:
    curve = survival(np.array([[100.0] * 4]), np.array([0.0, 99.0, 101.0, 1e6]))[0]
    assert curve == pytest.approx([1, 1, 0, 0])


def test_nothing_known_is_guessed_from_the_output_so_far() -> None:
    nothing = np.full((2, 4), np.nan)
    young, old = known_or_guessed(nothing, np.array([0, 10_000]))
    assert old[1] == pytest.approx(10_128)
    assert (young < old).all()
    known = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert known_or_guessed(known, np.array([5])) is known


def test_spread() -> None:
    assert relative_spread(np.array([[7.0] * 4, [50.0, 100.0, 150.0, 200.0]])).tolist() == [0, 1]
