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
from typing import NamedTuple

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


class Turn(NamedTuple):
    """A request that is to be let in."""

    # Its index among those that wait.
    request: int
    # ``(R,)`` rows of the workers that it may go to.
    rows: Ints
    # Whether it counts towards the next turn of the oldest, if it had to wait or passed another.
    counts: bool


def room(workers: WorkerTable, reserved_tokens: int) -> Ints:
    """``(W,)`` tokens of the largest request that each worker has KV memory for.

    Much as upstream admits: with ``reserved_tokens`` left for each request that is there or on its
    way, and for this one; an empty worker takes whatever it can hold.
    """
    present = workers.running + workers.queued
    kept = reserved_tokens * np.where(present > 0, present + 1, 0)
    return np.asarray(workers.kv_capacity - workers.load_tokens - kept)


def kept_for_oldest(
    arrived_s: Sequence[float],
    tokens: Sequence[int],
    free: Ints,
    now_s: float,
    ttft_slo_s: float,
    admitted: int,
    kept: int | None = None,
) -> int | None:
    """The row of the worker that is kept for the oldest of the waiting requests, None if none is:
    in its turn, while it is late and fits nowhere.

    ``kept``: the row of the one that was until now. It stays the same, so that the oldest waits no
    longer than those run that are there; the roomiest one may be another every time.
    """
    if not tokens or not _oldest_in_turn(admitted):
        return None
    if free.max() >= tokens[0] or not _late(arrived_s, now_s, ttft_slo_s):
        return None
    return int(free.argmax()) if kept is None else kept


def next_in_turn(
    arrived_s: Sequence[float],
    tokens: Sequence[int],
    free: Ints,
    now_s: float,
    ttft_slo_s: float,
    admitted: int,
    kept: int | None = None,
) -> Turn | None:
    """Which of the waiting requests is to be let in next, None if none yet.

    ``arrived_s``: when each arrived, ascending; ``tokens`` of each; ``free``: ``(W,)`` room of the
    workers. ``admitted``: how many that count have been let in. ``kept``: as for
    :func:`kept_for_oldest`. Smaller ones pass what does not fit, but not the oldest in its turn:
    while it can still be in time, all wait for it; once it is late, a worker is kept for it and the
    others are let in elsewhere.
    """
    if not tokens:
        return None
    oldest_waits = _oldest_in_turn(admitted)
    if oldest_waits:
        fits = np.flatnonzero(free >= tokens[0])
        if len(fits):
            return Turn(0, fits, counts=True)
        kept = kept_for_oldest(arrived_s, tokens, free, now_s, ttft_slo_s, admitted, kept)
        if kept is None:
            return None
        free = free.copy()
        free[kept] = -1
    late = _late(arrived_s, now_s, ttft_slo_s)
    most = free.max()
    turns = chain(range(late, len(tokens)), range(late))
    at = next((i for i in turns if tokens[i] <= most), None)
    if at is None:
        return None
    return Turn(at, np.flatnonzero(free >= tokens[at]), counts=not oldest_waits)


def _oldest_in_turn(admitted: int) -> bool:
    """Whether it is the turn of the oldest, once so many have been let in."""
    return admitted % _OLDEST_EVERY == _OLDEST_EVERY - 1


def _late(arrived_s: Sequence[float], now_s: float, ttft_slo_s: float) -> int:
    """How many of those that wait are late; they are the first."""
    return bisect_right(arrived_s, now_s - _IN_TIME * ttft_slo_s)
