"""What the front makes of an ended request for the SLO attainment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_ares.srt.observability.slo import Served, SloAttainment

# Errors from here on are the cluster's; below, the request's.
_CLUSTERS_FAULT = 500


def count_ended(
    attainment: SloAttainment,
    state: Any,
    finish_reason: Mapping[str, Any] | None,
    tokens: int,
    now: float,
) -> None:
    """Count a request that has ended. ``state``: upstream's ``ReqState``.

    Left out are requests whose client has left, those refused for what they ask, those that asked
    for no stream, as nobody sees their tokens come, and what is no user's request.
    """
    # Upstream ends a request that is aborted before it has its KV like one whose transfer failed,
    # with status 500.
    if state.abort_sent or not getattr(state.obj, "log_metrics", False):
        return
    reason = finish_reason or {}
    if reason.get("type") == "abort":
        status = reason.get("status_code")
        if status is not None and int(status) >= _CLUSTERS_FAULT:
            attainment.failed(now)
    elif getattr(state.obj, "stream", False) and tokens:
        times = state.time_stats
        attainment.served(
            Served(times.get_first_token_latency(), times.get_decode_latency(), tokens), now
        )
