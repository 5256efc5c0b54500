"""Smoothing and calibration of a head, chosen on the validation split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from sglang_ares.srt.policy.types import LEVELS, Remaining
from sglang_ares.srt.predictor.correction import OnlineCorrection
from sglang_ares.srt.predictor.dataset import Labels
from sglang_ares.srt.predictor.estimate import RequestPrediction
from sglang_ares.srt.predictor.head import Floats, LengthHead
from sglang_ares.srt.predictor.training import cap, median_error, predict

WEIGHTS: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


class _ReadAlready:
    """A law whose raw outputs are quantiles."""

    def __init__(self, weight: float, correction: OnlineCorrection | None = None) -> None:
        self.weight = weight
        self._correction = correction

    def read(self, row: Sequence[float]) -> Remaining:
        a, b, c, d = row
        return a, b, c, d

    def correct(self, quantiles: Remaining) -> Remaining:
        return self._correction.correct(quantiles) if self._correction else quantiles


def smoothed(
    predicted: Floats,
    labels: Labels,
    weight: float,
    correction: OnlineCorrection | None = None,
) -> Floats:
    """``(N, len(LEVELS))`` predictions as a worker would smooth them, with the same code.

    As there, what prefill saw (0 tokens generated) is not carried over to decoding.
    """
    result = np.empty_like(predicted)
    law = _ReadAlready(weight, correction)
    generated = labels.generated.tolist()
    for _, rows in labels.by_request():
        prediction = RequestPrediction(law)
        for i in range(rows.start, rows.stop):
            if generated[i] and generated[i - 1] == 0:
                prediction = RequestPrediction(law)
            prediction.note(predicted[i].tolist(), generated[i])
            result[i] = prediction.estimate(generated[i])
    return result


def choose_weight(predicted: Floats, labels: Labels, limit: int) -> tuple[float, dict[str, float]]:
    """The smoothing with the lowest MAE, and the MAE of each."""
    errors = {
        w: median_error(cap(smoothed(predicted, labels, w), labels, limit), labels) for w in WEIGHTS
    }
    best = min(errors, key=lambda w: errors[w])
    return best, {str(w): round(e, 3) for w, e in errors.items()}


def calibrated(head: LengthHead, labels: Labels, weight: float, limit: int) -> LengthHead:
    """The head with shifts by which its smoothed quantiles hold on ``labels``."""
    shift = np.zeros(len(LEVELS))
    actual = np.log1p(labels.remaining)
    for _ in range(4):
        head = LengthHead(head.kind, head.layers, tuple(shift.tolist()))
        estimate = cap(smoothed(predict(head, labels.states), labels, weight), labels, limit)
        off = actual[:, None] - np.log1p(estimate)
        shift = shift + [float(np.quantile(off[:, j], q)) for j, q in enumerate(LEVELS)]
    return LengthHead(head.kind, head.layers, tuple(shift.tolist()))


def in_waves(labels: Labels, at_once: int) -> Iterator[list[slice]]:
    """The requests in order, ``at_once`` under way together: those of a wave have ended before the
    next begins."""
    places = [rows for _, rows in labels.by_request()]
    for i in range(0, len(places), at_once):
        yield places[i : i + at_once]
