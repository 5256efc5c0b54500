"""Fits a worker's prefill-time law to its own prefill batches.

Batches of about the same size share a cell, whose median counts, as in ``step_time.py``: a batch
that waited for the machine does not bend the law, and drift is followed.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.step_time import not_negative

_PER_OCTAVE = 2
_KEPT = 15
_MOST_CELLS = 64
_LEAST_BATCHES = 5
# A law holds for so many batches before it is fitted again.
_REFIT_AFTER = 10
_PLAUSIBLE_MS = (1e-3, 1e7)


class PrefillTimeFit:
    """Learns :class:`PrefillTime` from batches, by least squares of the relative error with
    coefficients that are not negative."""

    def __init__(self) -> None:
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
            self._fit_at = self._seen + _REFIT_AFTER
            tokens, squares, ms = np.array([np.median(c, axis=0) for c in self._cells.values()]).T
            features = np.stack([np.ones_like(ms), tokens, squares], axis=1) / ms[:, None]
            fixed, per_token, per_square = not_negative(features, np.ones_like(ms)).tolist()
            self._law = PrefillTime(
                fixed_ms=fixed, per_token_ms=per_token, per_square_ms=per_square
            )
        return self._law


def _octave(count: int) -> int:
    return math.floor(_PER_OCTAVE * math.log2(count))
