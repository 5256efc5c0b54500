"""From quantiles of the remaining length to the chance that a request still runs.

The curve is linear between the quantiles and exponential behind the last one, with the rate of
its last piece. With equal quantiles (a length that is known) it is a step.
"""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.snapshot import MEDIAN, Floats, Ints
from sglang_ares.srt.policy.types import LEVELS

# With nothing known, a request is as likely as not to produce as much as it has produced already:
# P(remaining > k) = (o + c) / (o + c + k), o tokens produced. The odds of LEVELS give quantiles.
_UNKNOWN_SCALE = 128.0
_ODDS = np.array(LEVELS) / (1 - np.array(LEVELS))

_MASS = np.diff((0.0, *LEVELS))
_TAIL = 1 - LEVELS[-1]
# The tail's rate goes on from the last two levels: ln(S(third) / S(last)) over their distance.
_TAIL_LOG = float(np.log((1 - LEVELS[-2]) / _TAIL))

# Requests worked on at a time.
_PIECE = 4096


def known_or_guessed(remaining: Floats, output_tokens: Ints) -> Floats:
    """``remaining``, shape ``(R, len(LEVELS))``, with rows of NaN filled from the output so far."""
    unknown = np.isnan(remaining[:, MEDIAN])
    if not unknown.any():
        return remaining
    filled = remaining.copy()
    filled[unknown] = (output_tokens[unknown, None] + _UNKNOWN_SCALE) * _ODDS
    return filled


def survival(remaining: Floats, steps: Floats) -> Floats:
    """``(R, K)`` chance that a request produces more than ``steps`` further tokens, shape
    ``(K,)``, by its quantiles ``remaining``, shape ``(R, len(LEVELS))``, without NaN."""
    count = len(remaining)
    alive = np.empty((len(steps), count))
    # Piece by piece, so that what is worked on stays in the cache.
    for first in range(0, count, _PIECE):
        piece = slice(first, first + _PIECE)
        _survival(np.ascontiguousarray(remaining[piece].T), steps[:, None], alive[:, piece])
    return alive.T


def _survival(quantiles: Floats, steps: Floats, out: Floats) -> None:
    """:func:`survival` of quantiles of shape ``(len(LEVELS), R)`` after ``(K, 1)`` steps."""
    # As dense before the first quantile as behind it.
    low = np.maximum(0.0, 2 * quantiles[0] - quantiles[1])
    out[:] = 1.0
    for high, mass in zip(quantiles, _MASS, strict=True):
        passed = steps - low
        passed *= mass / np.maximum(high - low, 1e-9)
        np.maximum(passed, 0.0, out=passed)
        out -= np.minimum(passed, mass, out=passed)
        low = high
    beyond = np.maximum(steps - low, 0.0)
    if beyond.any():
        rate = _TAIL_LOG / np.maximum(low - quantiles[-2], 1e-9)
        out += _TAIL * np.expm1(-beyond * rate)
    np.maximum(out, 0.0, out=out)


def relative_spread(remaining: Floats) -> Floats:
    """``(R,)`` distance of the outer quartiles over the median; 0 for a length that is known."""
    return np.asarray(
        (remaining[:, MEDIAN + 1] - remaining[:, MEDIAN - 1])
        / np.maximum(remaining[:, MEDIAN], 1.0)
    )
