"""Goodput on a lattice of rates, and runs that stop when their verdict is certain."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.bench.workloads import RequestStream, lognormal
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulator import SimulationConfig
from sglang_ares.simulator.goodput import Point, try_rate
from sglang_ares.simulator.lattice import lattice_goodput, lattice_search


def point(attainment: float, most: float | None = None) -> Point:
    return Point(1.0, attainment, 0.0, 0.0, 0, 0, 0, most)


@given(
    limit90=st.integers(-120, 120),
    below=st.integers(0, 8),
    start=st.integers(-100, 100),
    known=st.booleans(),
)
def test_the_search_finds_the_highest_rate(
    limit90: int, below: int, start: int, known: bool
) -> None:
    """Attainment falls at two limits; a run tells no more than it was asked for."""
    limits = {0.9: limit90, 0.99: limit90 - below}

    def attempt(k: int, share: float) -> Point:
        return point(share, 1.0) if k <= limits[share] else point(0.0, share - 0.001)

    exact = point(1.0 if limits[0.99] >= 0 else 0.95 if limit90 >= 0 else 0.0)
    found, tries = lattice_search(
        attempt, start={0.9: start, 0.99: start}, known={0: exact} if known else None
    )
    assert found == limits
    assert tries <= 40


def test_no_rate_is_good_enough() -> None:
    found, _ = lattice_search(lambda k, share: point(0.5), start={0.9: 0})
    assert found == {0.9: None}


def cluster(**changes: object) -> tuple[SimulationConfig, RequestStream]:
    profile = msgspec.structs.replace(load_profile("24gb-qwen2.5-7b"), kv_capacity_tokens=8_000)
    settings: dict[str, object] = {
        "decode_workers": 2,
        "profile": profile,
        "ttft_slo_ms": 3000.0,
        "tpot_slo_ms": 24.0,
        "warmup_s": 10.0,
    }
    stream = lognormal(rate=2.0, duration_s=60, seed=3, output_mean=400, output_cv=1.0)
    return SimulationConfig(**(settings | changes)), stream  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rate", [0.5, 2.0, 4.0, 10.0])
def test_a_verdict_is_that_of_the_whole_run(rate: float, share: float) -> None:
    config, stream = cluster()
    whole = try_rate(config, stream, rate)
    early = try_rate(config, stream, rate, share)
    assert early.meets(share) == (whole.attainment >= share)
    assert early.most is not None
    assert early.attainment <= whole.attainment <= early.most + 1e-12
    assert early.retractions <= whole.retractions


def test_a_rejected_request_counts_as_missed() -> None:
    config, stream = cluster(warmup_s=0.0)
    prompts = stream.prompt_tokens.copy()
    prompts[:20] = 9_000
    stream = replace(stream, prompt_tokens=prompts)
    early = try_rate(config, stream, 0.1, 0.9)
    assert early.meets(0.9) is False
    assert early.most == pytest.approx(1 - 20 / len(stream), abs=0.1)
    assert try_rate(config, stream, 0.1).attainment < 0.9


def test_the_same_requests_count_at_every_rate() -> None:
    """A warm-up that stood still would swallow the whole stream at a high rate, and all be well."""
    config, stream = cluster()
    assert try_rate(config, stream, 100 * stream.rate).attainment < 0.5


def test_a_window_stays_as_long_at_every_rate() -> None:
    """What is compressed instead is over before memory is full: a burst, not a rate."""
    config, stream = cluster(warmup_s=20.0)
    for rate in (stream.rate, 1.5 * stream.rate):
        arrive = stream.scaled(stream.rate / rate).between(0, 30.0)
        alone = try_rate(config, arrive, arrive.rate)
        assert try_rate(config, stream, rate, window_s=30.0) == replace(alone, rate=rate)
    with pytest.raises(ValueError, match=r"the stream ends after .* it needs more requests"):
        try_rate(config, stream, 4 * stream.rate, window_s=30.0)


def test_no_rate_is_tried_at_which_the_stream_would_end_within_the_window() -> None:
    config, stream = cluster(ttft_slo_ms=1e6, tpot_slo_ms=1e6)
    found = lattice_goodput(config, stream, step=1.1, window_s=40.0)
    assert found.top == math.floor(math.log(stream.arrival_s[-1] / 40.0, 1.1))
    assert set(found.exponent.values()) == {found.top}


def test_arms_share_the_rates() -> None:
    """The rate found is on the lattice, meets the share, and the next one does not."""
    config, stream = cluster()
    found = lattice_goodput(config, stream, step=1.1)
    for share, k in found.exponent.items():
        assert k is not None
        assert found.rate[share] == pytest.approx(stream.rate * 1.1**k)
        assert try_rate(config, stream, found.rate[share]).attainment >= share
        assert try_rate(config, stream, found.rate[share] * 1.1).attainment < share
    elsewhere = lattice_goodput(config, stream, step=1.1, start={0.9: 5, 0.99: -5})
    assert elsewhere.exponent == found.exponent
