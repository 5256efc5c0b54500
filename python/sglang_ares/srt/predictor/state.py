"""The prediction for a request, kept on the request, and as it travels with a migration."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from sglang_ares.srt.policy.types import Remaining
from sglang_ares.srt.predictor.estimate import MAX_TRAIL, RequestPrediction, TrailPoint
from sglang_ares.srt.security.bounds import Count

# Where a request's prediction is kept: on upstream's request, so that both end together.
ATTRIBUTE: Final = "ares_prediction"


class PredictionState(msgspec.Struct, frozen=True, kw_only=True):
    """Fields as in :class:`~.estimate.RequestPrediction`; what the head said last as quantiles, as
    another worker may read raw outputs otherwise."""

    at: Count
    latest: Remaining | None
    smoothed: Remaining | None
    smoothed_at: Count
    trail: Annotated[tuple[TrailPoint, ...], msgspec.Meta(max_length=MAX_TRAIL)]


def prediction_of(req: Any) -> RequestPrediction | None:
    """What was predicted for a request, if anything was."""
    return getattr(req, ATTRIBUTE, None)


def capture_prediction(req: Any) -> PredictionState | None:
    """What travels."""
    prediction = prediction_of(req)
    if prediction is None:
        return None
    return PredictionState(
        at=prediction.at,
        latest=prediction.read(),
        smoothed=prediction.smoothed,
        smoothed_at=prediction.smoothed_at,
        trail=tuple(prediction.trail),
    )


def restore_prediction(req: Any, state: PredictionState | None) -> None:
    """Put on a request what another worker predicted for it."""
    if state is None:
        return
    prediction = RequestPrediction(None)
    prediction.at, prediction.latest = state.at, state.latest
    prediction.smoothed, prediction.smoothed_at = state.smoothed, state.smoothed_at
    prediction.trail = list(state.trail)
    setattr(req, ATTRIBUTE, prediction)


def prediction_fault(state: PredictionState | None, output: int) -> str | None:
    """What is wrong with the prediction for a request of ``output`` output tokens."""
    if state is None:
        return None
    if max(state.at, state.smoothed_at, *(p.at for p in state.trail), 0) > output:
        return f"prediction: made after more than {output} output tokens"
    quantiles = [state.latest, state.smoothed]
    quantiles += [q for p in state.trail for q in (p.predicted, p.estimate)]
    if any(q is not None and list(q) != sorted(q) for q in quantiles):
        return "prediction: quantiles do not ascend"
    return None
