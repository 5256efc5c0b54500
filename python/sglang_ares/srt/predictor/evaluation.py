"""Judges predictions: errors overall, by length and by tokens generated, and calibration."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.policy.types import LEVELS
from sglang_ares.srt.predictor.arms import ARMS, ARMS_FILE, our_arm
from sglang_ares.srt.predictor.card import HeadCard, load_head
from sglang_ares.srt.predictor.dataset import (
    DatasetError,
    Labels,
    load_info,
    load_labels,
    load_split,
    save_labels,
)

_MEDIAN, _HIGH = LEVELS.index(0.5), LEVELS.index(0.9)
SHIPPED_SPLIT: Final = "test_split.npz"
_LENGTHS: Final = (0, 100, 200, 400, 800, 1600, 3200, 1 << 30)
_GENERATED: Final = (0, 20, 100, 200, 400, 800, 1600, 3200, 1 << 30)

# Predictions ``(N,)`` of a length, or ``(N, 1 + levels)``: a length and its quantiles.
Predictions = dict[str, NDArray[np.float64]]


def load_test(head_folder: Path, data: Path | None) -> tuple[Labels, Predictions, HeadCard]:
    """The test split of a data set, or the one shipped beside a head, and every arm's predictions.

    Raises :class:`DatasetError` if the arms were predicted for other labels.
    """
    head, card = load_head(head_folder)
    limit = int(card.data["max_new_tokens"])
    test = load_labels(head_folder / SHIPPED_SPLIT) if data is None else load_split(data, "test")
    if data is not None:
        limit = load_info(data).max_new_tokens
    arms: Predictions = {}
    path = head_folder / ARMS_FILE
    if not path.exists():
        raise DatasetError(
            f"{path} is missing: this head was trained without the arms it is compared with. Train "
            "it anew, without --head-only."
        )
    with np.load(path) as file:
        place = {(int(r["request"]), int(r["generated"])): i for i, r in enumerate(file["rows"])}
        wanted = [(int(r["request"]), int(r["generated"])) for r in test.rows]
        if not all(key in place for key in wanted):
            raise DatasetError(
                f"{path} has predictions for other requests than the test "
                "split's: train anew on this data set."
            )
        order = [place[key] for key in wanted]
        for name in ARMS[:-1]:
            arms[name] = file[name][order].astype(np.float64)
    ours = our_arm(head, card, test, limit)
    arms["ours"] = np.concatenate([ours[:, _MEDIAN : _MEDIAN + 1], ours], axis=1)
    most = np.maximum(limit - test.generated, 0)
    for name, predicted in arms.items():
        arms[name] = np.minimum(predicted, most if predicted.ndim == 1 else most[:, None])
    return test, arms, card


def ship_test_split(head_folder: Path, data: Path, rows: int) -> None:
    """Write a part of the test split beside a head: about ``rows`` labels of whole requests, evenly
    spaced when all are ordered by length, so that its lengths are spread as the whole split's."""
    test = load_split(data, "test")
    places = sorted(test.by_request(), key=lambda place: place[1].stop - place[1].start)
    count = max(1, round(len(places) * min(1.0, rows / len(test))))
    spaced = ((np.arange(count) + 0.5) * len(places) / count).astype(int)
    chosen = sorted((places[i] for i in spaced), key=lambda place: place[1].start)
    kept = np.concatenate([np.arange(s.start, s.stop) for _, s in chosen])
    records = {number: test.requests[number] for number, _ in chosen}
    save_labels(head_folder / SHIPPED_SPLIT, Labels(test.states[kept], test.rows[kept], records))


def judge(test: Labels, predicted: NDArray[np.float64]) -> dict[str, Any]:
    """The figures of one arm."""
    point = predicted if predicted.ndim == 1 else predicted[:, 0]
    error = np.abs(point - test.remaining)
    longest = test.lengths >= _longest_from(test)
    figures: dict[str, Any] = {
        **_errors(error),
        "by_length": _binned(error, test.lengths, _LENGTHS),
        "by_generated": _binned(error, test.generated, _GENERATED),
        "longest_10_percent": {"from_tokens": _longest_from(test), **_errors(error[longest])},
    }
    if predicted.ndim == 2:
        figures["calibration"] = _calibration(test, predicted)
        figures["longest_10_percent"]["calibration"] = _calibration(test, predicted, longest)
    return figures


def _errors(error: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "labels": len(error),
        "mae": round(float(error.mean()), 2),
        "median_absolute_error": round(float(np.median(error)), 2),
    }


def _binned(
    error: NDArray[np.float64], by: NDArray[np.int64], edges: tuple[int, ...]
) -> list[dict[str, Any]]:
    result = []
    for low, high in pairwise(edges):
        inside = (by >= low) & (by < high)
        if inside.any():
            result.append({"from": low, "below": high, **_errors(error[inside])})
    return result


def _calibration(
    test: Labels, predicted: NDArray[np.float64], rows: NDArray[np.bool_] | slice = slice(None)
) -> dict[str, float]:
    """Share of the labels at or under the predicted quantile."""
    return {
        str(LEVELS[j]): round(float((test.remaining <= predicted[:, 1 + j])[rows].mean()), 4)
        for j in (_MEDIAN, _HIGH)
    }


def _longest_from(test: Labels) -> int:
    lengths = [r.length for r in test.requests.values()]
    return int(np.quantile(lengths, 0.9)) if lengths else 0


def evaluate(head_folder: Path, data: Path | None) -> dict[str, Any]:
    """The whole report; see the module."""
    test, arms, card = load_test(head_folder, data)
    figures = {name: judge(test, predicted) for name, predicted in arms.items()}
    parameters: dict[str, int] = card.metrics["parameters"]
    for name, count in parameters.items():
        figures[name]["parameters"] = count
    ours = figures["ours"]["mae"]
    return {
        "model": card.model.model,
        "test": {
            "requests": len(test.requests),
            "labels": len(test),
            "prompts": card.data["prompts"],
            "shipped": data is None,
        },
        "smoothing": card.smoothing,
        "arms": figures,
        "ours_compared": {
            name: {"mae_lower_percent": round(100 * (1 - ours / figures[name]["mae"]), 2)}
            for name in ARMS[:-1]
        }
        | {
            "parameters_fewer_than_prompt_only_percent": round(
                100 * (1 - parameters["ours"] / parameters["prompt_only"]), 2
            )
        },
    }
