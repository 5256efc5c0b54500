"""A worker's predictions: of each request as it runs, and how they turned out at its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.managers.attempts import public_rid
from sglang_ares.srt.managers.probes import is_probe
from sglang_ares.srt.policy.types import LEVELS, Remaining
from sglang_ares.srt.predictor.correction import OnlineCorrection
from sglang_ares.srt.predictor.errors import ErrorSums
from sglang_ares.srt.predictor.estimate import RequestPrediction, capped
from sglang_ares.srt.predictor.recorder import INTERVAL, StateRecorder
from sglang_ares.srt.predictor.state import ATTRIBUTE, prediction_of

if TYPE_CHECKING:
    from sglang.srt.managers.auxiliary_output import CommittedTokens
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.predictor.head import LengthHead

logger = logging.getLogger(__name__)


class HeadLaw:
    """Reads the raw outputs of ``head``; ``weight`` is its smoothing."""

    def __init__(
        self, head: LengthHead, weight: float, correction: OnlineCorrection | None
    ) -> None:
        self.weight = weight
        self.correction = correction
        self._head = head

    def read(self, row: Sequence[float]) -> Remaining:
        """A raw output as quantiles."""
        return self._head.read(row)

    def correct(self, quantiles: Remaining) -> Remaining:
        """Less the bias seen in requests that have ended here."""
        return self.correction.correct(quantiles) if self.correction is not None else quantiles


class PredictionTracker:
    """``law``: None where there is no head, and states are only recorded."""

    def __init__(self, law: HeadLaw | None, recorder: StateRecorder | None = None) -> None:
        self._law = law
        self._recorder = recorder
        # Rows that were no numbers, since the start.
        self.not_finite = 0
        # By the output tokens generated when the prediction was made.
        self.errors: dict[int, ErrorSums] = {}
        # First estimates of requests that a prefill worker has just ended, to be passed on.
        self.first: list[tuple[str, Remaining]] = []

    @property
    def wants_states(self) -> bool:
        """Whether hidden states are recorded."""
        return self._recorder is not None

    def observe(
        self,
        reqs: Sequence[Req],
        commits: Sequence[CommittedTokens | None],
        raw: NDArray[np.float32] | None,
        states: NDArray[np.float32] | None,
    ) -> None:
        """A step's raw outputs ``(B, outputs)``, row by row for ``reqs``; ``commits``: the token
        each produced, None for a row that does not count."""
        if raw is not None and self._law is not None:
            rows = raw.tolist() if math.isfinite(raw.sum()) else self._without_nan(reqs, raw)
            for req, commit, row in zip(reqs, commits, rows):
                if commit is None or row is None:
                    continue
                prediction = getattr(req, ATTRIBUTE, None)
                if prediction is None or prediction.law is None:
                    if is_probe(req.rid):
                        continue
                    prediction = self._begin(req, prediction)
                at = commit.output_index
                prediction.row, prediction.at, prediction.latest = row, at, None
                if at % INTERVAL == 0 or at == 1:
                    prediction.bring_forward()
                    if at == 0:
                        self._pass_on(req)
                if req.finished_reason is not None and at > 0:
                    self._look_back(req, prediction)
        if states is not None:
            self._record(reqs, commits, states)

    def _begin(self, req: Any, moved: RequestPrediction | None) -> RequestPrediction:
        """For a request that is new, or was moved here."""
        prediction = moved if moved is not None else RequestPrediction(None)
        prediction.law = self._law
        setattr(req, ATTRIBUTE, prediction)
        return prediction

    def _pass_on(self, req: Any) -> None:
        if req.sampling_params.max_new_tokens <= 1:
            # Nothing will be left, or this recomputes output for a decode worker that goes on
            # from it: of that request the limit says nothing.
            return
        estimate = self.remaining(req)
        if estimate is not None:
            self.first.append((req.rid, estimate))

    def remaining(self, req: Any) -> Remaining | None:
        """Quantiles of the tokens a request will still produce, as of now."""
        prediction = prediction_of(req)
        if prediction is None:
            return None
        return prediction.remaining(len(req.output_ids), req.sampling_params.max_new_tokens)

    def take_first(self) -> list[tuple[str, Remaining]]:
        """The first estimates since the last call."""
        taken, self.first = self.first, []
        return taken

    # --- bad numbers, the end of a request --------------------------------------------------

    def _without_nan(
        self, reqs: Sequence[Req], raw: NDArray[np.float32]
    ) -> list[list[float] | None]:
        finite: list[bool] = np.isfinite(raw).all(axis=1).tolist()  # type: ignore[assignment]
        if not all(finite):
            if not self.not_finite:
                rid = next(r.rid for r, ok in zip(reqs, finite) if not ok)
                logger.warning(
                    "the length head gave no number for request %s (a hidden state with NaN, or "
                    "one too large); its estimate stays what it was. Further cases are counted "
                    "only: sglang_ares:predictions_not_finite_total",
                    rid,
                )
            self.not_finite += finite.count(False)
        return [row if ok else None for row, ok in zip(raw.tolist(), finite)]

    def _look_back(self, req: Any, prediction: RequestPrediction) -> None:
        reason = req.finished_reason.to_json()["type"]
        if reason == "abort":
            return
        assert self._law is not None
        length, limit = len(req.output_ids), req.sampling_params.max_new_tokens
        for point in prediction.trail:
            actual, most = float(length - point.at), float(limit - point.at)
            sums = self.errors.setdefault(point.at, ErrorSums())
            sums.add(capped(point.estimate, most), actual)
            if self._law.correction is not None:
                self._law.correction.learn(point.predicted, actual, most)

    # --- recording --------------------------------------------------------------------------

    def _record(
        self,
        reqs: Sequence[Req],
        commits: Sequence[CommittedTokens | None],
        states: NDArray[np.float32],
    ) -> None:
        assert self._recorder is not None
        due = [
            (i, c.output_index)
            for i, c in enumerate(commits)
            if c is not None and c.output_index % INTERVAL == 0 and not is_probe(reqs[i].rid)
        ]
        if not due:
            return
        predicted = np.full((len(due), len(LEVELS)), np.nan)
        estimates = predicted.copy()
        for j, (i, at) in enumerate(due):
            prediction = prediction_of(reqs[i])
            if prediction is not None and prediction.at == at:
                predicted[j] = prediction.read()
                estimates[j] = prediction.estimate(at)
        self._recorder.write(
            [public_rid(reqs[i].rid) for i, _ in due],
            [at for _, at in due],
            states[[i for i, _ in due]],
            predicted,
            estimates,
        )
