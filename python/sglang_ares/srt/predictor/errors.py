"""How predictions turned out, counted by the tokens generated when they were made."""

from __future__ import annotations

from typing import Annotated

import msgspec

from sglang_ares.srt.policy.types import LEVELS, Remaining
from sglang_ares.srt.security.bounds import Count

_MEDIAN, _HIGH = LEVELS.index(0.5), LEVELS.index(0.9)
Sum = Annotated[float, msgspec.Meta(ge=-1e18, le=1e18)]


class ErrorSums(msgspec.Struct, kw_only=True):
    """Since the worker's start: predictions judged, sums of their absolute and signed (predicted
    less actual) errors in tokens, and how many lengths lay at or under the median and under the
    90 % quantile."""

    predictions: Count = 0
    absolute: Annotated[float, msgspec.Meta(ge=0, le=1e18)] = 0.0
    signed: Sum = 0.0
    under_median: Count = 0
    under_high: Count = 0

    def add(self, estimate: Remaining, actual: float) -> None:
        """One prediction, and the tokens that came."""
        self.predictions += 1
        self.absolute += abs(estimate[_MEDIAN] - actual)
        self.signed += estimate[_MEDIAN] - actual
        self.under_median += actual <= estimate[_MEDIAN]
        self.under_high += actual <= estimate[_HIGH]
