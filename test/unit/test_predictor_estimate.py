"""Smoothing, correction, the tracker and what travels with a move."""

from __future__ import annotations

import logging
import math
import random
from array import array
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.auxiliary_output import CommittedTokens
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.disaggregation.request_state import recompute_input
from sglang_ares.srt.policy.types import LEVELS, Remaining
from sglang_ares.srt.predictor.correction import OnlineCorrection, _quantiles
from sglang_ares.srt.predictor.estimate import RequestPrediction, blend, keeps_trail_at
from sglang_ares.srt.predictor.head import LengthHead
from sglang_ares.srt.predictor.recorder import RecordingReader, StateRecorder, request_key
from sglang_ares.srt.predictor.state import (
    PredictionState,
    capture_prediction,
    prediction_fault,
    prediction_of,
    restore_prediction,
)
from sglang_ares.srt.predictor.tracker import HeadLaw, PredictionTracker

HEAD = LengthHead("quantile", [])
LAW = HeadLaw(HEAD, 0.5, None)


def raw(*logs: float) -> list[float]:
    """A raw output whose quantiles have these logarithms."""
    gaps = [math.log(math.expm1(b - a)) for a, b in pairwise(logs)]
    return [logs[0], *gaps]


ROW = raw(3.0, 3.5, 4.0, 4.5)
QUANTILES = [math.expm1(x) for x in (3.0, 3.5, 4.0, 4.5)]


def request(rid: str = "r", limit: int = 1000) -> Any:
    """What the tracker reads of upstream's request."""
    return SimpleNamespace(
        rid=rid,
        output_ids=array("q"),
        sampling_params=SimpleNamespace(max_new_tokens=limit),
        finished_reason=None,
    )


def step(tracker: PredictionTracker, reqs: list[Any], rows: list[list[float]], **more: Any) -> None:
    """One decode step: a token and a raw output for each request."""
    commits = []
    for req in reqs:
        commits.append(CommittedTokens(len(req.output_ids), (7,)))
        req.output_ids.append(7)
    states = np.asarray(more["states"], np.float32) if "states" in more else None
    tracker.observe(reqs, commits, np.array(rows, np.float32), states)


# --- smoothing ------------------------------------------------------------------------------


def test_the_first_prediction_stands_alone_and_shrinks_with_every_token() -> None:
    prediction = RequestPrediction(LAW)
    prediction.note(ROW, 1)
    assert prediction.estimate(1) == pytest.approx(QUANTILES)
    assert prediction.estimate(6) == pytest.approx([q - 5 for q in QUANTILES])
    assert prediction.estimate(5000) == (0, 0, 0, 0)


def test_it_is_brought_forward_every_20_tokens_and_blended_in_between() -> None:
    prediction = RequestPrediction(LAW)
    prediction.note(ROW, 20)
    prediction.note(raw(5, 5.5, 6, 6.5), 27)
    expected = [math.log1p(q - 7) for q in QUANTILES]
    wanted = [math.expm1((a + b) / 2) for a, b in zip(expected, (5, 5.5, 6, 6.5))]
    assert prediction.estimate(27) == pytest.approx(wanted)
    assert prediction.smoothed_at == 20
    prediction.note(raw(5, 5.5, 6, 6.5), 40)
    assert prediction.smoothed_at == 40


def test_a_limit_caps_the_estimate() -> None:
    prediction = RequestPrediction(LAW)
    prediction.note(ROW, 1)
    assert prediction.remaining(10, 12) == (2, 2, 2, 2)
    assert prediction.remaining(13, 12) == (0, 0, 0, 0)


def test_nothing_is_known_before_the_first_prediction() -> None:
    assert RequestPrediction(LAW).remaining(0, 10) is None


@given(
    st.lists(st.floats(0, 1e6), min_size=4, max_size=4).map(sorted),
    st.lists(st.floats(0, 1e6), min_size=4, max_size=4).map(sorted),
    st.floats(0, 1),
)
def test_a_blend_ascends_and_lies_between(a: Any, b: Any, weight: float) -> None:
    mixed = blend(tuple(a), tuple(b), weight)
    assert all(x <= y + 1e-6 * (1 + y) for x, y in pairwise(mixed))
    for x, y, z in zip(a, b, mixed):
        assert min(x, y) * (1 - 1e-9) - 1e-9 <= z <= max(x, y) * (1 + 1e-9) + 1e-9


def test_the_trail_has_few_points_however_long_the_output() -> None:
    kept = [n for n in range(100_000) if keeps_trail_at(n)]
    assert kept[:5] == [1, 20, 40, 80, 160] and len(kept) < 24


