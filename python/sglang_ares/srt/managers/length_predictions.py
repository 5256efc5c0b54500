"""The controller's length prior: learns from reports, and fills in what no worker predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sglang_ares.srt.policy.length_prior import LengthPrior, with_prior
from sglang_ares.srt.policy.snapshot import MEDIAN, Snapshot, WorkerTable
from sglang_ares.srt.policy.types import DECODE

if TYPE_CHECKING:
    from sglang_ares.srt.managers.io_struct import WorkerReport
    from sglang_ares.srt.policy.types import Remaining, WorkerLoad


class LengthPredictions:
    """``use_prior``: without, only the workers' own predictions count."""

    def __init__(self, *, use_prior: bool) -> None:
        self.prior = LengthPrior() if use_prior else None
        # By worker: sum of the medians of what its requests still produce.
        self._remaining_tokens: dict[int, float] = {}

    def on_report(self, report: WorkerReport) -> None:
        """What ended on a decode worker, and what its requests are expected to produce."""
        if report.load.role != DECODE:
            return
        if self.prior is not None:
            for output_tokens in report.ended_lengths:
                self.prior.observe(output_tokens)
        cluster = self.filled(Snapshot.of([report.load]))
        self._remaining_tokens[report.worker_id] = float(cluster.workers.remaining_tokens[0])

    def filled(self, cluster: Snapshot) -> Snapshot:
        """``cluster`` with a prediction for every request, if there is any to be had."""
        return with_prior(cluster, self.prior) if self.prior is not None else cluster

    def table(self, loads: Sequence[WorkerLoad]) -> WorkerTable:
        """The workers as placement sees them; their predictions are from their last reports."""
        known = [self._remaining_tokens.get(w.worker_id, 0.0) for w in loads]
        return replace(WorkerTable.of(loads), remaining_tokens=np.array(known, np.float64))

    def of_new(self) -> Remaining | None:
        """What is expected of a request that is to be placed."""
        return self.prior.remaining_of_new() if self.prior is not None else None

    def status(self) -> dict[str, float | int | None]:
        """For ``GET /ares/status``: requests learned from, and their median output length."""
        new = self.of_new()
        return {
            "seen": self.prior.seen if self.prior is not None else 0,
            "median_output_tokens": new[MEDIAN] if new is not None else None,
        }
