"""Reactive balance: even out the tokens resident now, without any prediction.

Each move goes from the most to the least loaded worker and takes the request whose size is
nearest to half their gap, so that one move brings the two as close as one move can.
"""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.types import Move, RescheduleLimits


@RESCHEDULING.register("reactive")
def reactive(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
    """Moves that shrink the gap between the most and the least loaded worker.

    Only a request smaller than the gap qualifies: a larger one would swap the two workers'
    places, and the next round would send it back.
    """
    workers, requests = cluster.workers, cluster.requests
    if len(workers) < 2:
        return ()
    load, free = workers.load_tokens, workers.free_tokens
    targets = np.flatnonzero(limits.may_take(workers.worker_id))
    stays = ~requests.movable | (requests.since_move_s < limits.cooldown_s)
    overloaded = (1 + limits.threshold) * load.mean()
    budget = limits.cost.budget_tokens or int(requests.tokens.sum())
    moves: list[Move] = []
    while len(moves) < limits.max_moves and len(targets):
        source, target = int(load.argmax()), int(targets[load[targets].argmin()])
        gap = int(load[source] - load[target])
        if gap < limits.min_gap_tokens or load[source] <= overloaded:
            break
        rows = cluster.rows_of_worker[source]
        tokens = requests.tokens[rows]
        room = min(gap - 1, budget, int(free[target]) - limits.headroom_tokens)
        fits = ~stays[rows] & (tokens <= room)
        if not fits.any():
            break
        chosen = int(rows[np.where(fits, np.abs(tokens - gap / 2), np.inf).argmin()])
        stays[chosen] = True
        size = int(requests.tokens[chosen])
        budget -= size
        load[source] -= size
        load[target] += size
        free[target] -= size  # the source's is not free before the move has ended
        moves.append(
            Move(
                rid=requests.rids[chosen],
                source=int(workers.worker_id[source]),
                target=int(workers.worker_id[target]),
            )
        )
    return tuple(moves)
