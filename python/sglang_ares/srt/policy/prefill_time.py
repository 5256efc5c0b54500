"""Fits a worker's prefill-time law to its own prefill batches.

Batches of about the same size share a cell, whose median counts, as in ``step_time.py``: a batch
that waited for the machine does not bend the law, and drift is followed.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.step_time import not_negative

_PER_OCTAVE = 2
_KEPT = 15
_MOST_CELLS = 64
_LEAST_BATCHES = 5
# A law holds for so many batches before it is fitted again; one from few batches for fewer.
_REFIT_AFTER = 10
# While the largest batch is not so many times the smallest, the law is proportional to the tokens:
# all to the square of some short prompts would make long ones take minutes.
_LEAST_RANGE = 4.0
# Prompt lengths at which an earlier law has a say, and how much of one next to a cell's: enough to
# decide what batches that are alike leave open, too little to bend what they tell.
_PRIOR_TOKENS = (64, 512, 4096)
_PRIOR_WEIGHT = 0.05
_PLAUSIBLE_MS = (1e-3, 1e7)


class PrefillTimeFit:
    """Learns :class:`PrefillTime` from batches, by least squares of the relative error with
    coefficients that are not negative. ``prior``: a law from before, if any is known; it is not
    told as this one's."""

    def __init__(self, prior: PrefillTime | None = None) -> None:
        self._prior = _points_of(prior)
        self._cells: OrderedDict[tuple[int, int], deque[tuple[int, int, float]]] = OrderedDict()
        self._seen = 0
        self._law: PrefillTime | None = None
        self._fit_at = _LEAST_BATCHES

    def observe(self, chunks: Sequence[tuple[int, int]], ms: float) -> None:
        """A batch that computed the KV of tokens [start, end) of each of its prompts took
        ``ms``."""
        tokens = sum(end - start for start, end in chunks)
        squares = sum(end**2 - start**2 for start, end in chunks)
        if tokens < 1 or not _PLAUSIBLE_MS[0] <= ms <= _PLAUSIBLE_MS[1]:
            return
        key = (_octave(tokens), _octave(squares))
        cell = self._cells.setdefault(key, deque(maxlen=_KEPT))
        self._cells.move_to_end(key)
        cell.append((tokens, squares, ms))
        if len(self._cells) > _MOST_CELLS:
            self._cells.popitem(last=False)
        self._seen += 1

    def law(self) -> PrefillTime | None:
        """The law as of some ten batches ago at most, or None while too few were seen."""
        if self._seen >= self._fit_at:
            self._fit_at = self._seen + max(2, min(_REFIT_AFTER, self._seen // 4))
            cells = np.array([[*np.median(c, axis=0), 1.0] for c in self._cells.values()])
            tokens, squares, ms, weight = np.concatenate([cells, self._prior]).T
            features = np.stack([np.ones_like(ms), tokens, squares], axis=1)
            features *= (weight / ms)[:, None]
            if tokens.max() < _LEAST_RANGE * tokens.min():
                features[:, [0, 2]] = 0.0
            fixed, per_token, per_square = not_negative(features, weight).tolist()
            self._law = PrefillTime(
                fixed_ms=fixed, per_token_ms=per_token, per_square_ms=per_square
            )
        return self._law


def _points_of(prior: PrefillTime | None) -> NDArray[np.float64]:
    """``(N, 4)``: tokens, squares, ms and weight, where the prior has a say."""
    if prior is None:
        return np.empty((0, 4))
    return np.array(
        [[n, n**2, max(prior.ms(n), _PLAUSIBLE_MS[0]), _PRIOR_WEIGHT] for n in _PRIOR_TOKENS]
    )


def _octave(count: int) -> int:
    return math.floor(_PER_OCTAVE * math.log2(count))
