"""The figures of a run and what is written of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sglang_ares.bench import report
from sglang_ares.bench.plot import migration_times, plot_kv_over_time
from sglang_ares.bench.replay import LoadSample, RequestResult, Run


def finished(rid: str, first_s: float, last_s: float, tokens: int) -> RequestResult:
    return RequestResult(
        rid,
        sent_s=1.0,
        first_token_s=first_s,
        last_token_s=last_s,
        token_ids=list(range(tokens)),
        finish_reason="stop",
    )


RUN = Run(
    results=[
        finished("a", 1.1, 2.1, 11),  # TTFT 100 ms, TPOT 100 ms
        finished("b", 1.3, 3.3, 11),  # TTFT 300 ms, TPOT 200 ms
        finished("c", 1.2, 1.2, 1),  # TTFT 200 ms, no TPOT
        RequestResult("d", error="aborted"),
    ],
    samples=[
        LoadSample(0.0, {1: 0, 2: 0}, 0),
        LoadSample(1.0, {1: 30, 2: 10}, 0),
        LoadSample(2.0, {1: 20, 2: 20}, 2),
        LoadSample(3.0, {1: 0, 2: 5}, 3),
    ],
    duration_s=4.0,
)


def test_percentile() -> None:
    assert report.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert report.percentile([7.0], 99) == 7.0
    assert math.isnan(report.percentile([], 50))


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentile_lies_within_and_grows(values: list[float]) -> None:
    p50, p99 = report.percentile(values, 50), report.percentile(values, 99)
    assert min(values) <= p50 <= p99 <= max(values)


def test_summary() -> None:
    summary = report.summarize(RUN, mismatches=1)
    assert (summary.completed, summary.failed) == (3, 1)
    assert (summary.migrations, summary.mismatches) == (3, 1)
    assert summary.output_tokens == 23
    assert summary.tokens_per_s == pytest.approx(23 / 4)
    assert summary.tpot_p50_ms == pytest.approx(150)
    assert summary.ttft_p50_ms == pytest.approx(200)
    assert summary.ttft_p99_ms == pytest.approx(298)
    assert summary.peak_kv_tokens == {1: 30, 2: 20}
    assert summary.imbalance == pytest.approx((1.5 + 1.0 + 2.0) / 3)
    assert summary.mean_gap_tokens == pytest.approx((0 + 20 + 0 + 5) / 4)


def test_json_is_valid_and_complete(tmp_path: Path) -> None:
    empty = report.summarize(Run(), 0)
    document = {
        "static": report.summarize(RUN, 0).to_dict() | {"series": report.series(RUN.samples)},
        "empty": empty.to_dict(),
        "nothing": {},
    }
    path = tmp_path / "new" / "figures.json"
    report.write_json(path, document)
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(document))
    assert read["static"]["peak_kv_tokens"] == {"1": 30, "2": 20}
    assert read["static"]["series"]["kv_tokens"]["1"] == [0, 30, 20, 0]
    assert read["empty"]["tpot_p50_ms"] is None
    assert max(map(len, path.read_text().splitlines())) < 200


def test_table_shows_both_runs() -> None:
    console = Console(width=100, record=True)
    runs = {"static": report.summarize(RUN, 0), "rescheduled": report.summarize(RUN, 2)}
    console.print(report.comparison_table(runs))
    text = console.export_text()
    for expected in ("static", "rescheduled", "150 / 199 ms", "peak KV, decode worker 2"):
        assert expected in text


def test_migration_times_count_every_move() -> None:
    assert migration_times(RUN) == [2.0, 2.0, 3.0]


def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    plot_kv_over_time(path, {"one": RUN, "nothing sampled": Run()}, title="t", note="n")
    assert path.read_bytes().startswith(b"\x89PNG")
