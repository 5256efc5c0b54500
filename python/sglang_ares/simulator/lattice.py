"""Goodput on a lattice of rates, for surveys of many configurations.

The rates are ``base * step**k`` for whole ``k``, the same ones for every configuration: so two that
serve alike get the same goodput, not two within the precision of a bisection. A run stops as soon
as it is certain whether it meets the share that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.goodput import ATTAINMENTS, Point, try_rate

# Rates below ``step**-this`` or above ``step**this`` of the base are not tried.
MOST_STEPS = 128


@dataclass(frozen=True)
class LatticeGoodput:
    """``exponent[share]``: the highest ``k`` whose rate meets the share, None if none does;
    ``rate[share]``: that rate, 0 if none does; ``tries``: simulations made. ``top``: the highest
    ``k`` that could be tried; a goodput there may be higher."""

    exponent: Mapping[float, int | None]
    rate: Mapping[float, float]
    tries: int
    top: int = MOST_STEPS


def lattice_search(
    attempt: Callable[[int, float], Point],
    *,
    start: Mapping[float, int],
    known: Mapping[int, Point] | None = None,
    top: int = MOST_STEPS,
) -> tuple[dict[float, int | None], int]:
    """The highest ``k``, ``top`` at most, that meets each share of ``start``, and the number of
    attempts.

    ``attempt(k, share)`` tries the rate of ``k`` until it is certain whether ``share`` is met. For
    each share the search begins at its ``start``, walks up or down by 1, 2, 4, ... and halves what
    is left between. Attainment is taken to fall with the rate.
    """
    tried = dict(known or {})
    tries = 0

    def meets(k: int, share: float) -> bool:
        nonlocal tries
        met = tried[k].meets(share) if k in tried else None
        if met is None:
            tries += 1
            tried[k] = attempt(k, share)
            met = tried[k].meets(share)
        return bool(met)

    found: dict[float, int | None] = {}
    for share, begin in start.items():
        good = max((k for k, p in tried.items() if p.meets(share)), default=-MOST_STEPS - 1)
        fails = (k for k, p in tried.items() if p.meets(share) is False and k > good)
        bad = min(fails, default=top + 1)
        k, stride = max(good + 1, min(bad - 1, begin)), 1
        while bad - good > 1:
            if not good < k < bad:
                k = (good + bad) // 2
            if meets(k, share):
                good, k = k, k + stride
            else:
                bad, k = k, k - stride
            stride *= 2
        found[share] = good if good >= -MOST_STEPS else None
    return found, tries


def lattice_goodput(
    config: SimulationConfig,
    stream: RequestStream,
    *,
    step: float = 1.03,
    start: Mapping[float, int] | None = None,
    known: Point | None = None,
    window_s: float | None = None,
) -> LatticeGoodput:
    """The goodput of ``config`` on ``stream``, whose own rate is the base.

    ``start``: where to begin for each share (the exponents of a similar configuration, say).
    ``known``: a run at the base rate. ``window_s``: as for :func:`try_rate`; rates at which the
    stream would end before it are not tried.
    """
    base = stream.rate
    top = MOST_STEPS
    if window_s is not None:
        top = min(top, math.floor(math.log(stream.arrival_s[-1] / window_s, step)))
    exponents, tries = lattice_search(
        lambda k, share: try_rate(config, stream, base * step**k, share, window_s),
        start=start or dict.fromkeys(ATTAINMENTS, 0),
        known={0: known} if known is not None else None,
        top=top,
    )
    rate = {share: 0.0 if k is None else base * step**k for share, k in exponents.items()}
    return LatticeGoodput(exponent=exponents, rate=rate, tries=tries, top=top)
