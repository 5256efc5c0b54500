"""Remaining lengths as a head would predict them, where no model runs: the truth, which an emulated
worker knows, with the simulator's error."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from zlib import crc32

import numpy as np

from sglang_ares.simulator.prediction import ErrorModel, predictor_of
from sglang_ares.srt.managers.attempts import public_rid

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.policy.types import Remaining


class EmulatedPredictions:
    """``kind``: ``none``, ``noisy`` or ``true``. The error belongs to a request and its output so
    far, so that it is the same on every worker."""

    def __init__(self, kind: str) -> None:
        self._predictor = predictor_of(kind, error=ErrorModel(), scale=1.0, seed=0)

    def remaining(self, req: Req) -> Remaining | None:
        """Quantiles of what ``req`` still produces; None where nothing is predicted."""
        produced = len(req.output_ids)
        key = np.array([crc32(public_rid(req.rid).encode())], np.int64)
        left = np.array([max(0, req.sampling_params.max_new_tokens - produced)], np.int64)
        (row,) = self._predictor.remaining(key, np.array([produced], np.int64), left)
        return None if np.isnan(row).any() else cast("Remaining", tuple(row.tolist()))
