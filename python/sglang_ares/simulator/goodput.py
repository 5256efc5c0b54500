"""Goodput: the highest request rate at which enough requests meet their SLOs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.roles.simulation import RolesSimulation
from sglang_ares.simulator.simulation import Simulation
from sglang_ares.simulator.verdict import Verdict

ATTAINMENTS = (0.9, 0.99)


@dataclass(frozen=True)
class Point:
    """One simulation: the rate (requests per second), and what share met both SLOs. If it was
    stopped as soon as that was decided, ``attainment`` is the share known to have met them by then,
    ``most`` what it could still have become, and the other figures are of requests that had ended.
    """

    rate: float
    attainment: float
    tpot_p99_ms: float
    ttft_p99_ms: float
    migrations: int
    moved_tokens: int
    retractions: int
    most: float | None = None

    def meets(self, share: float) -> bool | None:
        """Whether at least ``share`` met both SLOs; None if the run was stopped too early to
        tell."""
        if self.attainment >= share:
            return True
        return False if self.most is None or self.most < share else None


@dataclass(frozen=True)
class Goodput:
    """``rate[share]``: the highest rate tried at which at least ``share`` of the requests met both
    SLOs, 0 if that was at no rate; ``points``: everything that was tried."""

    rate: Mapping[float, float]
    points: tuple[Point, ...]


def try_rate(
    config: SimulationConfig,
    stream: RequestStream,
    rate: float,
    share: float | None = None,
    window_s: float | None = None,
) -> Point:
    """Simulate ``stream`` with its timestamps scaled to ``rate``; with a ``share`` only until it is
    certain whether so many requests meet both SLOs (workers that change roles: to the end).

    ``window_s``: requests arrive for so long at every rate, warm-up included, which is not scaled:
    a higher rate takes more requests of the stream, which must be long enough. Without it the same
    requests count at every rate, and the higher the rate, the sooner it is over: where that is
    before memory has filled up, a cluster serves at rates that it could not sustain.
    """
    factor = stream.rate / rate
    scaled = stream.scaled(factor)
    if window_s is None:
        config = replace(config, warmup_s=config.warmup_s * factor)
    else:
        ends_s = float(scaled.arrival_s[-1])
        if ends_s < window_s:
            raise ValueError(
                f"at {rate:.3g} requests/s the stream ends after {ends_s:.0f} s of a window of "
                f"{window_s:.0f} s; it needs more requests"
            )
        scaled = scaled.between(0, window_s)
    verdict = None
    if config.roles is not None:
        result = RolesSimulation(config, scaled).run()
    else:
        verdict = Verdict(config, scaled, share) if share is not None else None
        result = Simulation(config, scaled).run(verdict=verdict)
    summary = result.summary()
    tpot, ttft = summary["tpot_ms"], summary["ttft_ms"]
    return Point(
        rate=rate,
        attainment=result.attainment(),
        tpot_p99_ms=tpot["p99"] if tpot else 0.0,
        ttft_p99_ms=ttft["p99"] if ttft else 0.0,
        migrations=summary["migrations"],
        moved_tokens=summary["moved_tokens"],
        retractions=summary["retractions"],
        most=verdict.most if verdict is not None else None,
    )


def search(
    attempt: Callable[[float], Point],
    *,
    start_rate: float,
    attainments: tuple[float, ...] = ATTAINMENTS,
    precision: float = 0.02,
    most_tries: int = 40,
) -> Goodput:
    """Bisection over the rate, from ``start_rate`` (requests per second) on.

    The bracket is widened by doubling and halving until it holds the answer, then halved (in
    ratio) until it is narrower than ``precision``; every share starts from what the others tried.
    Attainment is taken to fall with the rate. Rates under a thousandth of the start count as 0.
    """
    tried: dict[float, Point] = {}

    def meets(rate: float, share: float) -> bool:
        if rate not in tried:
            tried[rate] = attempt(rate)
        return tried[rate].attainment >= share

    found: dict[float, float] = {}
    for share in attainments:
        good = max((r for r, p in tried.items() if p.attainment >= share), default=0.0)
        bad = min((r for r, p in tried.items() if p.attainment < share and r > good), default=0.0)
        while not bad and len(tried) < most_tries:
            rate = 2 * good if good else start_rate
            good, bad = (rate, 0.0) if meets(rate, share) else (good, rate)
        while not good and bad > start_rate / 1000:
            rate = bad / 2
            good, bad = (rate, bad) if meets(rate, share) else (0.0, rate)
        while good and bad > good * (1 + precision) and len(tried) < most_tries:
            rate = (good * bad) ** 0.5
            good, bad = (rate, bad) if meets(rate, share) else (good, rate)
        found[share] = good
    return Goodput(rate=found, points=tuple(tried.values()))


def goodput(
    config: SimulationConfig,
    stream: RequestStream,
    *,
    attainments: tuple[float, ...] = ATTAINMENTS,
    precision: float = 0.02,
) -> Goodput:
    """The goodput of one configuration on ``stream``, whose own rate is the first one tried."""
    if not (config.ttft_slo_ms > 0 or config.tpot_slo_ms > 0):
        raise ValueError("goodput needs an SLO: set ttft_slo_ms, tpot_slo_ms, or both")
    if not stream.rate > 0:
        raise ValueError("goodput needs a stream of at least two requests at different times")
    return search(
        partial(try_rate, config, stream),
        start_rate=stream.rate,
        attainments=attainments,
        precision=precision,
    )


def goodput_of_arms(
    arms: Mapping[str, SimulationConfig],
    stream: RequestStream,
    *,
    attainments: tuple[float, ...] = ATTAINMENTS,
    precision: float = 0.02,
    processes: int = 1,
) -> Iterator[tuple[str, Goodput]]:
    """The goodput of every arm on the same requests, as each is found; ``processes`` at a time."""
    find = partial(goodput, stream=stream, attainments=attainments, precision=precision)
    if processes <= 1:
        for name, config in arms.items():
            yield name, find(config)
        return
    # Spawned, not forked: the parent may hold threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from zip(arms, pool.map(find, arms.values()), strict=True)
