"""Least requests: the worker with the fewest, running or queued; upstream's shortest queue."""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest


@PLACEMENT.register("least_requests")
def least_requests(request: NewRequest, workers: WorkerTable) -> int:
    """The worker with the fewest requests; ties go to fewer tokens, then in turn."""
    requests = workers.running + workers.queued
    fewest = np.flatnonzero(requests == requests.min())
    if len(fewest) > 1:
        load = workers.load_tokens[fewest]
        fewest = fewest[load == load.min()]
    turn = request.sequence % len(workers)
    return int(fewest[np.searchsorted(fewest, turn) % len(fewest)])
