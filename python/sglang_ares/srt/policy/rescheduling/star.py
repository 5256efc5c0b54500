"""STAR (arXiv 2510.13668), as restated from its abstract and public notes in ``docs/policies.md``.

A request with ``len`` resident tokens and a predicted remainder ``rem`` weighs
``sum(len + k for k < min(rem, H)) / H``: its resident tokens, averaged over the next ``H`` decode
steps. A worker's load is the sum over its requests; moves go from overloaded to underloaded
workers, and each takes the request that lowers the variance of the loads most.
"""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import MEDIAN, Floats, Ints, Snapshot
from sglang_ares.srt.policy.step_law import steps_per_s
from sglang_ares.srt.policy.types import Move, RescheduleLimits

# Decode steps that the load looks ahead, and moments within them at which memory is checked.
_HORIZON = 1024
_MOMENTS = 8
# A request moves only if it will run this many times longer than its move takes.
_AMORTISATION = 4.0
# Least drop of the variance that a move must bring, relative to the squared mean load.
_LEAST_DROP = 1e-4
# The most overloaded and the most underloaded workers that are searched for a move.
_SHORTLIST = 8


@RESCHEDULING.register("star")
def star(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
    """Up to ``limits.max_moves`` moves, each the best at its time.

    A request without a prediction counts as running throughout the horizon.
    """
    workers, requests = cluster.workers, cluster.requests
    count = len(workers)
    if count < 2 or not len(requests):
        return ()
    left = np.nan_to_num(requests.remaining[:, MEDIAN], nan=np.inf)
    within = np.minimum(left, _HORIZON)
    weight = (within * requests.tokens + within**2 / 2) / _HORIZON
    unlisted = workers.load_tokens - np.bincount(requests.worker, requests.tokens, count)
    load = np.bincount(requests.worker, weight, count) + unlisted
    moments = np.linspace(0, _HORIZON, _MOMENTS)
    held = _resident(requests.tokens, left, moments)
    peak = cluster.sums_by_worker(held) + unlisted[:, None]

    takes_s = limits.cost.seconds_of(requests.tokens)
    lasts_s = left / steps_per_s(workers)[requests.worker]
    may_move = (
        requests.movable
        & (requests.since_move_s >= limits.cooldown_s)
        & (lasts_s >= _AMORTISATION * takes_s)
    )
    mean = load.mean()
    may_take = limits.may_take(workers.worker_id)
    budget = limits.cost.budget_tokens or int(requests.tokens.sum())
    moves: list[Move] = []
    while len(moves) < limits.max_moves:
        order = np.argsort(load, kind="stable")
        sources = order[load[order] > (1 + limits.threshold) * mean][-_SHORTLIST:]
        under = may_take & (load < (1 - limits.threshold) * mean)
        targets = order[under[order]][:_SHORTLIST]
        if not len(sources) or not len(targets):
            break
        rows = np.concatenate([cluster.rows_of_worker[w] for w in sources])
        rows = rows[may_move[rows] & (requests.tokens[rows] <= budget)]
        if not len(rows):
            break
        gap = load[requests.worker[rows], None] - load[targets]
        # The sum of squares falls by twice this.
        drop = weight[rows, None] * (gap - weight[rows, None])
        worthwhile = (drop > _LEAST_DROP * mean**2) & (gap >= limits.min_gap_tokens)
        drop[~worthwhile] = -np.inf
        chosen = _best_that_fits(drop, rows, targets, held, peak, cluster, limits)
        if chosen is None:
            break
        row, target = chosen
        source = int(requests.worker[row])
        may_move[row] = False
        budget -= int(requests.tokens[row])
        load[source] -= weight[row]
        load[target] += weight[row]
        # What leaves is still there while what comes arrives: room is taken, not given back.
        peak[target] += held[row]
        moves.append(
            Move(
                rid=requests.rids[row],
                source=int(workers.worker_id[source]),
                target=int(workers.worker_id[target]),
            )
        )
    return tuple(moves)


def _resident(tokens: Ints, left: Floats, moments: Floats) -> Floats:
    """``(R, moments)`` tokens that each request holds after so many steps; all do at first."""
    held = np.where(left[:, None] > moments, tokens[:, None] + moments, 0.0)
    held[:, 0] = tokens
    return held


def _best_that_fits(
    drop: Floats,
    rows: Ints,
    targets: Ints,
    held: Floats,
    peak: Floats,
    cluster: Snapshot,
    limits: RescheduleLimits,
) -> tuple[int, int] | None:
    """Request row and target of the largest ``drop``, shape ``(rows, targets)``, for which the
    target's memory suffices at every moment."""
    workers = cluster.workers
    room = workers.kv_capacity - limits.headroom_tokens
    while drop.max() > -np.inf:
        at, to = np.unravel_index(drop.argmax(), drop.shape)
        row, target = int(rows[at]), int(targets[to])
        if np.all(peak[target] + held[row] <= room[target]):
            return row, target
        drop[at, to] = -np.inf
    return None
