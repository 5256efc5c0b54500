"""Figures of single moves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.bench.pauses import (
    Landing,
    Move,
    as_document,
    gaps_ending_within,
    longest_gap,
    parse_landings,
    plot_pauses,
    step_ratio,
    summarize_pauses,
)

MOVE = Move("live copy", 256, 10.0, 2, 30.0, 5.0, 100, 0)


def test_landings_are_read_from_the_log_as_the_worker_writes_it() -> None:
    log = (
        "[2026-01-01 00:00:00] migration 3 rid=a from=1 to=2 tokens=9 sent=9 saved=0 ms=2.0\n"
        "[2026-01-01 00:00:00] migration 3 rid=a landed on=2 pause_ms=12.5 steps=2\n"
        "something else\n"
        "[2026-01-01 00:00:01] migration 4 rid=b-c landed on=1 pause_ms=7.0 steps=1\n"
    )
    assert parse_landings(log) == [Landing("a", 2, 12.5, 2), Landing("b-c", 1, 7.0, 1)]


@pytest.mark.parametrize(
    "pauses,step_ms,within",
    [
        ([19.0] * 10, 5.0, True),
        ([21.0] * 10, 5.0, False),
        ([39.0] * 10, 20.0, True),
        ([10.0] * 98 + [80.0] * 2, 5.0, False),
        ([10.0] * 98 + [80.0] * 2, 20.0, True),
    ],
)
def test_the_target_is_two_steps_or_20_ms(
    pauses: list[float], step_ms: float, within: bool
) -> None:
    moves = [replace(MOVE, pause_ms=p, step_ms=step_ms) for p in pauses]
    assert summarize_pauses(moves).within_target is within


@given(st.lists(st.floats(0, 100), max_size=40).map(sorted), st.floats(0, 100), st.floats(0, 100))
def test_gaps_within_all_of_time_add_up(times: list[float], start: float, end: float) -> None:
    assert sum(gaps_ending_within(times, -1, 101)) == pytest.approx(
        times[-1] - times[0] if times else 0, abs=1e-6
    )
    gaps = gaps_ending_within(times, start, end)
    first, last = longest_gap(times, start, end)
    assert last - first == pytest.approx(max(gaps, default=0.0), abs=1e-9)


def test_step_ratio() -> None:
    one = step_ratio([[2.0, 4.0]], [[1.0, 1.0, 4.0]])
    assert one.ratio == pytest.approx(1.5)
    assert one.low <= one.ratio <= one.high
    assert math.isnan(step_ratio([[]], [[1.0]]).ratio) and math.isnan(step_ratio([], []).ratio)


def test_step_ratio_does_not_mix_loads() -> None:
    """Half as long again under either load is half as long again over both, however many gaps of
    each there are."""
    both = step_ratio([[1.5], [15.0] * 9], [[1.0] * 9, [10.0]])
    assert (both.ratio, both.low, both.high) == pytest.approx((1.5, 1.5, 1.5))


def test_the_picture_is_written(tmp_path: Path) -> None:
    summary = summarize_pauses([MOVE, replace(MOVE, pause_ms=20.0)])
    arms = {"live copy": {256: summary, 1024: summary}, "stop and copy": {256: summary}}
    plot_pauses(tmp_path / "a" / "p.png", arms, title="t")
    assert (tmp_path / "a" / "p.png").stat().st_size > 5000
    assert as_document(arms)["stop and copy"]["256"]["moves"] == 2
