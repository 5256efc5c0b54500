"""What ``GET /ares/status`` and ``GET /ares/requests`` say of the cluster's state."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_ares.srt.policy.types import DECODE

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.cluster_views import Ownership, WorkerView
    from sglang_ares.srt.policy.types import Remaining, RequestLoad


def status_document(state: ClusterState, settings: dict[str, Any]) -> dict[str, Any]:
    """The body of ``GET /ares/status``; ``settings`` stand first in it."""
    return {
        "uptime_s": time.monotonic() - state.started_at,
        **settings,
        "workers": [_worker(view, state.operating_state(view)) for view in state.workers.values()],
        "migrations": state.migrations.document(in_flight=len(state.moving)),
        "requests": len(state.owners),
    }


def requests_document(state: ClusterState) -> list[dict[str, Any]]:
    """The body of ``GET /ares/requests``: live requests, where and how large they are."""
    now = time.monotonic()
    loads = {r.rid: r for w in state.ready(DECODE) for r in w.load().requests}
    return [_request(owner, loads.get(owner.name), now) for owner in state.owners.values()]


def _request(owner: Ownership, load: RequestLoad | None, now: float) -> dict[str, Any]:
    return {
        "rid": owner.rid,
        "worker": None if owner.waiting else owner.decode,
        "tokens": load.tokens if load is not None else 0,
        "output_tokens": load.output_tokens if load is not None else 0,
        "predicted_remaining": _remaining(owner, load),
        "age_s": now - owner.dispatched_at,
        "attempt": owner.attempt,
    }


def _remaining(owner: Ownership, load: RequestLoad | None) -> Remaining | None:
    if load is not None and load.remaining is not None:
        return load.remaining
    return owner.expected_after(load.output_tokens if load is not None else 0)


def _worker(view: WorkerView, state: str) -> dict[str, Any]:
    load = view.load()
    report = view.report
    status: dict[str, Any] = {
        "id": view.worker_id,
        "role": view.role,
        "state": state,
        "restarts": view.incarnation,
        "pids": view.pids,
        "running": load.running,
        "queued": load.queued,
        "queued_tokens": load.queued_tokens,
        "kv_tokens": load.kv_tokens,
        "kv_capacity": load.kv_capacity,
    }
    if view.host:
        status["host"] = view.host
    if view.reason:
        status["reason"] = view.reason
    if view.changing_to is not None:
        status["changing_to"] = view.changing_to
    if report is not None:
        status.update(
            report_age_s=time.monotonic() - view.reported_at,
            migrations_in=report.migrations_in,
            migrations_out=report.migrations_out,
            retracted=report.retracted,
            dropped_frames=report.dropped_frames,
            decode_step_ms=report.decode_step_ms,
            late_steps=report.late_steps,
            step=msgspec.to_builtins(report.load.step),
            pools=msgspec.to_builtins(report.pools),
        )
    return status
