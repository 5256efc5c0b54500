"""What finished requests say about running ones: a survival curve of output lengths, learned
online, which gives quantiles of the tokens still to be produced by the tokens produced so far."""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.snapshot import Floats, Ints, Snapshot
from sglang_ares.srt.policy.types import LEVELS, Remaining

# Bins of output length: lengths 1 and up, this many per doubling, to 2^20.
_PER_OCTAVE = 4
_OCTAVES = 20
# Before any request has finished: P(length > x) = 1 / (1 + x / this), as heavy as lengths get. It
# weighs as much as this many requests, so that it rules where none was ever seen.
_FIRST_SCALE = 256.0
_FIRST_WEIGHT = 2.0


class LengthPrior:
    """Survival curve of output lengths.

    ``memory``: how many requests are remembered: older ones weigh less, exponentially. Says
    nothing (NaN) before it has seen ``least`` requests.
    """

    def __init__(self, memory: float = 4096.0, least: int = 16) -> None:
        self._edges = np.concatenate(
            [[0.0], 2.0 ** (np.arange(_PER_OCTAVE * _OCTAVES + 1) / _PER_OCTAVE)]
        )
        self._first = _FIRST_WEIGHT * np.diff(-1 / (1 + self._edges / _FIRST_SCALE))
        self._weights = np.zeros(len(self._edges) - 1)
        self._keep = 1 - 1 / memory
        self._least = least
        self._seen = 0
        self._below: Floats | None = None

    @property
    def seen(self) -> int:
        """Finished requests observed so far."""
        return self._seen

    def observe(self, output_tokens: int) -> None:
        """A request has finished after ``output_tokens`` tokens."""
        bin_of = int(np.searchsorted(self._edges, output_tokens, side="left")) - 1
        self._weights *= self._keep
        self._weights[min(max(bin_of, 0), len(self._weights) - 1)] += 1
        self._seen += 1
        self._below = None

    def remaining(self, output_tokens: Ints) -> Floats:
        """``(R, len(LEVELS))`` quantiles of the tokens still to be produced by requests that have
        produced ``output_tokens``, shape ``(R,)``; NaN while too few requests were seen."""
        done = np.asarray(output_tokens, np.float64)
        if self._seen < self._least:
            return np.full((len(done), len(LEVELS)), np.nan)
        below = self._cumulative()
        dead = np.interp(done, self._edges, below)[:, None]
        total = np.interp(dead + np.array(LEVELS) * (1 - dead), below, self._edges)
        return np.maximum(1.0, total - done[:, None])

    def remaining_of_new(self) -> Remaining | None:
        """Quantiles for a request that has produced nothing yet, if anything is known."""
        if self._seen < self._least:
            return None
        low, median, high, higher = self.remaining(np.zeros(1, np.int64))[0].tolist()
        return (low, median, high, higher)

    def expected_remaining(self, output_tokens: Ints) -> Floats:
        """``(R,)`` mean of the tokens still to be produced; NaN while too few were seen."""
        done = np.asarray(output_tokens, np.float64)
        if self._seen < self._least:
            return np.full(len(done), np.nan)
        alive = 1 - self._cumulative()
        # The integral of the survival curve from each edge on, and by interpolation from anywhere.
        strips = (alive[:-1] + alive[1:]) / 2 * np.diff(self._edges)
        beyond = np.concatenate([np.cumsum(strips[::-1])[::-1], [0.0]])
        here = np.interp(done, self._edges, alive)
        area = np.interp(done, self._edges, beyond)
        return np.maximum(1.0, area / np.maximum(here, 1e-12))

    def _cumulative(self) -> Floats:
        """``(bins + 1,)`` share of lengths up to each edge; strictly ascending, from 0 to 1."""
        if self._below is None:
            mass = np.cumsum(self._weights + self._first)
            self._below = np.concatenate([[0.0], mass / mass[-1]])
        return self._below


def with_prior(cluster: Snapshot, prior: LengthPrior) -> Snapshot:
    """``cluster`` with the prior's quantiles where a request comes without a prediction."""
    unknown = np.isnan(cluster.requests.remaining[:, 0])
    if not unknown.any():
        return cluster
    remaining = cluster.requests.remaining.copy()
    remaining[unknown] = prior.remaining(cluster.requests.output_tokens[unknown])
    return cluster.with_remaining(remaining)
