"""Admission: where requests wait while no decode worker has room for them, and who goes in next.

``worker``: a request is bound to a decode worker as it arrives and waits there, first come, first
served, while a neighbour may have room already. ``slo``: it waits in the controller and is bound
late, to a worker that has room; whoever can still get its first token in time goes before those
that are late already, for whom a little longer changes least.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from sglang_ares.srt.policy.snapshot import Bools, WorkerTable

WORKER, SLO = "worker", "slo"
ADMISSIONS = (WORKER, SLO)

# From this share of the promised time to the first token on, a request that still waits counts as
# late: what is left would not do for prefill and the transfer of its KV.
_IN_TIME = 0.85
# Each so-many-th request that is let in is the one that has waited longest, however late: nobody
# waits for ever.
_OLDEST_EVERY = 8


def has_room(tokens: int, workers: WorkerTable, reserved_tokens: int) -> Bools:
    """``(W,)`` which workers have KV memory for a request of ``tokens`` tokens.

    As upstream admits: with ``reserved_tokens`` left for each request that is there or on its way,
    and for this one; an empty worker takes whatever it can hold.
    """
    present = workers.running + workers.queued
    free = workers.kv_capacity - workers.load_tokens
    fits = tokens + reserved_tokens * (present + 1) <= free
    return np.asarray(fits | ((present == 0) & (tokens <= free)))


def next_in_turn(arrived_s: Sequence[float], now_s: float, ttft_slo_s: float, admitted: int) -> int:
    """Which of the requests that arrived at ``arrived_s`` (ascending, at least one) is to be let in
    next: its index. ``admitted``: how many of those that had to wait were let in before."""
    if admitted % _OLDEST_EVERY == _OLDEST_EVERY - 1:
        return 0
    in_time = bisect_right(arrived_s, now_s - _IN_TIME * ttft_slo_s)
    return in_time if in_time < len(arrived_s) else 0
