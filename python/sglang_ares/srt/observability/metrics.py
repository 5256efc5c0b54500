"""Prometheus series of the controller, named and labelled as upstream's (``sglang:`` → ours
``sglang_ares:``). The registry is upstream's multi-process one, so ``/metrics`` shows them."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from sglang_ares.srt.observability.slo import KINDS, WINDOWS_S

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_ares.srt.managers.io_struct import (
        Landed,
        MigrationResult,
        PredictionReport,
        WorkerReport,
    )
    from sglang_ares.srt.managers.role_changes import EndedChange
    from sglang_ares.srt.managers.role_planner import RoleLoads
    from sglang_ares.srt.observability.slo import SloAttainment
    from sglang_ares.srt.policy.types import Remaining

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)

# name without prefix, kind, labels besides model_name, help. The reference is made from these.
_Series = tuple[str, str, tuple[str, ...], str]
SERIES: tuple[_Series, ...] = (
    ("dispatched_requests_total", "counter", ("worker", "role"), "Requests sent to a worker."),
    (
        "migrations_total",
        "counter",
        ("cause", "outcome", "reason"),
        "Migrations by cause (manual, policy, memory, drain, role), outcome and reason.",
    ),
    ("migration_seconds", "histogram", (), "Duration of completed migrations, command to end."),
    (
        "migration_blackout_seconds",
        "histogram",
        (),
        "Last token on the source to first token on the target.",
    ),
    ("migrated_kv_bytes_total", "counter", (), "Bytes of KV sent by migrations."),
    ("migrated_tokens_total", "counter", (), "Tokens of requests that migrations handed over."),
    ("migration_tokens_sent_total", "counter", (), "Tokens whose KV was sent by migrations."),
    (
        "migration_tokens_saved_total",
        "counter",
        (),
        "Tokens handed over without sending: the target's prefix cache held them.",
    ),
    ("waiting_requests", "gauge", (), "Requests that wait in the controller for a worker."),
    ("worker_kv_tokens", "gauge", ("worker", "role"), "KV tokens held by requests."),
    ("worker_kv_capacity_tokens", "gauge", ("worker", "role"), "KV tokens a worker can hold."),
    ("worker_running_requests", "gauge", ("worker", "role"), "Requests decoding or prefilling."),
    ("worker_queued_requests", "gauge", ("worker", "role"), "Requests waiting on a worker."),
    (
        "retractions_total",
        "counter",
        ("worker", "role"),
        "Requests retracted because a worker's KV ran out.",
    ),
    ("decode_step_seconds", "gauge", ("worker", "role"), "Mean decode step since last report."),
    (
        "decode_step_law_seconds",
        "gauge",
        ("worker", "term"),
        "A worker's step-time law, by term (fixed, per_request, per_token), once it is known.",
    ),
    (
        "length_prior_median_tokens",
        "gauge",
        (),
        "Median output length that the length prior expects of a new request.",
    ),
    ("imbalance_ratio", "gauge", (), "Most resident tokens of a decode worker over the mean."),
    (
        "predictions_total",
        "counter",
        ("worker", "generated"),
        "Predictions of requests that have ended, by the output tokens generated when made.",
    ),
    (
        "prediction_absolute_error_tokens_total",
        "counter",
        ("worker", "generated"),
        "Sum of their absolute errors; divided by predictions_total the MAE.",
    ),
    (
        "prediction_bias_tokens",
        "gauge",
        ("worker", "generated"),
        "Mean of predicted less actual remaining tokens since the worker's start.",
    ),
    (
        "prediction_calibration",
        "gauge",
        ("worker", "generated", "quantile"),
        "Share of lengths at or under the predicted quantile (0.5, 0.9).",
    ),
    (
        "predictions_not_finite_total",
        "counter",
        ("worker",),
        "Outputs of the length head that were no numbers, and were ignored.",
    ),
    ("worker_losses_total", "counter", ("worker", "role"), "Workers declared dead."),
    (
        "role_changes_total",
        "counter",
        ("role", "cause", "outcome"),
        "Changes of a worker's role, by the new role, cause (manual, policy) and outcome.",
    ),
    (
        "role_change_seconds",
        "histogram",
        ("role",),
        "From the decision to service in the new role.",
    ),
    (
        "worker_role_seconds_total",
        "counter",
        ("worker", "role"),
        "Time a worker was ready in each role.",
    ),
    (
        "role_load_ratio",
        "gauge",
        ("role",),
        "Mean load of a role's workers: prefill time ahead over TTFT SLO, or TPOT over its SLO.",
    ),
    (
        "worker_load_ratio",
        "gauge",
        ("worker", "role"),
        "The same of one worker.",
    ),
    ("role_workers", "gauge", ("role",), "Serving workers of a role."),
    ("recovered_requests_total", "counter", (), "Requests continued by a further attempt."),
    (
        "dropped_control_frames_total",
        "counter",
        ("where",),
        "Control messages not let in, by receiver (controller, front, ledger, worker-N).",
    ),
)
# Those that the front records.
FRONT_SERIES: tuple[_Series, ...] = (
    (
        "slo_attainment",
        "gauge",
        ("slo", "window"),
        "Share of streamed requests of the last 60 or 600 s that met ttft, tpot, both; else NaN.",
    ),
)


class ControllerMetrics:
    """Records what the controller sees; with metrics off, nothing."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._series = _registered(SERIES)
        self._decode_tokens: dict[int, int] = {}
        # What is shown of each worker that is not its load, but what it has learnt.
        self._learnt: dict[int, set[Any]] = defaultdict(set)
        # When each worker reported last; nothing while it is down.
        self._reported_at: dict[int, float] = {}
        # A worker reports its retractions since its start.
        self._retracted: dict[int, int] = {}
        self._dropped: dict[str, int] = {}
        # What each worker has reported of its predictions since its start.
        self._predictions: dict[tuple[int, str], float] = {}

    @staticmethod
    def create(server_args: ServerArgs) -> ControllerMetrics:
        """The recorder, or a silent one without ``--enable-metrics``."""
        name = _model_name(server_args)
        return ControllerMetrics(name) if name is not None else _NoMetrics()

    def _of(self, name: str, **labels: str | int) -> Any:
        values = {k: str(v) for k, v in labels.items()}
        return self._series[name].labels(model_name=self._model_name, **values)

    def dispatched(self, worker: int, role: str) -> None:
        """A request was sent to a worker."""
        self._of("dispatched_requests_total", worker=worker, role=role).inc()

    def waiting(self, requests: int) -> None:
        """So many requests wait for a worker with room."""
        self._of("waiting_requests").set(requests)

    def migrated(self, result: MigrationResult, cause: str) -> None:
        """A migration, commanded for ``cause``, ended."""
        reason = result.reason.split(":", 1)[0]
        self._of("migrations_total", cause=cause, outcome=result.outcome, reason=reason).inc()
        self._of("migrated_kv_bytes_total").inc(result.kv_bytes)
        self._of("migration_tokens_sent_total").inc(result.tokens_sent)
        self._of("migration_tokens_saved_total").inc(result.tokens_saved)
        if result.outcome == "completed":
            self._of("migration_seconds").observe(result.duration_s)
            self._of("migrated_tokens_total").inc(result.tokens)

    def landed(self, message: Landed) -> None:
        """A moved request emitted its first token on the target."""
        self._of("migration_blackout_seconds").observe(message.blackout_s)

    def reported(self, report: WorkerReport) -> None:
        """A worker reported its load."""
        load = report.load
        where: dict[str, str | int] = {"worker": load.worker_id, "role": load.role}
        now = time.monotonic()
        since = self._reported_at.get(load.worker_id, now)
        self._reported_at[load.worker_id] = now
        self._of("worker_role_seconds_total", **where).inc(now - since)
        self._of("worker_kv_tokens", **where).set(load.kv_tokens)
        self._of("worker_kv_capacity_tokens", **where).set(load.kv_capacity)
        self._of("worker_running_requests", **where).set(load.running)
        self._of("worker_queued_requests", **where).set(load.queued)
        earlier = self._retracted.get(load.worker_id, 0)
        new = report.retracted - earlier if report.retracted >= earlier else report.retracted
        self._retracted[load.worker_id] = report.retracted
        self._of("retractions_total", **where).inc(new)
        self._of("decode_step_seconds", **where).set(report.decode_step_ms / 1e3)
        if load.step is not None:
            for term in ("fixed", "per_request", "per_token"):
                seconds = getattr(load.step, f"{term}_ms") / 1e3
                self._learn("decode_step_law_seconds", seconds, worker=load.worker_id, term=term)
        self.dropped(f"worker-{report.worker_id}", report.dropped_frames)
        if report.predictions is not None:
            self._predicted(load.worker_id, report.predictions)
        if load.role == "decode":
            self._decode_tokens[load.worker_id] = load.kv_tokens
            self._show_imbalance()

    def _show_imbalance(self) -> None:
        tokens = self._decode_tokens.values()
        total = sum(tokens)
        self._of("imbalance_ratio").set(max(tokens) * len(tokens) / total if total else 1.0)

    def _learn(self, name: str, value: float, *, worker: int, **labels: str | int) -> None:
        gauge = self._of(name, worker=worker, **labels)
        gauge.set(value)
        self._learnt[worker].add(gauge)

    def _predicted(self, worker: int, report: PredictionReport) -> None:
        self._count("predictions_not_finite_total", report.not_finite, worker=worker)
        for at, sums in report.errors.items():
            where = {"worker": worker, "generated": at}
            self._count("predictions_total", sums.predictions, **where)
            self._count("prediction_absolute_error_tokens_total", sums.absolute, **where)
            n = max(sums.predictions, 1)
            self._learn("prediction_bias_tokens", sums.signed / n, **where)
            for level, under in (("0.5", sums.under_median), ("0.9", sums.under_high)):
                self._learn("prediction_calibration", under / n, quantile=level, **where)

    def _count(self, name: str, total: float, *, worker: int, **labels: int) -> None:
        """Bring a counter to a worker's ``total``; less than before: it was started anew."""
        key = (worker, f"{name} {labels}")
        before = self._predictions.get(key, 0.0)
        self._predictions[key] = total
        self._of(name, worker=worker, **labels).inc(total - before if total >= before else total)

    def predicted(self, of_new: Remaining | None) -> None:
        """What is expected of a new request."""
        if of_new is not None:
            self._of("length_prior_median_tokens").set(of_new[1])

    def worker_lost(self, worker: int, role: str) -> None:
        """A worker was declared dead."""
        self._of("worker_losses_total", worker=worker, role=role).inc()

    def worker_gone(self, worker: int, role: str) -> None:
        """A worker serves no longer: it died, or its host has left."""
        self._reported_at.pop(worker, None)
        self._forget_load(worker, role)
        for gauge in self._learnt.pop(worker, ()):
            gauge.set(math.nan)

    def _forget_load(self, worker: int, role: str) -> None:
        """What it was is history; a gauge would show its last value for ever."""
        for name in (
            "worker_kv_tokens",
            "worker_kv_capacity_tokens",
            "worker_running_requests",
            "worker_queued_requests",
            "worker_load_ratio",
            "decode_step_seconds",
        ):
            self._of(name, worker=worker, role=role).set(0)
        if self._decode_tokens.pop(worker, None) is not None:
            self._show_imbalance()

    def role_change_ended(self, ended: EndedChange) -> None:
        """A worker has changed its role, or has not."""
        self._of(
            "role_changes_total", role=ended.role, cause=ended.cause, outcome=ended.outcome
        ).inc()
        if ended.reason:
            return
        self._of("role_change_seconds", role=ended.role).observe(ended.seconds)
        self._forget_load(ended.worker, ended.old_role)

    def role_loads(self, loads: RoleLoads) -> None:
        """The planner has looked at the workers."""
        for role, ratio in loads.of_role.items():
            self._of("role_load_ratio", role=role).set(ratio)
        for role in ("prefill", "decode"):
            here = [w for w, (of, _) in loads.of_worker.items() if of == role]
            self._of("role_workers", role=role).set(len(here))
        for worker, (role, load) in loads.of_worker.items():
            if load is not None:
                self._of("worker_load_ratio", worker=worker, role=role).set(load)

    def recovered(self) -> None:
        """A request goes on by a further attempt."""
        self._of("recovered_requests_total").inc()

    def dropped(self, where: str, total: int) -> None:
        """A receiver has dropped ``total`` messages since it started."""
        before = self._dropped.get(where, 0)
        self._dropped[where] = total
        # Less than before: it has been started anew.
        self._of("dropped_control_frames_total", where=where).inc(
            total - before if total >= before else total
        )


