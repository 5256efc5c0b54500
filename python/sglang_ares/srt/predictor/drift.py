"""Lengths that drift: a head trained on one mix of tasks, judged on another, with and without the
online correction."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from sglang_ares.srt.policy.types import LEVELS, Remaining
from sglang_ares.srt.predictor.card import HeadCard
from sglang_ares.srt.predictor.correction import OnlineCorrection
from sglang_ares.srt.predictor.dataset import SPLITS, Labels, load_info, load_split
from sglang_ares.srt.predictor.estimate import keeps_trail_at
from sglang_ares.srt.predictor.evaluation import judge
from sglang_ares.srt.predictor.head import Floats, LengthHead
from sglang_ares.srt.predictor.smoothing import in_waves, smoothed
from sglang_ares.srt.predictor.training import cap, median_error, predict

_MEDIAN: Final = LEVELS.index(0.5)
# Parts of equally many requests, in order, whose errors are told one by one.
_PARTS: Final = 12


def corrected(predicted: Floats, labels: Labels, weight: float, limit: int, at_once: int) -> Floats:
    """Estimates ``(N, len(LEVELS))`` of requests that come ``at_once`` at a time, each corrected
    by those that ended before; learning as a worker does, from the moments of the trail."""
    correction = OnlineCorrection()
    result = np.empty_like(predicted)
    generated, remaining = labels.generated.tolist(), labels.remaining.tolist()
    for wave in in_waves(labels, at_once):
        for rows in wave:
            part = Labels(labels.states[rows], labels.rows[rows], labels.requests)
            result[rows] = smoothed(predicted[rows], part, weight, correction)
        for rows in wave:
            for i in range(rows.start, rows.stop):
                if keeps_trail_at(generated[i]):
                    a, b, c, d = predicted[i].tolist()
                    said: Remaining = (a, b, c, d)
                    correction.learn(said, remaining[i], limit - generated[i])
    return result


def judge_drift(
    head: LengthHead, card: HeadCard, folder: Path, at_once: int = 32
) -> dict[str, Any]:
    """Figures on all requests of another data set, without and with correction."""
    limit = load_info(folder).max_new_tokens
    parts = [load_split(folder, split) for split in SPLITS]
    places = sorted(
        (number, part, rows) for part, x in enumerate(parts) for number, rows in x.by_request()
    )
    labels = Labels(
        np.concatenate([parts[p].states[rows] for _, p, rows in places]),
        np.concatenate([parts[p].rows[rows] for _, p, rows in places]),
        {n: r for x in parts for n, r in x.requests.items()},
    )
    predicted = predict(head, labels.states)
    plain = cap(smoothed(predicted, labels, card.smoothing), labels, limit)
    learnt = cap(corrected(predicted, labels, card.smoothing, limit, at_once), labels, limit)
    return {
        "trained_on": card.data["prompts"],
        "tested_on": load_info(folder).prompts,
        "requests": len(labels.requests),
        "at_once": at_once,
        "in_order": _in_order(labels, {"uncorrected": plain, "corrected": learnt}),
        **{
            name: judge(labels, np.concatenate([q[:, _MEDIAN : _MEDIAN + 1], q], axis=1))
            for name, q in (("uncorrected", plain), ("corrected", learnt))
        },
    }


def _in_order(labels: Labels, estimates: dict[str, Floats]) -> list[dict[str, Any]]:
    """MAE of successive parts of the requests: how fast the correction learns."""
    places = [rows for _, rows in labels.by_request()]
    edges = np.linspace(0, len(places), min(_PARTS, len(places)) + 1).astype(int).tolist()
    result = []
    for first, end in pairwise(edges):
        rows = slice(places[first].start, places[end - 1].stop)
        part = Labels(labels.states[rows], labels.rows[rows], labels.requests)
        errors = {f"mae_{n}": round(median_error(q[rows], part), 2) for n, q in estimates.items()}
        result.append({"from_request": first, "below": end, "labels": len(part), **errors})
    return result
