"""Predicted load: the worker that will be lightest, of those whose memory will suffice.

What a worker's requests hold now says how slow its steps are now; what they will still produce,
how long that lasts. A request placed now feels both.
"""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest

# Share of the tokens still to be produced that counts as load: they come one by one, and some of
# them when others have left.
_GROWTH_WEIGHT = 0.5


@PLACEMENT.register("predicted_load")
def predicted_load(request: NewRequest, workers: WorkerTable) -> int:
    """The worker with the least resident, promised and (by half) predicted tokens.

    Workers whose KV memory holds the request and the predicted growth of all come first; if there
    is none, those that hold the request now; then any. Ties go to fewer requests, then in turn.
    """
    resident = workers.load_tokens
    growth = _GROWTH_WEIGHT * workers.remaining_tokens
    own = _GROWTH_WEIGHT * request.remaining[1] if request.remaining is not None else 0.0
    now = resident + request.prompt_tokens
    lacks = 2 - (now + growth + own <= workers.kv_capacity) - (now <= workers.kv_capacity)
    best = np.flatnonzero(lacks == lacks.min())
    for key in (resident + growth, workers.running + workers.queued):
        values = key[best]
        best = best[values == values.min()]
    turn = request.sequence % len(workers)
    return int(best[np.searchsorted(best, turn) % len(best)])
