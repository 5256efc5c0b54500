"""What the workers will hold: expected requests and tokens at moments of a horizon.

Time is counted in decode steps: a request that runs produces one token per step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_ares.srt.policy.snapshot import MEDIAN, Floats, Ints, Snapshot
from sglang_ares.srt.policy.survival import known_or_guessed, relative_spread, survival

# Intervals of the horizon, each twice as long as the one before.
_INTERVALS = 4
# Steps of the shortest horizon.
_LEAST_HORIZON = 32.0


@dataclass(frozen=True, eq=False)
class Forecast:
    """``edges``, shape ``(K + 1,)``: the horizon's intervals, in steps from now; ``weights``, shape
    ``(K,)``: their lengths. Request by request, shape ``(K, R)``: ``alive``, the chance that it
    runs in the middle of an interval; ``tokens``, what it then holds times that chance;
    ``variance`` of what it holds. Worker by worker, shape ``(K, W)``: ``requests`` and
    ``resident``, the expected numbers of requests and of resident tokens, and ``uncertainty``,
    the variance of the latter. Moves change the workers' arrays in place.
    """

    edges: Floats
    weights: Floats
    alive: Floats
    tokens: Floats
    variance: Floats
    requests: Floats
    resident: Floats
    uncertainty: Floats

    def of_workers(self, workers: Ints) -> tuple[Floats, Floats, Floats]:
        """Requests, resident tokens and uncertainty of some workers, ``(K, workers)`` each."""
        return self.requests[:, workers], self.resident[:, workers], self.uncertainty[:, workers]

    def of_requests(self, rows: Ints) -> tuple[Floats, Floats, Floats]:
        """What some requests contribute to each of these, ``(K, rows)``."""
        return self.alive[:, rows], self.tokens[:, rows], self.variance[:, rows]

    def move(self, row: int, source: int, target: int) -> None:
        """Request ``row`` goes from one worker's row to another's."""
        for of_workers, of_requests in (
            (self.requests, self.alive),
            (self.resident, self.tokens),
            (self.uncertainty, self.variance),
        ):
            of_workers[:, source] -= of_requests[:, row]
            of_workers[:, target] += of_requests[:, row]


def forecast(cluster: Snapshot, horizon_scale: float, delay_steps: float) -> Forecast:
    """The forecast over a horizon that suits the predictions.

    The horizon is ``horizon_scale`` times the mean predicted remainder, shortened as the
    predictions spread: by half where the quartiles lie a median apart. It comes on top of
    ``delay_steps``, which pass before any decision has an effect.
    """
    workers, requests = cluster.workers, cluster.requests
    remaining = known_or_guessed(requests.remaining, requests.output_tokens)
    trust = 1 / (1 + relative_spread(remaining))
    horizon = horizon_scale * float((remaining[:, MEDIAN] * trust).mean())
    edges = np.concatenate([[0.0], 2.0 ** np.arange(1 - _INTERVALS, 1)])
    edges *= delay_steps + max(_LEAST_HORIZON, horizon)
    middle = (edges[:-1] + edges[1:]) / 2
    # A row for each moment, so that what is worked on is contiguous.
    alive = survival(remaining, middle).T
    grown = requests.tokens + middle[:, None]
    tokens = alive * grown
    variance = tokens * (1 - alive) * grown
    unlisted = (
        workers.running + workers.queued - np.bincount(requests.worker, minlength=len(workers))
    )
    # Tokens that wait for memory count with what is resident: what leaves lets them in.
    unlisted_tokens = workers.load_tokens - np.bincount(
        requests.worker, requests.tokens, len(workers)
    )
    return Forecast(
        edges=edges,
        weights=np.diff(edges),
        alive=alive,
        tokens=tokens,
        variance=variance,
        requests=_sums(cluster, alive) + unlisted,
        resident=_sums(cluster, tokens) + unlisted_tokens,
        uncertainty=_sums(cluster, variance),
    )


def _sums(cluster: Snapshot, values: Floats) -> Floats:
    """``(K, W)`` sums over each worker's requests of ``values``, shape ``(K, R)``."""
    where, count = cluster.requests.worker, len(cluster.workers)
    return np.stack([np.bincount(where, row, count) for row in values]).astype(np.float64)
