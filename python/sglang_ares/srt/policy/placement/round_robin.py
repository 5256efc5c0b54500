"""Round robin: every worker in turn, whatever its load."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.types import NewRequest, WorkerLoad


@PLACEMENT.register("round_robin")
def round_robin(request: NewRequest, workers: Sequence[WorkerLoad]) -> int:
    """The worker whose turn it is."""
    return workers[request.sequence % len(workers)].worker_id
