"""Ours: the moves that save requests the most time, as far as they pay for themselves.

From the quantiles of the remaining lengths follows what each worker is expected to hold at moments
of a short horizon (:mod:`~sglang_ares.srt.policy.forecast`), and from that what its requests will
pay in step time and for memory that runs out (:mod:`~sglang_ares.srt.policy.load_cost`). A move is
worth what this cost falls by at its source, less what it rises by at its target, from the moment
the copy is over; it is made if that exceeds what the move itself costs. As every move lowers the
cost of the whole cluster by at least that, no request is sent back and forth.

Where memory is nearly full, requests miss their SLO in front of it, waiting to be let in, and not
by slow steps. What they wait for counts as load, so that moves let them in; but where all is nearly
full, that takes the room of the next ones, for the sake of those that are late already. So a move
leaves its target with room for arrivals.
"""

from __future__ import annotations

import math

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
# Targets that are tried for each source, all below the mean load: the source that stands n-th from
# the top begins with the one that stands n-th from the bottom.
_TARGETS = 4
# In a batch, at most this share of the moves that are left is made.
_BATCH = 0.5
# Share of its KV memory that a move leaves to a target, beyond what admission reserves there, for
# requests that arrive.
_FOR_ARRIVALS = 0.1


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
        present = workers.running + workers.queued
        kept = np.ceil(_FOR_ARRIVALS * workers.kv_capacity).astype(np.int64)
        kept += limits.reserved_tokens * (present + 1) + limits.headroom_tokens
        # Tokens that each worker can take from others.
        self._free = workers.kv_capacity - workers.load_tokens - kept
        self._takes_s = limits.cost.seconds_of(requests.tokens)
        self._takes_steps = 1e3 * self._takes_s / step_ms
        self._ahead: Forecast = forecast(cluster, _HORIZON, float(self._takes_steps.mean()))
        self._budget = limits.cost.budget_tokens or int(requests.tokens.sum())
        self._open: Bools = requests.movable & (requests.since_move_s >= limits.cooldown_s)
        self._moves: list[Move] = []

    def plan(self) -> tuple[Move, ...]:
        """Relieve the most overloaded workers, batch by batch, until the limits are reached or
        nothing pays any more.

        Within a batch no worker takes part in two moves: so what each was reckoned to gain stays
        true, and many are reckoned at once.
        """
        everyone = np.arange(len(self._cluster.workers))
        load = self._load(everyone)
        self._now = self._cost(everyone, *self._ahead.of_workers(everyone))
        # Workers that no move can relieve stay so: others only fill up.
        relievable = np.ones(len(everyone), np.bool_)
        may_take = self._limits.may_take(self._cluster.workers.worker_id)
        while (left := self._limits.max_moves - len(self._moves)) > 0:
            mean = load.mean()
            order = np.argsort(load, kind="stable")
            targets = order[may_take[order] & (load[order] < mean)]
            over = relievable[order] & (load[order] > (1 + self._limits.threshold) * mean)
            most = min(math.ceil(_BATCH * left), len(targets))
            sources = order[over][::-1][:most]
            if not len(sources):
                break
            hopeless, changed = self._batch(sources, targets)
            relievable[hopeless] = False
            if changed:
                both = np.array(changed)
                self._now[:, both] = self._cost(both, *self._ahead.of_workers(both))
                load[both] = self._load(both)
        return tuple(self._moves)

    def _load(self, workers: Ints) -> Floats:
        """``(workers,)`` mean over the horizon of what their load adds to their steps, in ms."""
        weights = self._ahead.weights
        pressure = self._cost.pressure(workers, *self._ahead.of_workers(workers))
        return np.asarray(weights @ pressure / weights.sum())

    def _batch(self, sources: Ints, targets: Ints) -> tuple[list[int], list[int]]:
        """At most one move from each source, the first ones choosing first. Which sources no move
        can relieve, and which workers a move has changed."""
        tokens = self._cluster.requests.tokens
        of_source = [self._cluster.rows_of_worker[w] for w in sources]
        rank = np.repeat(np.arange(len(sources)), [len(rows) for rows in of_source])
        rows = np.concatenate(of_source)
        eligible = self._open[rows] & (tokens[rows] <= self._budget)
        rows, rank = rows[eligible], rank[eligible]
        window = np.arange(min(_TARGETS, len(targets)))[:, None]
        # (T, rows) targets of each request; (T, rows) what its move there gains.
        to = targets[(rank + window) % len(targets)]
        gain = self._gain(rows, sources[rank], to)
        gain[tokens[rows] > self._free[to]] = -np.inf
        starts = np.searchsorted(rank, np.arange(len(sources) + 1)).tolist()
        hopeless: list[int] = []
        changed: list[int] = []
        taken = np.zeros(len(self._free), np.bool_)
        for source, first, last in zip(sources.tolist(), starts, starts[1:], strict=False):
            own = gain[:, first:last]
            if not (own > 0).any():
                hopeless.append(source)
                continue
            own[taken[to[:, first]]] = -np.inf
            own[:, tokens[rows[first:last]] > self._budget] = -np.inf
            at, place = divmod(int(own.argmax()), last - first)
            if own[at, place] <= 0:
                # Its targets are taken; it may have its turn in the next batch.
                continue
            target = int(to[at, first])
            self._move(int(rows[first + place]), source, target)
            taken[target] = True
            changed += (source, target)
        return hopeless, changed

    def _gain(self, rows: Ints, home: Ints, to: Ints) -> Floats:
        """``(T, rows)`` what moving each request of ``rows`` from its worker ``home``, ``(rows,)``,
        to each of ``to``, ``(T, rows)``, saves, less what it costs: ms of the requests that feel
        it."""
        ahead = self._ahead
        # The source without the request, then each target with it: (K, 1 + T, rows).
        affected = np.concatenate([home[None], to])
        sign = np.ones((len(affected), 1))
        sign[0] = -1
        loads = (
            load + sign * own[:, None]
            for load, own in zip(ahead.of_workers(affected), ahead.of_requests(rows), strict=True)
        )
        falls = self._now[:, affected] - self._cost(affected, *loads)
        # Steps of each interval that are left when the move is over.
        left = np.clip(ahead.edges[1:, None] - self._takes_steps[rows], 0.0, ahead.weights[:, None])
        saved = np.einsum("ktr,kr->tr", falls, left)
        slowdown_s = (
            _SLOWDOWN * self._takes_s[rows] * (ahead.requests[0, home] + ahead.requests[0, to])
        )
        return saved[0] + saved[1:] - _MARGIN * 1e3 * (self._limits.cost.pause_s + slowdown_s)

    def _move(self, row: int, source: int, target: int) -> None:
        """Plan the move of request ``row``."""
        workers, requests = self._cluster.workers, self._cluster.requests
        self._open[row] = False
        self._budget -= int(requests.tokens[row])
        # What leaves is still there while what comes arrives.
        self._free[target] -= requests.tokens[row] + self._limits.reserved_tokens
        self._ahead.move(row, source, target)
        self._moves.append(
            Move(
                rid=requests.rids[row],
                source=int(workers.worker_id[source]),
                target=int(workers.worker_id[target]),
            )
        )
