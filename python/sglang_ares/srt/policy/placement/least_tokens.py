"""Least resident tokens: decode step time grows with resident tokens, so take the lightest."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.types import NewRequest, WorkerLoad


@PLACEMENT.register("least_tokens")
def least_tokens(request: NewRequest, workers: Sequence[WorkerLoad]) -> int:
    """The worker with the fewest resident and promised tokens; ties go in turn."""
    turn = request.sequence % len(workers)
    in_turn = [*workers[turn:], *workers[:turn]]
    return min(in_turn, key=lambda w: (w.load_tokens, w.running + w.queued)).worker_id