# --- the tracker ----------------------------------------------------------------------------


def test_a_row_that_is_no_number_is_ignored_counted_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker, good, bad = PredictionTracker(LAW), request("good"), request("bad")
    step(tracker, [good, bad], [ROW, ROW])
    before = prediction_of(bad)
    assert before is not None
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            step(tracker, [good, bad], [ROW, [math.nan] * 4])
    assert before.at == 0 and prediction_of(good).at == 3  # type: ignore[union-attr]
    assert tracker.not_finite == 3
    assert [r for r in caplog.records if "bad" in r.getMessage()] == caplog.records
    assert len(caplog.records) == 1
    assert tracker.remaining(bad) == pytest.approx([q - 4 for q in QUANTILES])


def test_rows_without_a_token_do_not_count() -> None:
    tracker, req = PredictionTracker(LAW), request()
    tracker.observe([req], [None], np.array([ROW], np.float32), None)
    assert prediction_of(req) is None and tracker.remaining(req) is None


def test_prefills_estimates_are_passed_on_once() -> None:
    tracker, req = PredictionTracker(LAW), request()
    step(tracker, [req], [ROW])
    ((rid, estimate),) = tracker.take_first()
    assert rid == "r" and estimate == pytest.approx([q - 1 for q in QUANTILES])
    assert tracker.take_first() == []


def test_of_output_that_is_recomputed_nothing_is_passed_on() -> None:
    """The prefill worker's request ends with its first token, the client's goes on."""
    attempt = TokenizedGenerateReqInput(
        **{f.name: None for f in msgspec.structs.fields(TokenizedGenerateReqInput) if f.required}
        | {"rid": "r#01", "input_ids": array("q", [1]), "sampling_params": SamplingParams()}
    )
    sent = recompute_input(attempt, array("q", range(50)))
    tracker, req = PredictionTracker(LAW), request("r#01")
    req.sampling_params = sent.sampling_params
    step(tracker, [req], [ROW])
    assert tracker.take_first() == []


def test_an_ended_request_is_judged_by_what_came() -> None:
    tracker = PredictionTracker(HeadLaw(HEAD, 0.5, OnlineCorrection()))
    req = request()
    req.output_ids.append(7)
    for _ in range(49):
        step(tracker, [req], [ROW])
    req.finished_reason = SimpleNamespace(to_json=lambda: {"type": "stop"})
    step(tracker, [req], [ROW])
    assert set(tracker.errors) == {1, 20, 40}
    sums = tracker.errors[1]
    assert sums.predictions == 1 and sums.absolute == pytest.approx(abs(QUANTILES[1] - 50))
    assert (sums.under_median, sums.under_high) == (0, 1)


def test_an_aborted_request_teaches_nothing() -> None:
    tracker, req = PredictionTracker(LAW), request()
    req.output_ids.append(7)
    req.finished_reason = SimpleNamespace(to_json=lambda: {"type": "abort"})
    step(tracker, [req], [ROW])
    assert not tracker.errors


def test_recorded_rows_come_back(tmp_path: Any) -> None:
    recorder = StateRecorder(tmp_path / "w.rows")
    tracker, req = PredictionTracker(LAW, recorder), request("mine#00")
    reader = RecordingReader(tmp_path)
    for i in range(41):
        step(tracker, [req], [ROW], states=[[float(i), -1.0]])
    (rows,) = reader.new_rows()
    assert rows["generated"].tolist() == [0, 20, 40]
    assert rows["state"][:, 0].tolist() == [0.0, 20.0, 40.0]
    assert {bytes(k) for k in rows["key"]} == {request_key("mine")}
    np.testing.assert_allclose(rows["predicted"][1], QUANTILES, rtol=1e-5)
    assert list(reader.new_rows()) == []


def test_what_earlier_servers_recorded_stays(tmp_path: Any) -> None:
    """Workers have the same ids and incarnations at every start."""
    for rid in ("first", "second"):
        recorder = StateRecorder.in_folder(tmp_path, worker_id=1, incarnation=0)
        step(PredictionTracker(LAW, recorder), [request(rid)], [ROW], states=[[1.0, 2.0]])
    keys = {bytes(k) for rows in RecordingReader(tmp_path).new_rows() for k in rows["key"]}
    assert keys == {request_key("first"), request_key("second")}


