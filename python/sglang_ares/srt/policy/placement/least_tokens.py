"""Least resident tokens: decode step time grows with resident tokens, so take the lightest."""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest


@PLACEMENT.register("least_tokens")
def least_tokens(request: NewRequest, workers: WorkerTable) -> int:
    """The worker with the fewest resident and promised tokens; ties go to fewer requests, then in
    turn."""
    load = workers.load_tokens
    first = load.argmin()
    lightest = (load == load[first]).nonzero()[0]
    if len(lightest) == 1:
        return int(first)
    requests = (workers.running + workers.queued)[lightest]
    lightest = lightest[requests == requests.min()]
    turn = request.sequence % len(workers)
    return int(lightest[np.searchsorted(lightest, turn) % len(lightest)])
