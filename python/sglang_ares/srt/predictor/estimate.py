"""A request's estimate over time: the latest prediction, smoothed with what was expected before.

Every ``INTERVAL`` output tokens the smoothed estimate is brought forward: what it was, less the
tokens produced since, and the new prediction are averaged. In between the same average is taken
with the latest prediction, and not kept. The average is one of logarithms: a length is known to
a factor rather than to a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from sglang_ares.srt.policy.types import Remaining
from sglang_ares.srt.predictor.recorder import INTERVAL
from sglang_ares.srt.security.bounds import Count

# Predictions are kept for a look back at 1, 20, 40, 80, 160, … output tokens; no more than these.
MAX_TRAIL: Final = 24


class Law(Protocol):
    """How a worker makes quantiles of a raw output. ``weight``: of a new prediction beside what
    was expected."""

    weight: float

    def read(self, row: Sequence[float]) -> Remaining:
        """A raw output as quantiles, as the head means them."""
        ...

    def correct(self, quantiles: Remaining) -> Remaining:
        """The same, less the bias seen in requests that have ended."""
        ...


class TrailPoint(msgspec.Struct, frozen=True, kw_only=True):
    """What was predicted before output token ``at``: by the head alone, and in the end."""

    at: Count
    predicted: Remaining
    estimate: Remaining


def brought_forward(quantiles: Remaining, tokens: int) -> Remaining:
    """What is left of an estimate ``tokens`` output tokens later."""
    a, b, c, d = quantiles
    return max(a - tokens, 0.0), max(b - tokens, 0.0), max(c - tokens, 0.0), max(d - tokens, 0.0)


def capped(quantiles: Remaining, most: float) -> Remaining:
    """Quantiles of a length that cannot exceed ``most``."""
    a, b, c, d = quantiles
    return min(a, most), min(b, most), min(c, most), min(d, most)


def blend(expected: Remaining, predicted: Remaining, weight: float) -> Remaining:
    """The average of logarithms; ``weight``: of ``predicted``, from 0 to 1."""
    a, b, c, d = (
        math.expm1((1 - weight) * math.log1p(e) + weight * math.log1p(p))
        for e, p in zip(expected, predicted, strict=True)
    )
    return a, b, c, d


def keeps_trail_at(generated: int) -> bool:
    """Whether a prediction after that many output tokens is kept until the request's end."""
    steps, rest = divmod(generated, INTERVAL)
    return generated == 1 or (rest == 0 and steps > 0 and steps & (steps - 1) == 0)


class RequestPrediction:
    """What is predicted for one request; a row is read only when somebody asks for what it says.

    ``row``: the newest raw output, of the state before output token ``at`` (0 is the first).
    ``latest``: the same as quantiles, once read. ``smoothed``: the smoothed estimate of the state
    before output token ``smoothed_at``. ``trail``: for a look back at the request's end. ``law``:
    None until the first prediction here of a request that has just been moved.
    """

    __slots__ = ("at", "latest", "law", "row", "smoothed", "smoothed_at", "trail")

    def __init__(self, law: Law | None) -> None:
        self.law = law
        self.row: Sequence[float] | None = None
        self.at = 0
        self.latest: Remaining | None = None
        self.smoothed: Remaining | None = None
        self.smoothed_at = 0
        self.trail: list[TrailPoint] = []

    def note(self, row: Sequence[float], at: int) -> None:
        """A new raw output, of the state before output token ``at``."""
        self.row, self.at, self.latest = row, at, None
        if at % INTERVAL == 0 or at == 1:
            self.bring_forward()

    def bring_forward(self) -> None:
        """At the first output token of a decode worker, and at every ``INTERVAL``-th."""
        at = self.at
        predicted, estimate = self.read(), self.estimate(at)
        if predicted is None or estimate is None:
            return
        if keeps_trail_at(at) and len(self.trail) < MAX_TRAIL:
            self.trail.append(TrailPoint(at=at, predicted=predicted, estimate=estimate))
        if at % INTERVAL == 0:
            self.smoothed, self.smoothed_at = estimate, at

    def read(self) -> Remaining | None:
        """The newest prediction of the head alone, as of output token ``at``."""
        if self.latest is None and self.row is not None and self.law is not None:
            self.latest = self.law.read(self.row)
        return self.latest

    def estimate(self, produced: int) -> Remaining | None:
        """Quantiles of what is to come after ``produced`` output tokens; None before the first
        prediction."""
        expected = None
        if self.smoothed is not None:
            expected = brought_forward(self.smoothed, produced - self.smoothed_at)
            if self.smoothed_at == self.at:  # nothing new since
                return expected
        latest = self.read()
        if latest is None:
            return expected
        if self.law is None:
            return expected or brought_forward(latest, produced - self.at)
        predicted = brought_forward(self.law.correct(latest), produced - self.at)
        if expected is None:
            return predicted
        return blend(expected, predicted, self.law.weight)

    def remaining(self, produced: int, limit: int) -> Remaining | None:
        """As :meth:`estimate`, of a request that may produce ``limit`` tokens in all."""
        now = self.estimate(produced)
        return capped(now, float(max(limit - produced, 0))) if now is not None else None
