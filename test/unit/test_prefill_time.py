"""The law of prefill times, found from batches."""

from __future__ import annotations

import random

import pytest

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.prefill_time import PrefillTimeFit

LAW = PrefillTime(fixed_ms=8.0, per_token_ms=0.05, per_square_ms=2e-5)


def test_the_law_is_found_from_single_prompts() -> None:
    fit = PrefillTimeFit()
    for tokens in (64, 200, 700, 2000, 5000) * 4:
        fit.observe([(0, tokens)], LAW.ms(tokens))
    found = fit.law()
    assert found is not None
    for tokens in (100, 1000, 4000):
        assert found.ms(tokens) == pytest.approx(LAW.ms(tokens), rel=0.02)


def test_chunks_and_cached_prefixes_count_what_they_compute() -> None:
    fit, rng = PrefillTimeFit(), random.Random(0)
    for _ in range(200):
        start = rng.choice([0, 512, 2048])
        chunks = [(start, start + rng.randrange(50, 1500)) for _ in range(rng.randint(1, 3))]
        ms = LAW.fixed_ms + sum(
            LAW.per_token_ms * (end - begin) + LAW.per_square_ms * (end**2 - begin**2)
            for begin, end in chunks
        )
        fit.observe(chunks, ms)
    found = fit.law()
    assert found is not None
    assert found.ms(3000) == pytest.approx(LAW.ms(3000), rel=0.1)


def test_outliers_do_not_count() -> None:
    fit = PrefillTimeFit()
    for i in range(60):
        tokens = (100, 400, 1600)[i % 3]
        fit.observe([(0, tokens)], LAW.ms(tokens) * (50 if i % 10 == 0 else 1))
    found = fit.law()
    assert found is not None and found.ms(800) == pytest.approx(LAW.ms(800), rel=0.2)


def test_nothing_is_told_before_a_few_batches() -> None:
    fit = PrefillTimeFit()
    for _ in range(4):
        fit.observe([(0, 100)], 10.0)
    assert fit.law() is None
    fit.observe([(0, 100)], 10.0)
    found = fit.law()
    assert found is not None and found.ms(100) == pytest.approx(10.0)


@pytest.mark.parametrize("ms", [0.0, 1e9, float("nan")])
def test_durations_that_cannot_be_true_are_left_out(ms: float) -> None:
    fit = PrefillTimeFit()
    for _ in range(9):
        fit.observe([(0, 100)], ms)
        fit.observe([(5, 5)], 1.0)
    assert fit.law() is None
