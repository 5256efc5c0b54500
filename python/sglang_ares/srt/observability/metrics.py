"""Prometheus series of the controller, named and labelled as upstream's (``sglang:`` → ours
``sglang_ares:``). The registry is upstream's multi-process one, so ``/metrics`` shows them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_ares.srt.managers.io_struct import Landed, MigrationResult, WorkerReport

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

# name without prefix, kind, labels besides model_name, help. The reference is made from this.
SERIES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("dispatched_requests_total", "counter", ("worker", "role"), "Requests sent to a worker."),
    (
        "migrations_total",
        "counter",
        ("cause", "outcome", "reason"),
        "Migrations by cause (manual, policy, memory), outcome (completed, …) and reason.",
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
    ("imbalance_ratio", "gauge", (), "Most resident tokens of a decode worker over the mean."),
    ("worker_losses_total", "counter", ("worker", "role"), "Workers declared dead."),
    ("recovered_requests_total", "counter", (), "Requests continued by a further attempt."),
    (
        "dropped_control_frames_total",
        "counter",
        ("where",),
        "Control messages not let in, by receiver (controller, front, worker-N).",
    ),
)


class ControllerMetrics:
    """Records what the controller sees; with metrics off, nothing."""

    def __init__(self, model_name: str) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._model_name = model_name
        self._series: dict[str, Any] = {}
        self._decode_tokens: dict[int, int] = {}
        # A worker reports its retractions since its start.
        self._retracted: dict[int, int] = {}
        self._dropped: dict[str, int] = {}
        for name, kind, labels, text in SERIES:
            full, label_names = f"sglang_ares:{name}", ["model_name", *labels]
            if kind == "counter":
                self._series[name] = Counter(full, text, label_names)
            elif kind == "histogram":
                self._series[name] = Histogram(full, text, label_names, buckets=_SECONDS)
            else:
                self._series[name] = Gauge(full, text, label_names, multiprocess_mode="mostrecent")

    @staticmethod
    def create(server_args: ServerArgs) -> ControllerMetrics:
        """The recorder, or a silent one without ``--enable-metrics``."""
        if not server_args.enable_metrics or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return _NoMetrics()
        return ControllerMetrics(server_args.served_model_name or server_args.model_path)

    def _of(self, name: str, **labels: str | int) -> Any:
        values = {k: str(v) for k, v in labels.items()}
        return self._series[name].labels(model_name=self._model_name, **values)

    def dispatched(self, worker: int, role: str) -> None:
        """A request was sent to a worker."""
        self._of("dispatched_requests_total", worker=worker, role=role).inc()

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
        self._of("worker_kv_tokens", **where).set(load.kv_tokens)
        self._of("worker_kv_capacity_tokens", **where).set(load.kv_capacity)
        self._of("worker_running_requests", **where).set(load.running)
        self._of("worker_queued_requests", **where).set(load.queued)
        earlier = self._retracted.get(load.worker_id, 0)
        new = report.retracted - earlier if report.retracted >= earlier else report.retracted
        self._retracted[load.worker_id] = report.retracted
        self._of("retractions_total", **where).inc(new)
        self._of("decode_step_seconds", **where).set(report.decode_step_ms / 1e3)
        self.dropped(f"worker-{report.worker_id}", report.dropped_frames)
        if load.role == "decode":
            self._decode_tokens[load.worker_id] = load.kv_tokens
            mean = sum(self._decode_tokens.values()) / len(self._decode_tokens)
            ratio = max(self._decode_tokens.values()) / mean if mean else 1.0
            self._of("imbalance_ratio").set(ratio)

    def worker_lost(self, worker: int, role: str) -> None:
        """A worker was declared dead."""
        self._of("worker_losses_total", worker=worker, role=role).inc()

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

    def migrated(self, result: MigrationResult, cause: str) -> None: ...

    def landed(self, message: Landed) -> None: ...

    def reported(self, report: WorkerReport) -> None: ...

    def worker_lost(self, worker: int, role: str) -> None: ...

    def recovered(self) -> None: ...

    def dropped(self, where: str, total: int) -> None: ...
