"""Fits a worker's step-time law to its own decode steps.

Steps of about the same batch share a cell: a power of 2^(1/4) of the number of requests and of
resident tokens each. A cell keeps its last few steps, and its median is what the law is fitted to:
so a step that waited for a KV transfer or a prefill does not count, load that the worker has not
seen for a while is still remembered, and drift is followed.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from itertools import combinations
from statistics import median

import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.policy.types import StepTime

_PER_OCTAVE = 4
# Steps a cell keeps; how many it must have to count; most cells, the least recently seen go first.
_KEPT = 15
_LEAST_STEPS = 5
_MOST_CELLS = 128
# A law is told once there are so many cells, and the largest load is so many times the smallest.
_LEAST_CELLS = 4
_LEAST_RANGE = 1.5
# A law holds for so many steps before it is fitted again (one from few steps for fewer): a fit
# takes longer than many a step.
_REFIT_AFTER = 100
_REFIT_AFTER_LEAST = 10
# Loads (requests, resident tokens) at which an earlier law has a say, and how much of one next to
# a cell's: enough to decide what steps that are alike leave open, too little to bend what they
# tell.
_PRIOR_LOADS = ((1, 64), (1, 4096), (8, 1024), (8, 16384), (64, 8192), (64, 131072))
_PRIOR_WEIGHT = 0.05
# Durations of a step that can be true.
_PLAUSIBLE_MS = (1e-3, 1e6)


class StepTimeFit:
    """Learns :class:`StepTime` from steps, by least squares of the relative error with
    coefficients that are not negative. ``prior``: a law from before, if any is known; it holds
    until there is one of this worker's own."""

    def __init__(self, prior: StepTime | None = None) -> None:
        self._points = _points_of(prior)
        self._cells: OrderedDict[tuple[int, int], deque[tuple[int, int, float]]] = OrderedDict()
        # Of each cell that counts, the median of its steps; cells that have changed since.
        self._medians: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._changed: set[tuple[int, int]] = set()
        self._law = prior
        self._seen = 0
        self._fit_at = 0

    def observe(self, requests: int, tokens: int, ms: float) -> None:
        """A step over ``requests`` requests with ``tokens`` resident tokens took ``ms``."""
        if requests < 1 or tokens < 1 or not _PLAUSIBLE_MS[0] <= ms <= _PLAUSIBLE_MS[1]:
            return
        key = (_octave(requests), _octave(tokens))
        cell = self._cells.setdefault(key, deque(maxlen=_KEPT))
        self._cells.move_to_end(key)
        cell.append((requests, tokens, ms))
        self._changed.add(key)
        if len(self._cells) > _MOST_CELLS:
            oldest, _ = self._cells.popitem(last=False)
            self._medians.pop(oldest, None)
            self._changed.discard(oldest)
        self._seen += 1

    def law(self) -> StepTime | None:
        """The law as of some hundred steps ago at most, or None while the steps seen were too few
        or too much alike."""
        if self._seen >= self._fit_at:
            self._fit_at = self._seen + max(_REFIT_AFTER_LEAST, min(_REFIT_AFTER, self._seen // 4))
            self._law = self._fit() or self._law
        return self._law

    def _fit(self) -> StepTime | None:
        for key in self._changed:
            requests, tokens, ms = zip(*self._cells[key], strict=True)
            if len(ms) >= _LEAST_STEPS:
                self._medians[key] = (median(requests), median(tokens), median(ms))
        self._changed.clear()
        if len(self._medians) < _LEAST_CELLS:
            return None
        cells = np.array([[*cell, 1.0] for cell in self._medians.values()])
        requests, tokens, ms, weight = cells.T
        if max(np.ptp(np.log(requests)), np.ptp(np.log(tokens))) < math.log(_LEAST_RANGE):
            return None
        requests, tokens, ms, weight = np.concatenate([cells, self._points]).T
        features = np.stack([np.ones_like(ms), requests, tokens], axis=1) * (weight / ms)[:, None]
        fixed, per_request, per_token = not_negative(features, weight).tolist()
        return StepTime(fixed_ms=fixed, per_request_ms=per_request, per_token_ms=per_token)


def _points_of(prior: StepTime | None) -> NDArray[np.float64]:
    """``(N, 4)``: requests, tokens, ms and weight, where the prior has a say."""
    if prior is None:
        return np.empty((0, 4))
    return np.array(
        [[n, t, max(prior.ms(n, t), _PLAUSIBLE_MS[0]), _PRIOR_WEIGHT] for n, t in _PRIOR_LOADS]
    )


def _octave(count: int) -> int:
    return math.floor(_PER_OCTAVE * math.log2(count))


def not_negative(features: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients >= 0, shape ``(F,)``, that minimise ``|features @ x - wanted|``: the best over
    all sets of features that may be other than 0, as there are few."""
    count = features.shape[1]
    # Of comparable size, or the solver takes small coefficients for none.
    scale = np.maximum(np.abs(features).max(axis=0), 1e-12)
    best, least = np.zeros(count), float(wanted @ wanted)
    for size in range(1, count + 1):
        for used in combinations(range(count), size):
            columns = list(used)
            found, *_ = np.linalg.lstsq(features[:, columns] / scale[columns], wanted)
            error = features[:, columns] @ (found / scale[columns]) - wanted
            if (found >= 0).all() and error @ error < least * (1 - 1e-9):
                best = np.zeros(count)
                best[columns] = found / scale[columns]
                least = float(error @ error)
    return best
