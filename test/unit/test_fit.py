"""Fitting recovers the laws that made the measurements."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares.bench.fit import (
    DecodeSample,
    FitError,
    MoveSample,
    PrefillSample,
    fit_decode,
    fit_moves,
    fit_prefill,
    non_negative_fit,
    relative_errors,
)
from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.types import StepTime

BATCHES, LENGTHS = (1, 4, 16, 64), (64, 512, 2048)


def decode_samples(law: StepTime, noise: float, seed: int) -> list[DecodeSample]:
    rng = np.random.default_rng(seed)
    return [
        DecodeSample(n, n * (length + 20), law.ms(n, n * (length + 20)) * rng.normal(1, noise))
        for n in BATCHES
        for length in LENGTHS
        for _ in range(3)
    ]


@settings(max_examples=40)
@given(st.floats(1, 50), st.floats(0.001, 1), st.floats(1e-5, 1e-3), st.integers(0, 99))
def test_decode_laws_are_recovered_from_noise(
    fixed: float, each: float, token: float, seed: int
) -> None:
    """2 % of noise on each sample; what counts is the step time, to 3 %."""
    law = StepTime(fixed_ms=fixed, per_request_ms=each, per_token_ms=token)
    found = fit_decode(decode_samples(law, 0.02, seed))
    for n in BATCHES:
        for length in LENGTHS:
            assert found.ms(n, n * length) == pytest.approx(law.ms(n, n * length), rel=0.03)


def test_a_decode_law_is_recovered_exactly_without_noise() -> None:
    law = StepTime(fixed_ms=20, per_request_ms=0.1, per_token_ms=1e-4)
    samples = decode_samples(law, 0, 0)
    found = fit_decode(samples)
    assert found.fixed_ms == pytest.approx(20)
    assert found.per_request_ms == pytest.approx(0.1)
    assert found.per_token_ms == pytest.approx(1e-4)
    assert abs(relative_errors(found, samples)).max() < 1e-9


def test_coefficients_are_never_negative() -> None:
    """Steps that grow shorter with the batch: the best that is possible is a constant."""
    samples = [DecodeSample(n, t, 20 - 0.1 * n) for n, t in ((1, 10), (5, 90), (9, 30), (12, 99))]
    found = fit_decode(samples)
    assert found.per_request_ms == found.per_token_ms == 0
    assert 18 < found.fixed_ms < 20


def burst_ms(law: PrefillTime, hand_over: float, prompts: int, length: int, chunk: int) -> float:
    steps = ceil(length / chunk) + ceil((prompts - 1) * length / chunk)
    tokens = law.per_token_ms * prompts * length + law.per_square_ms * prompts * length**2
    return steps * law.fixed_ms + tokens + hand_over


def test_prefill_and_hand_over_are_told_apart() -> None:
    law = PrefillTime(fixed_ms=5, per_token_ms=0.18, per_square_ms=2e-6)
    rng = np.random.default_rng(1)
    samples = [
        PrefillSample(n, length, burst_ms(law, 12, n, length, 4096) * rng.normal(1, 0.005))
        for n in (1, 4)
        for length in (64, 512, 2048, 8192)
        for _ in range(5)
    ]
    found, hand_over = fit_prefill(samples, 4096)
    assert found.fixed_ms == pytest.approx(5, rel=0.2)
    assert found.per_token_ms == pytest.approx(0.18, rel=0.03)
    assert found.per_square_ms == pytest.approx(2e-6, rel=0.3)
    assert hand_over == pytest.approx(12, rel=0.2)


def test_moves_give_fixed_cost_link_and_pause() -> None:
    samples = [MoveSample(t, 30 + t / 100, p) for t, p in ((100, 20), (1000, 24), (4000, 22))]
    fixed, tokens_per_s, pause = fit_moves(samples)
    assert fixed == pytest.approx(30)
    assert tokens_per_s == pytest.approx(100_000)
    assert pause == 22


def test_a_link_too_fast_to_be_seen_is_as_fast_as_the_largest_move() -> None:
    samples = [MoveSample(t, 30.0, 20) for t in (100, 1000, 4000)]
    fixed, tokens_per_s, _ = fit_moves(samples)
    assert fixed == pytest.approx(30)
    assert tokens_per_s == pytest.approx(4000 / 0.030)


def test_too_uniform_measurements_are_an_error() -> None:
    same = [DecodeSample(4, 400, 20)] * 10
    with pytest.raises(FitError, match="apart"):
        fit_decode(same)
    with pytest.raises(FitError, match="no measurements"):
        fit_decode([])
    with pytest.raises(FitError):
        non_negative_fit(np.ones((1, 2)), np.ones(1))
