"""Emptying a decode worker by migration: every request goes where there is most room."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ares.srt.policy.types import Move, RescheduleLimits, WorkerLoad


def drain_moves(
    source: WorkerLoad, targets: Sequence[WorkerLoad], limits: RescheduleLimits
) -> tuple[Move, ...]:
    """Up to ``limits.max_moves`` moves off ``source``, largest requests first.

    A request that fits nowhere with ``limits.headroom_tokens`` to spare stays for a later round.
    """
    free = {t.worker_id: t.free_tokens for t in targets if t.worker_id != source.worker_id}
    moves: list[Move] = []
    movable = sorted((r for r in source.requests if r.movable), key=lambda r: (-r.tokens, r.rid))
    for request in movable:
        if len(moves) == limits.max_moves or not free:
            break
        target = max(free, key=lambda worker: (free[worker], -worker))
        if free[target] < request.tokens + limits.headroom_tokens:
            continue
        free[target] -= request.tokens
        moves.append(Move(rid=request.rid, source=source.worker_id, target=target))
    return tuple(moves)
