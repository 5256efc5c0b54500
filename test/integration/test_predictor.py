"""Predictions in the engine equal the same head's on the recorded states, moved or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from integration.predicting import REQUESTS, TOKENS
from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.predictor.card import save_head
from sglang_ares.srt.predictor.estimate import RequestPrediction
from sglang_ares.srt.predictor.head import new_head
from sglang_ares.srt.predictor.identity import identify
from sglang_ares.srt.predictor.recorder import INTERVAL, RecordingReader, request_key
from sglang_ares.srt.predictor.tracker import HeadLaw

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Of the recorded float32 state through the same float32 head, in another batch.
TOLERANCE = 1e-4
SMOOTHING = 0.6


@pytest.fixture(
    scope="module",
    params=[{}, {"disable_overlap_schedule": False}, {"tp_size": 2}],
    ids=["plain", "overlap", "tp2"],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine's answers, its head, and the recorded rows of each request, by tokens."""
    folder = tmp_path_factory.mktemp("predictor")
    head = new_head(128, "quantile", torch.Generator().manual_seed(1))
    head.shift = (0.1, 0.2, 0.3, 0.4)
    identity = identify(str(MODEL_DIR))
    save_head(folder / "head", head, identity, smoothing=SMOOTHING, data={}, metrics={})
    command = [
        *(sys.executable, str(Path(__file__).with_name("predicting.py"))),
        *(str(folder / "head"), str(folder / "rows"), json.dumps(request.param)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=800, check=False, process_group=0
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    rows: dict[bytes, dict[int, Any]] = {}
    for block in RecordingReader(folder / "rows").new_rows():
        for row in block:
            rows.setdefault(bytes(row["key"]), {})[int(row["generated"])] = row
    return json.loads(lines[0].removeprefix("RESULT ")), head, rows


def test_every_request_was_recorded_and_most_were_moved(run: Any) -> None:
    """Prefill and decode, at every interval."""
    document, _, rows = run
    assert sum(document["moved"].values()) >= REQUESTS, document["moved"]
    for number in range(REQUESTS):
        own = rows[request_key(f"p-{number}")]
        assert sorted(own) == list(range(0, TOKENS, INTERVAL))


def test_predictions_equal_the_offline_ones(run: Any) -> None:
    """Prefill and decode, before and after moves."""
    _, head, rows = run
    every = [row for own in rows.values() for row in own.values()]
    states = torch.from_numpy(np.stack([r["state"] for r in every]))
    wanted = head.remaining(head(states).numpy())
    found = np.stack([r["predicted"] for r in every])
    np.testing.assert_allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_estimates_equal_the_offline_ones(run: Any) -> None:
    """The smoothing's state has moved with the request."""
    _, head, rows = run
    law = HeadLaw(head, SMOOTHING, None)
    for own in rows.values():
        prediction = RequestPrediction(law)
        for generated in sorted(own)[1:]:
            raw = head(torch.from_numpy(own[generated]["state"][None].copy())).numpy()[0]
            prediction.note(raw.tolist(), generated)
            np.testing.assert_allclose(
                own[generated]["estimate"],
                prediction.estimate(generated),
                rtol=10 * TOLERANCE,
                atol=10 * TOLERANCE,
            )


def test_who_asked_sees_predictions_in_the_answer(run: Any) -> None:
    """And nobody else does."""
    document, _, _ = run
    for rid, meta in document["answers"].items():
        asked = int(rid.split("-")[1]) % 2 == 0
        assert ("predicted_remaining" in meta) == asked, (rid, meta.keys())
        for produced, *quantiles in meta.get("predicted_remaining", []):
            assert quantiles == sorted(quantiles)
            assert all(0 <= q <= TOKENS - produced for q in quantiles)


def test_live_requests_show_predictions(run: Any) -> None:
    """In the document of ``/ares/requests``."""
    document, _, _ = run
    shown = [r for r in document["seen"] if r["predicted_remaining"] is not None]
    assert shown
    assert all(len(r["predicted_remaining"]) == 4 for r in shown)
