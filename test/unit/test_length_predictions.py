"""The controller's use of the length prior: what it learns from, and who is told."""

from __future__ import annotations

import msgspec
import pytest

from sglang_ares.srt.managers.length_predictions import LengthPredictions
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.types import PREFILL, WorkerLoad
from unit.policy_clusters import exactly, request, worker
from unit.test_memory_relief import report_of


def reported(
    predictions: LengthPredictions, load: WorkerLoad, ended: list[int] | None = None
) -> None:
    report = report_of(load)
    predictions.on_report(msgspec.structs.replace(report, ended_lengths=ended or []))


def test_it_learns_from_what_ended_on_decode_workers() -> None:
    predictions = LengthPredictions(use_prior=True)
    load = worker(0, [request("a", 200)])
    assert predictions.of_new() is None
    reported(predictions, msgspec.structs.replace(load, role=PREFILL), [100] * 50)
    assert predictions.status() == {"seen": 0, "median_output_tokens": None}
    reported(predictions, load, [100] * 50)
    assert predictions.status()["seen"] == 50
    assert predictions.status()["median_output_tokens"] == pytest.approx(100, rel=0.2)


def test_placement_sees_what_was_reported_last() -> None:
    predictions = LengthPredictions(use_prior=False)
    first, second = worker(3, [request("a", 200, exactly(70))]), worker(5, [])
    reported(predictions, first)
    table = predictions.table([second, first])
    assert table.remaining_tokens.tolist() == [0, 70]
    assert table.worker_id.tolist() == [5, 3]


def test_requests_without_a_prediction_get_the_priors() -> None:
    load = worker(0, [request("a", 200), request("b", 200, exactly(7))])
    with_it, without = LengthPredictions(use_prior=True), LengthPredictions(use_prior=False)
    for predictions in (with_it, without):
        reported(predictions, load, [1000] * 50)
    filled = with_it.filled(Snapshot.of([load])).requests.remaining[:, 1]
    assert filled.tolist() == [pytest.approx(900, rel=0.2), 7]
    assert with_it.table([load]).remaining_tokens[0] == filled.sum()
    assert without.of_new() is None
    unknown = Snapshot.of([load])
    assert without.filled(unknown) is unknown
