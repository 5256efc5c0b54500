"""Admission: where requests wait while no decode worker has room for them, and who goes in next.

``worker``: a request is bound to a decode worker as it arrives and waits there, first come, first
served, while a neighbour may have room already. ``slo``: it waits in the controller and is bound
late, to a worker that has room; whoever can still get its first token in time goes before those
that are late already, for whom a little longer changes least.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain

import numpy as np

from sglang_ares.srt.policy.snapshot import Ints, WorkerTable

WORKER, SLO = "worker", "slo"
ADMISSIONS = (WORKER, SLO)

# From this share of the promised time to the first token on, a request that still waits counts as
# late: what is left would not do for prefill and the transfer of its KV.
_IN_TIME = 0.85
# Each so-many-th request that is let in is the one that has waited longest, however late: nobody
# waits for ever.
_OLDEST_EVERY = 8


def room(workers: WorkerTable, reserved_tokens: int) -> Ints:
    """``(W,)`` tokens of the largest request that each worker has KV memory for.

    Much as upstream admits: with ``reserved_tokens`` left for each request that is there or on its
    way, and for this one; an empty worker takes whatever it can hold.
    """
    present = workers.running + workers.queued
    kept = reserved_tokens * np.where(present > 0, present + 1, 0)
    return np.asarray(workers.kv_capacity - workers.load_tokens - kept)


def next_in_turn(
    arrived_s: Sequence[float],
    tokens: Sequence[int],
    most: int,
    now_s: float,
    ttft_slo_s: float,
    admitted: int,
) -> int | None:
    """Which of the waiting requests is to be let in next: its index, None if none yet.

    ``arrived_s``: when each arrived, ascending; ``tokens`` of each; ``most``: tokens of the largest
    that some worker has room for. ``admitted``: how many were let in before that had to wait, or
    passed others that do. Smaller ones pass what does not fit, except in the turn of the oldest.
    """
    if admitted % _OLDEST_EVERY == _OLDEST_EVERY - 1:
        return 0 if tokens and tokens[0] <= most else None
    late = bisect_right(arrived_s, now_s - _IN_TIME * ttft_slo_s)
    turns = chain(range(late, len(tokens)), range(late))
    return next((i for i in turns if tokens[i] <= most), None)
