"""The search for goodput."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.bench.workloads import lognormal
from sglang_ares.profiles.profile import load_profile
from sglang_ares.simulator import SimulationConfig
from sglang_ares.simulator.goodput import Point, goodput, goodput_of_arms, search
from sglang_ares.simulator.plots import plot_attainment


def point(rate: float, attainment: float) -> Point:
    return Point(rate, attainment, 0.0, 0.0, 0, 0, 0)


@given(limit90=st.floats(0.5, 500), ratio=st.floats(0.05, 1), start=st.floats(0.5, 20))
def test_the_search_finds_the_limits(limit90: float, ratio: float, start: float) -> None:
    """Attainment falls from 1 to 0.95 to 0 at two limits: each is found to within 2 %."""
    limit99 = limit90 * ratio
    tried: list[float] = []

    def attempt(rate: float) -> Point:
        tried.append(rate)
        return point(rate, 1.0 if rate <= limit99 else 0.95 if rate <= limit90 else 0.0)

    found = search(attempt, start_rate=start)
    for share, limit in ((0.9, limit90), (0.99, limit99)):
        assert limit / 1.021 <= found.rate[share] <= limit
    assert len(tried) == len(set(tried)) == len(found.points) <= 40


def test_no_rate_is_good_enough() -> None:
    found = search(lambda rate: point(rate, 0.5), start_rate=1.0)
    assert found.rate == {0.9: 0.0, 0.99: 0.0}


def test_goodput_of_simulated_arms(tmp_path: Path) -> None:
    """The rate found meets the share, in one process as in two."""
    profile = msgspec.structs.replace(load_profile("24gb-qwen2.5-7b"), kv_capacity_tokens=20_000)
    stream = lognormal(rate=1.0, duration_s=100, seed=3, output_mean=400, output_cv=1.0)
    arms = {
        name: SimulationConfig(
            decode_workers=2,
            profile=profile,
            placement=name,
            ttft_slo_ms=3000.0,
            tpot_slo_ms=24.0,
        )
        for name in ("round_robin", "least_tokens")
    }
    alone = dict(goodput_of_arms(arms, stream, precision=0.1))
    assert alone == dict(goodput_of_arms(arms, stream, precision=0.1, processes=2))
    for found in alone.values():
        assert 0 < found.rate[0.99] <= found.rate[0.9]
        at = {p.rate: p.attainment for p in found.points}
        assert at[found.rate[0.9]] >= 0.9
    plot_attainment(tmp_path / "a.png", {name: found.points for name, found in alone.items()})
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_goodput_needs_an_slo() -> None:
    stream = lognormal(rate=1.0, duration_s=10, seed=3)
    with pytest.raises(ValueError, match="ttft_slo_ms"):
        goodput(SimulationConfig(), stream)
