"""Reactive balance: even out the tokens resident now, without any prediction.

Each move goes from the most to the least loaded worker and takes the request whose size is
nearest to half their gap, so that one move brings the two as close as one move can.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.types import Move, RequestLoad, RescheduleLimits, WorkerLoad


@RESCHEDULING.register("reactive")
def reactive(workers: Sequence[WorkerLoad], limits: RescheduleLimits) -> tuple[Move, ...]:
    """Moves that shrink the gap between the most and the least loaded worker."""
    if len(workers) < 2:
        return ()
    load = {w.worker_id: w.load_tokens for w in workers}
    free = {w.worker_id: w.free_tokens for w in workers}
    candidates = {
        w.worker_id: [r for r in w.requests if r.movable and r.since_move_s >= limits.cooldown_s]
        for w in workers
    }
    mean = sum(load.values()) / len(load)
    moves: list[Move] = []
    while len(moves) < limits.max_moves:
        source = max(load, key=lambda w: load[w])
        target = min(load, key=lambda w: load[w])
        gap = load[source] - load[target]
        if gap < limits.min_gap_tokens:
            break
        if load[source] <= (1 + limits.threshold) * mean:
            break
        chosen = _nearest_to_half_gap(
            candidates[source], gap, free[target] - limits.headroom_tokens
        )
        if chosen is None:
            break
        candidates[source].remove(chosen)
        moves.append(Move(rid=chosen.rid, source=source, target=target))
        load[source] -= chosen.tokens
        load[target] += chosen.tokens
        free[source] += chosen.tokens
        free[target] -= chosen.tokens
    return tuple(moves)


def _nearest_to_half_gap(requests: list[RequestLoad], gap: int, room: int) -> RequestLoad | None:
    """The request that fits ``room`` and is nearest to half of ``gap`` tokens.

    Only a request smaller than the gap qualifies: a larger one would swap the two workers'
    places, and the next round would send it back.
    """
    fitting = [r for r in requests if r.tokens < gap and r.tokens <= room]
    return min(fitting, key=lambda r: abs(r.tokens - gap / 2), default=None)
