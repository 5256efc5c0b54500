"""Round robin: every worker in turn, whatever its load."""

from __future__ import annotations

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest


@PLACEMENT.register("round_robin")
def round_robin(request: NewRequest, workers: WorkerTable) -> int:
    """The worker whose turn it is."""
    return request.sequence % len(workers)
