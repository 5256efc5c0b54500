"""SLO attainment over sliding windows, and which requests count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.managers.served_requests import count_ended
from sglang_ares.srt.observability.slo import WINDOWS_S, Served, SloAttainment
from sglang_ares.srt.policy.elastic.instances import Slo

SLO = Slo(ttft_ms=1000.0, tpot_ms=50.0)


def test_each_promise_and_both() -> None:
    attainment = SloAttainment(SLO)
    attainment.served(Served(1.0, 0.5, 11), now=10.0)  # as promised, to the millisecond
    attainment.served(Served(1.1, 0.5, 11), now=10.2)
    attainment.served(Served(0.1, 0.6, 11), now=11.0)
    attainment.served(Served(1.1, 0.6, 11), now=12.0)
    window = attainment.window(60, now=12.0)
    assert window == {"requests": 4, "ttft": 0.5, "tpot": 0.5, "both": 0.25}


def test_one_token_has_no_time_per_token() -> None:
    attainment = SloAttainment(SLO)
    attainment.served(Served(0.5, 0.0, 1), now=1.0)
    assert attainment.window(60, 1.0)["both"] == 1.0


def test_a_failure_keeps_no_promise() -> None:
    attainment = SloAttainment(SLO)
    attainment.failed(now=1.0)
    window = attainment.window(60, 1.0)
    assert window == {"requests": 1, "ttft": 0.0, "tpot": 0.0, "both": 0.0}


def test_a_window_forgets() -> None:
    attainment = SloAttainment(SLO)
    attainment.failed(now=100.0)
    attainment.served(Served(0.1, 0.1, 11), now=150.0)
    assert attainment.window(60, 159.0)["requests"] == 2
    assert attainment.window(60, 160.0)["both"] == 1.0
    assert attainment.window(600, 160.0)["both"] == 0.5
    assert attainment.window(60, 300.0) == {
        "requests": 0, "ttft": None, "tpot": None, "both": None
    }  # fmt: skip


def test_what_was_not_promised_is_not_told() -> None:
    attainment = SloAttainment(Slo(ttft_ms=0.0, tpot_ms=50.0))
    attainment.served(Served(99.0, 0.1, 11), now=1.0)
    assert attainment.window(60, 1.0) == {"requests": 1, "ttft": None, "tpot": 1.0, "both": 1.0}
    assert attainment.status(1.0)["ttft_slo_ms"] is None


def test_the_windows_of_a_dilated_cluster_are_longer() -> None:
    attainment = SloAttainment(SLO, dilation=4.0)
    attainment.failed(now=100.0)
    assert attainment.window(60, 336.0)["requests"] == 1
    assert attainment.window(60, 344.0)["requests"] == 0


@given(
    st.lists(
        st.tuples(st.floats(0, 400), st.floats(0, 3), st.floats(0, 3), st.integers(1, 60)),
        max_size=60,
    )
)
def test_windows_are_what_counting_gives(steps: list[tuple[float, float, float, int]]) -> None:
    """Against a list of all that ended, whole seconds as the windows go; and memory is bounded."""
    attainment, now = SloAttainment(SLO), 0.0
    ended: list[tuple[int, bool, bool]] = []
    for gap, ttft_s, decode_s, tokens in steps:
        now += gap
        request = Served(ttft_s, decode_s, tokens)
        attainment.served(request, now)
        ended.append((int(now), 1e3 * ttft_s <= 1000.0, 1e3 * request.tpot_s <= 50.0))
        for window_s in WINDOWS_S:
            counted = [e for e in ended if e[0] > int(now) - window_s]
            window = attainment.window(window_s, now)
            assert window["requests"] == len(counted)
            share = sum(a and b for _, a, b in counted) / len(counted)
            assert math.isclose(window["both"] or 0.0, share)
    assert len(attainment._seconds) <= max(WINDOWS_S)


# --- which requests count -------------------------------------------------------------------


def counted(
    reason: Mapping[str, Any] | None,
    *,
    stream: bool = True,
    users: bool = True,
    tokens: int = 11,
    client_left: bool = False,
) -> dict[str, Any]:
    """The window after one ended request, 0.2 s to the first token and 1 s from there."""
    times = SimpleNamespace(get_first_token_latency=lambda: 0.2, get_decode_latency=lambda: 1.0)
    obj = SimpleNamespace(stream=stream, log_metrics=users)
    attainment = SloAttainment(SLO)
    state = SimpleNamespace(obj=obj, time_stats=times, abort_sent=client_left)
    count_ended(attainment, state, reason, tokens, now=1.0)
    return attainment.window(60, 1.0)


@pytest.mark.parametrize("kind", ["stop", "length"])
def test_a_served_stream_counts(kind: str) -> None:
    assert counted({"type": kind}) == {"requests": 1, "ttft": 1.0, "tpot": 0.0, "both": 0.0}


def test_an_error_of_the_clusters_counts_as_missed() -> None:
    missed = counted({"type": "abort", "status_code": 503}, tokens=0)
    assert missed == {"requests": 1, "ttft": 0.0, "tpot": 0.0, "both": 0.0}
    also = counted({"type": "abort", "status_code": 500}, stream=False)
    assert also["requests"] == 1, "whoever asked for no stream got an error too"


@pytest.mark.parametrize(
    "left_out",
    [
        {"reason": {"type": "abort"}},
        {"reason": {"type": "abort", "status_code": 400}},
        {"reason": {"type": "stop"}, "stream": False},
        {"reason": {"type": "stop"}, "users": False},
        {"reason": {"type": "abort", "status_code": 503}, "users": False},
        {"reason": {"type": "length"}, "tokens": 0},
        {"reason": {"type": "abort", "status_code": 500}, "tokens": 0, "client_left": True},
    ],
)
def test_what_is_left_out(left_out: dict[str, Any]) -> None:
    assert counted(**left_out)["requests"] == 0
