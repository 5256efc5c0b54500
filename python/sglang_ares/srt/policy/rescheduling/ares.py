"""Ours: the moves that save requests the most time, as far as they pay for themselves.

From the quantiles of the remaining lengths follows what each worker is expected to hold at moments
of a short horizon (:mod:`~sglang_ares.srt.policy.forecast`), and from that what its requests will
pay in step time and for memory that runs out (:mod:`~sglang_ares.srt.policy.load_cost`). A move is
worth what this cost falls by at its source, less what it rises by at its target, from the moment
the copy is over; it is made if that exceeds twice what the move itself costs. As every move lowers
the cost of the whole cluster by at least that, no request is sent back and forth.
"""

from __future__ import annotations

import numpy as np

from sglang_ares.srt.policy.forecast import Forecast, forecast
from sglang_ares.srt.policy.load_cost import LoadCost
from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import Bools, Floats, Ints, Snapshot
from sglang_ares.srt.policy.step_law import step_laws, step_times_ms
from sglang_ares.srt.policy.types import Move, RescheduleLimits

# The horizon, as a share of the mean predicted remaining length.
_HORIZON = 0.03
# While a request is copied, the steps of both workers take this much longer (OSDI '24, Llumnix:
# at most 1 %).
_SLOWDOWN = 0.01
# A move's gain must be so many times its cost.
_MARGIN = 1.0
# The most underloaded workers that are tried as targets.
_TARGETS = 4


@RESCHEDULING.register("ares")
def ares(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
    """Up to ``limits.max_moves`` moves of ``limits.cost.budget_tokens`` tokens together, each the
    best at its time, from workers above the mean load to workers below it."""
    if len(cluster.workers) < 2 or not len(cluster.requests):
        return ()
    return _Round(cluster, limits).plan()


class _Round:
    """The state of one round's greedy search; its arrays change with every move."""

    def __init__(self, cluster: Snapshot, limits: RescheduleLimits) -> None:
        workers, requests = cluster.workers, cluster.requests
        self._cluster = cluster
        self._limits = limits
        step_ms = max(1e-3, float(step_times_ms(workers).mean()))
        self._cost = LoadCost(
            laws=step_laws(workers),
            capacity=workers.kv_capacity.astype(np.float64),
            mean_step_ms=step_ms,
            slo_ms=limits.tpot_slo_ms,
        )
        self._free = workers.free_tokens - limits.headroom_tokens
        self._takes_s = limits.cost.seconds_of(requests.tokens)
        self._takes_steps = 1e3 * self._takes_s / step_ms
        self._ahead: Forecast = forecast(cluster, _HORIZON, float(self._takes_steps.mean()))
        self._budget = limits.cost.budget_tokens or int(requests.tokens.sum())
        self._open: Bools = requests.movable & (requests.since_move_s >= limits.cooldown_s)

    def plan(self) -> tuple[Move, ...]:
        """Relieve the most overloaded worker, again and again, until the limits are reached or
        nothing pays any more."""
        workers, requests = self._cluster.workers, self._cluster.requests
        load = self._load(np.arange(len(workers)))
        # Workers that no move can relieve stay so: others only fill up.
        relievable = load.copy()
        most = min(_TARGETS, len(workers)) - 1
        moves: list[Move] = []
        while len(moves) < self._limits.max_moves:
            source, mean = int(relievable.argmax()), load.mean()
            if relievable[source] <= (1 + self._limits.threshold) * mean:
                break
            targets = np.argpartition(load, most)[: most + 1]
            found = self._best(source, targets[load[targets] < mean])
            if found is None:
                relievable[source] = -np.inf
                continue
            row, target = found
            self._open[row] = False
            self._budget -= int(requests.tokens[row])
            # What leaves is still there while what comes arrives.
            self._free[target] -= requests.tokens[row]
            self._ahead.move(row, source, target)
            both = np.array([source, target])
            load[both] = self._load(both)
            relievable[both] = np.where(np.isinf(relievable[both]), -np.inf, load[both])
            moves.append(
                Move(
                    rid=requests.rids[row],
                    source=int(workers.worker_id[source]),
                    target=int(workers.worker_id[target]),
                )
            )
        return tuple(moves)

    def _load(self, workers: Ints) -> Floats:
        """``(workers,)`` mean over the horizon of what their load adds to their steps, in ms."""
        weights = self._ahead.weights
        pressure = self._cost.pressure(workers, *self._ahead.of_workers(workers))
        return np.asarray(pressure @ weights / weights.sum())

    def _best(self, source: int, targets: Ints) -> tuple[int, int] | None:
        """Row of the request, and target, of the move with the largest gain, if one pays."""
        requests, ahead, cost = self._cluster.requests, self._ahead, self._cost
        rows = self._cluster.rows_of_worker[source]
        rows = rows[self._open[rows] & (requests.tokens[rows] <= self._budget)]
        fits = requests.tokens[rows, None] <= self._free[targets]
        if not fits.any():
            return None
        own = ahead.alive[rows], ahead.tokens[rows], ahead.variance[rows]
        here = np.array([source])
        with_all = ahead.of_workers(here)
        saved = cost(here, *with_all) - cost(here, *(t - o for t, o in zip(with_all, own)))
        there = ahead.of_workers(targets)
        joined = (t + o[:, None] for t, o in zip(there, own))
        paid = cost(targets, *joined) - cost(targets, *there)
        # Steps of each interval that are left when the move is over.
        left = np.clip(ahead.edges[1:] - self._takes_steps[rows, None], 0.0, ahead.weights)
        gain = np.einsum("rk,rk->r", saved, left)[:, None] - np.einsum("rtk,rk->rt", paid, left)
        felt_by = ahead.requests[source, 0] + ahead.requests[targets, 0]
        slowdown_s = _SLOWDOWN * self._takes_s[rows, None] * felt_by
        gain -= _MARGIN * 1e3 * (self._limits.cost.pause_s + slowdown_s)
        gain[~fits] = -np.inf
        best = int(gain.argmax())
        if gain.flat[best] <= 0:
            return None
        return int(rows[best // len(targets)]), int(targets[best % len(targets)])