class _NoMetrics(ControllerMetrics):
    """Metrics are off."""

    def __init__(self) -> None: ...

    def dispatched(self, worker: int, role: str) -> None: ...

    def waiting(self, requests: int) -> None: ...

    def migrated(self, result: MigrationResult, cause: str) -> None: ...

    def landed(self, message: Landed) -> None: ...

    def reported(self, report: WorkerReport) -> None: ...

    def predicted(self, of_new: Remaining | None) -> None: ...

    def worker_lost(self, worker: int, role: str) -> None: ...

    def worker_gone(self, worker: int, role: str) -> None: ...

    def role_change_ended(self, ended: EndedChange) -> None: ...

    def role_loads(self, loads: RoleLoads) -> None: ...

    def recovered(self) -> None: ...

    def dropped(self, where: str, total: int) -> None: ...


class SloMetrics:
    """Shows the front's count of promises kept."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._gauge = _registered(FRONT_SERIES)["slo_attainment"]

    @staticmethod
    def create(server_args: ServerArgs) -> SloMetrics | None:
        """Nothing without ``--enable-metrics``."""
        name = _model_name(server_args)
        return SloMetrics(name) if name is not None else None

    def show(self, attainment: SloAttainment, now: float) -> None:
        """Bring the gauges up to date."""
        for window_s in WINDOWS_S:
            window = attainment.window(window_s, now)
            for kind in KINDS:
                share = window[kind]
                self._gauge.labels(model_name=self._model_name, slo=kind, window=str(window_s)).set(
                    share if share is not None else math.nan
                )


def _model_name(server_args: ServerArgs) -> str | None:
    """Upstream's label; None while metrics are off."""
    if not server_args.enable_metrics or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return None
    return server_args.served_model_name or server_args.model_path


def _registered(table: tuple[_Series, ...]) -> dict[str, Any]:
    """The series of ``table`` by name, in upstream's registry."""
    from prometheus_client import Counter, Gauge, Histogram

    series: dict[str, Any] = {}
    for name, kind, labels, text in table:
        full, label_names = f"sglang_ares:{name}", ["model_name", *labels]
        if kind == "counter":
            series[name] = Counter(full, text, label_names)
        elif kind == "histogram":
            series[name] = Histogram(full, text, label_names, buckets=_SECONDS)
        else:
            series[name] = Gauge(full, text, label_names, multiprocess_mode="mostrecent")
    return series
