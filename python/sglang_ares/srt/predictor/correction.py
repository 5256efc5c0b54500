"""Online correction: when lengths drift from what the head was trained on, shift its quantiles.

Requests that have ended show how far off the head was. Predictions of about one size (a factor of
two) form a bin; the shift of a quantile's logarithm is that quantile of the bin's last residuals,
interpolated between two bins by size and by how many residuals they have. Few residuals shift
little.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from sglang_ares.srt.policy.types import LEVELS, Remaining
from sglang_ares.srt.predictor.estimate import capped
from sglang_ares.srt.predictor.head import Floats

_MEDIAN: Final = LEVELS.index(0.5)
# Bins around whole values of log2(1 + predicted median): up to half a million tokens.
_BINS: Final = 20
# Residuals remembered in a bin, and the number at which half of what they say is believed.
_WINDOW: Final = 256
_HALF_BELIEVED: Final = 16


class OnlineCorrection:
    """What one worker has learnt; nothing at first, and then it changes nothing."""

    def __init__(self) -> None:
        self._residuals = np.zeros((_BINS, _WINDOW, len(LEVELS)))
        self._count = [0] * _BINS
        self._shift: list[Remaining] = [(0.0, 0.0, 0.0, 0.0)] * _BINS

    def learn(self, predicted: Remaining, actual: float, limit: float) -> None:
        """The head alone predicted this, ``actual`` tokens came; no more than ``limit`` could
        have."""
        b = round(_place(predicted))
        self._residuals[b, self._count[b] % _WINDOW] = [
            math.log1p(actual) - math.log1p(x) for x in capped(predicted, limit)
        ]
        self._count[b] += 1
        seen = self._residuals[b, : min(self._count[b], _WINDOW)]
        self._shift[b] = _quantiles(np.sort(seen, axis=0))

    def correct(self, predicted: Remaining) -> Remaining:
        """The quantiles, shifted; still ascending."""
        place = _place(predicted)
        low = int(place)
        high = min(low + 1, _BINS - 1)
        weigh_low = (1 - (place - low)) * min(self._count[low], _WINDOW)
        weigh_high = (place - low) * min(self._count[high], _WINDOW)
        if not weigh_low + weigh_high:
            return predicted
        all_weights = weigh_low + weigh_high + _HALF_BELIEVED
        result, least = [], 0.0
        for q, x, y in zip(predicted, self._shift[low], self._shift[high], strict=True):
            shift = (weigh_low * x + weigh_high * y) / all_weights
            least = max(least, math.expm1(max(0.0, math.log1p(q) + shift)))
            result.append(least)
        a, b, c, d = result
        return a, b, c, d


def _quantiles(ordered: Floats) -> Remaining:
    """Each column's quantile at its level, interpolated as numpy does; a worker asks often, and
    numpy takes much longer."""
    values = []
    for column, level in enumerate(LEVELS):
        place = level * (len(ordered) - 1)
        low = int(place)
        x, y = ordered[low, column], ordered[min(low + 1, len(ordered) - 1), column]
        values.append(float(x + (y - x) * (place - low)))
    a, b, c, d = values
    return a, b, c, d


def _place(predicted: Remaining) -> float:
    return min(math.log2(1 + predicted[_MEDIAN]), float(_BINS - 1))