@pytest.mark.parametrize("where", ["/dev/full", "taken.rows", "file/w.rows"])
def test_where_recording_fails_requests_are_served_all_the_same(
    where: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken.rows").write_bytes(b"another's")
    (tmp_path / "file").touch()
    tracker, req = PredictionTracker(LAW, StateRecorder(tmp_path / where)), request()
    for _ in range(41):
        step(tracker, [req], [ROW], states=[[1.0, 2.0]])
    assert len(caplog.records) == 1 and where in caplog.text
    assert tracker.remaining(req) is not None
    assert (tmp_path / "taken.rows").read_bytes() == b"another's"


def test_nothing_is_recorded_behind_a_row_that_was_cut_short(tmp_path: Any) -> None:
    recorder = StateRecorder(tmp_path / "w.rows")
    tracker, req = PredictionTracker(LAW, recorder), request()
    step(tracker, [req], [ROW], states=[[1.0, 2.0]])
    file = recorder._file

    class NearlyFull:
        close = staticmethod(file.close)

        def write(self, data: bytes) -> int:
            return int(file.write(data[:5]))

    recorder._file = NearlyFull()
    for _ in range(20):
        step(tracker, [req], [ROW], states=[[1.0, 2.0]])
    assert file.closed
    (rows,) = RecordingReader(tmp_path).new_rows()
    assert rows["generated"].tolist() == [0]


# --- moves ----------------------------------------------------------------------------------


def test_a_moved_request_goes_on_from_what_was_known() -> None:
    source, target, req = PredictionTracker(LAW), PredictionTracker(LAW), request()
    req.output_ids.append(7)
    for i in range(55):
        step(source, [req], [raw(3 + i / 100, 3.5 + i / 100, 4 + i / 100, 4.5 + i / 100)])
    wire = msgspec.msgpack.encode(capture_prediction(req))
    state = msgspec.msgpack.decode(wire, type=PredictionState)
    moved = request()
    moved.output_ids = array("q", req.output_ids)
    restore_prediction(moved, state)
    before = target.remaining(moved)
    assert before is not None
    for _ in range(30):
        step(source, [req], [ROW])
        step(target, [moved], [ROW])
        assert target.remaining(moved) == pytest.approx(source.remaining(req))
    assert prediction_of(moved).trail == prediction_of(req).trail  # type: ignore[union-attr]


def test_a_prediction_that_cannot_be_true_is_a_fault() -> None:
    good = PredictionState(at=5, latest=(1, 2, 3, 4), smoothed=None, smoothed_at=0, trail=())
    assert prediction_fault(good, 5) is None and prediction_fault(None, 5) is None
    assert "output tokens" in str(prediction_fault(good, 4))
    falling = msgspec.structs.replace(good, latest=(4, 3, 2, 1))
    assert "ascend" in str(prediction_fault(falling, 5))


# --- online correction ----------------------------------------------------------------------


def spread(median: float, rng: random.Random) -> Remaining:
    return median * 0.7, median, median * 1.4, median * 2


def test_a_factor_that_lengths_drifted_by_is_learnt() -> None:
    correction, rng = OnlineCorrection(), random.Random(0)
    for _ in range(400):
        said = spread(100, rng)
        correction.learn(said, 300 * math.exp(rng.gauss(0, 0.3)), 1e9)
    assert correction.correct(spread(100, rng))[1] == pytest.approx(300, rel=0.2)
    assert correction.correct(spread(4000, rng))[1] == pytest.approx(4000)


def test_nothing_learnt_changes_nothing() -> None:
    said: Remaining = (1.0, 2.0, 3.0, 4.0)
    assert OnlineCorrection().correct(said) == said


def test_right_predictions_stay_nearly_what_they_were() -> None:
    correction, rng = OnlineCorrection(), random.Random(1)
    for _ in range(500):
        median = math.exp(rng.uniform(3, 7))
        actual = median * math.exp(rng.gauss(0, 0.5))
        q = [median * math.exp(0.5 * z) for z in (-0.6745, 0, 0.6745, 1.2816)]
        correction.learn((q[0], q[1], q[2], q[3]), actual, 1e9)
    corrected = correction.correct((70.0, 100.0, 140.0, 190.0))
    assert corrected == pytest.approx((70, 100, 140, 190), rel=0.2)
    assert list(corrected) == sorted(corrected)


@given(st.lists(st.tuples(*[st.floats(-9, 9)] * 4), min_size=1, max_size=40))
def test_the_corrections_quantiles_are_numpys(rows: Any) -> None:
    ordered = np.sort(np.array(rows), axis=0)
    wanted = [np.quantile(ordered[:, j], level) for j, level in enumerate(LEVELS)]
    assert _quantiles(ordered) == pytest.approx(wanted, abs=1e-12)
