"""What the elastic policies read, from the workers' reports and what was dispatched since."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.elastic.instances import InstanceTable, Slo, max_tokens
from sglang_ares.srt.policy.step_law import mean_law
from sglang_ares.srt.policy.types import DECODE, StepTime

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.cluster_views import WorkerView
    from sglang_ares.srt.managers.io_struct import WorkerReport


class _Row(NamedTuple):
    """One worker's share of :class:`InstanceTable`."""

    max_tokens: int
    kv_tokens: int
    prefill_tokens: int
    prefill_ms: float
    decode_tokens: int = 0
    decode_requests: int = 0
    token_ms: float = 0.0


class Instances:
    """Collects the reports between two passes; times are monotonic seconds.

    The prefill law of the cluster is the one told last: its workers are alike, and one that has
    just begun to prefill has none of its own; until one is told, ``prefill_time``.
    """

    def __init__(
        self, state: ClusterState, slo: Slo, prefill_time: PrefillTime | None = None
    ) -> None:
        self._state = state
        self._slo = slo
        self.prefill_time = prefill_time
        # Mean step times (ms) reported since the last pass; when a worker last decoded.
        self._steps: defaultdict[int, list[float]] = defaultdict(list)
        self._progress: dict[int, float] = {}

    def on_report(self, report: WorkerReport, now: float) -> None:
        """A worker's report."""
        if report.prefill_law is not None:
            fixed, per_token, per_square = report.prefill_law
            self.prefill_time = PrefillTime(
                fixed_ms=fixed, per_token_ms=per_token, per_square_ms=per_square
            )
        if report.decode_step_ms > 0:
            self._steps[report.worker_id].append(report.decode_step_ms)
            self._progress[report.worker_id] = now
        elif not report.load.running:
            self._progress[report.worker_id] = now

    def prompt_ms(self, tokens: int) -> float:
        """Predicted time to compute a prompt of so many tokens; 0 while nothing is known."""
        return self.prefill_time.ms(tokens) if self.prefill_time is not None else 0.0

    def table(self, now: float) -> InstanceTable:
        """The ready workers; those that change their role count to the one they will have."""
        views = sorted(self._state.serving(), key=lambda view: view.worker_id)
        loads = [view.load() for view in views]
        laws = [load.step for load in loads if load.step is not None]
        known = mean_law(laws)
        rows = [self._row(view, known, now) for view in views]
        self._steps.clear()
        return InstanceTable(
            worker_id=np.array([v.worker_id for v in views], dtype=np.int64),
            decodes=np.array([(v.changing_to or v.role) == DECODE for v in views], dtype=np.bool_),
            prefill_tokens=np.array([r.prefill_tokens for r in rows], dtype=np.int64),
            prefill_ms=np.array([r.prefill_ms for r in rows], dtype=np.float64),
            decode_tokens=np.array([r.decode_tokens for r in rows], dtype=np.int64),
            decode_requests=np.array([r.decode_requests for r in rows], dtype=np.int64),
            max_tokens=np.array([r.max_tokens for r in rows], dtype=np.int64),
            token_ms=np.array([r.token_ms for r in rows], dtype=np.float64),
            kv_tokens=np.array([r.kv_tokens for r in rows], dtype=np.int64),
            kv_capacity=np.array([v.kv_capacity for v in views], dtype=np.int64),
        )

    def _row(self, view: WorkerView, law: StepTime | None, now: float) -> _Row:
        load = view.load()
        requests, kv_tokens = load.running + load.queued, load.load_tokens
        step = load.step or law
        most = view.kv_capacity
        if step is not None:
            most = max_tokens(step, requests, self._slo, view.kv_capacity)
        if view.role == DECODE:
            token_ms = self._token_ms(view.worker_id, now) if load.running else 0.0
            return _Row(most, kv_tokens, 0, 0.0, kv_tokens, requests, token_ms)
        # Those with output are computed, and wait for their KV to be sent.
        waiting = [r.tokens for r in load.requests if not r.output_tokens]
        waiting += view.dispatched.values()
        return _Row(most, kv_tokens, sum(waiting), sum(map(self.prompt_ms, waiting)))

    def _token_ms(self, worker_id: int, now: float) -> float:
        """Mean step since the last pass; of a worker that makes no progress, how long it has
        made none."""
        steps = self._steps.get(worker_id)
        if steps:
            return sum(steps) / len(steps)
        return 1e3 * (now - self._progress.get(worker_id, now))
