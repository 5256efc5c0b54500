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
    # Column by column, so that what is worked on stays in the cache.
    alive = np.ones((len(steps), count))
    passed = np.empty(count)
    # As dense before the first quantile as behind it.
    low = np.maximum(0.0, 2 * remaining[:, 0] - remaining[:, 1])
    for level, mass in enumerate(_MASS):
        high = np.ascontiguousarray(remaining[:, level])
        slope = mass / np.maximum(high - low, 1e-9)
        for k, step in enumerate(steps):
            np.subtract(step, low, out=passed)
            np.multiply(passed, slope, out=passed)
            np.maximum(passed, 0.0, out=passed)
            np.minimum(passed, mass, out=passed)
            np.subtract(alive[k], passed, out=alive[k])
        low = high
    rate = _TAIL_LOG / np.maximum(remaining[:, -1] - remaining[:, -2], 1e-9)
    for k, step in enumerate(steps):
        tail = np.flatnonzero(low < step)
        alive[k, tail] += _TAIL * np.expm1((low[tail] - step) * rate[tail])
    return np.maximum(alive, 0.0, out=alive).T


def relative_spread(remaining: Floats) -> Floats:
    """``(R,)`` distance of the outer quartiles over the median; 0 for a length that is known."""
    return np.asarray(
        (remaining[:, MEDIAN + 1] - remaining[:, MEDIAN - 1])
        / np.maximum(remaining[:, MEDIAN], 1.0)
    )
