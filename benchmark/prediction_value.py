"""What predicted lengths are worth: ``python benchmark/prediction_value.py --json FILE``.

The same policy told nothing, what finished requests teach, the truth with 0.5, 1 and 2 times the
error, or the truth with free moves (the oracle), beside no moves at all and moves by the current
load. In scenarios where predictions should pay, and in one where they should not. All simulated at
a fixed rate; every arm of a scenario gets the same requests. Started again with the same ``--json``
it goes on where it stopped; ``prediction_value_report.py`` makes tables and a picture of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from gain_arms import TPOT_SLO, Row, cluster_under, mean_load, read_rows, write_rows
from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.bench.workloads.synthetic import lognormal
from sglang_ares.profiles.profile import Profile, load_profile
from sglang_ares.simulator import Simulation, SimulationConfig

# Name: rescheduling, prediction, scale of its error.
MOVING: dict[str, tuple[str, str, float]] = {
    "none": ("none", "none", 1.0),
    "reactive": ("reactive", "none", 1.0),
    "ares, no prediction": ("ares", "none", 1.0),
    "ares, prior": ("ares", "prior", 1.0),
    "ares, error x0.5": ("ares", "noisy", 0.5),
    "ares, error x1": ("ares", "noisy", 1.0),
    "ares, error x2": ("ares", "noisy", 2.0),
    "oracle": ("oracle", "true", 1.0),
}
BY_THRESHOLD = ("reactive", "ares, no prediction", "ares, error x1")
# Nothing moves; what is known on arrival is the prior, or the truth. Name: placement, prediction.
PLACING = {
    "least_tokens": ("least_tokens", "none"),
    "predicted_load, prior": ("predicted_load", "prior"),
    "predicted_load, true": ("predicted_load", "true"),
}
LIFETIMES, WARM_UP = 14, 4
BURST_EVERY_S, BURSTS = 30.0, 4

Scene = tuple[SimulationConfig, RequestStream]


@dataclass(frozen=True)
class Scenario:
    """``scene(seed)`` makes cluster and requests; ``thresholds``: relative overload from which a
    worker is relieved, one run each; ``arms``: of :data:`MOVING`; ``placing``: the arms are
    placements."""

    scene: Callable[[int], Scene]
    thresholds: tuple[float, ...] = (0.1,)
    arms: tuple[str, ...] = tuple(MOVING)
    placing: bool = False


def steady(
    seed: int,
    *,
    workers: int = 8,
    concurrency: float = 16,
    mean: float = 2000,
    cv: float = 1.5,
    kv: float = 3.0,
    longest: int = 16384,
    arrival_cv: float = 1.0,
    stay_s: float = 0.0,
    profile: Callable[[Profile], Profile] = lambda profile: profile,
    **changes: Any,
) -> Scene:
    """Log-normal lengths at the rate that fills the workers to ``concurrency``, for ``stay_s`` or
    :data:`LIFETIMES`."""
    base = profile(load_profile("h200-llama2-7b"))

    def drawn(rate: float, duration_s: float, seed: int) -> RequestStream:
        return lognormal(
            rate=rate,
            duration_s=duration_s,
            seed=seed,
            output_mean=mean,
            output_cv=cv,
            arrival_cv=arrival_cv,
            cap=longest,
        )

    load = mean_load(drawn(100.0, 1000.0, 99), concurrency, base)
    warm_up = WARM_UP * load.lifetime_s
    config = cluster_under(
        load, base, workers=workers, kv=kv, longest=longest, warmup_s=warm_up, seed=seed, **changes
    )
    duration_s = stay_s or LIFETIMES * load.lifetime_s
    return config, drawn(workers * load.rate, duration_s, seed)


def bursts(seed: int) -> Scene:
    """Short requests, and every 30 s three times as many long ones as there are workers, within
    a second."""
    config, short = steady(
        seed, concurrency=8, mean=500, cv=1.0, kv=8.0, stay_s=BURSTS * BURST_EVERY_S
    )
    rng = np.random.default_rng(seed + 1)
    count = 3 * config.decode_workers
    starts = np.repeat(BURST_EVERY_S * np.arange(BURSTS), count)
    long = RequestStream(
        name="bursts",
        origin="short requests with bursts of long ones",
        arrival_s=starts + rng.uniform(0, 1, len(starts)),
        prompt_tokens=np.full(len(starts), 500, np.int64),
        output_tokens=rng.integers(2000, 12_000, len(starts)),
    )
    order = np.argsort(np.concatenate([short.arrival_s, long.arrival_s]), kind="stable")
    merged = replace(
        long,
        **{
            name: np.concatenate([getattr(short, name), getattr(long, name)])[order]
            for name in ("arrival_s", "prompt_tokens", "output_tokens")
        },
    )
    # Twice the step over the short requests.
    return replace(config, warmup_s=0.0, tpot_slo_ms=2 / TPOT_SLO * config.tpot_slo_ms), merged


def slow(profile: Profile) -> Profile:
    """A network of 25 Gbit/s, 80 % used, and pauses of half a second."""
    return msgspec.structs.replace(
        profile, link_bytes_per_s=2.5e9, move_fixed_ms=200.0, move_pause_ms=500.0
    )


SCENARIOS = {
    "plenty of memory": Scenario(steady),
    "memory nearly full": Scenario(lambda seed: steady(seed, kv=1.0, cv=1.0, longest=8192)),
    "few long requests": Scenario(
        lambda seed: steady(seed, workers=4, concurrency=4, mean=6000, cv=1.0, kv=2.0)
    ),
    "bursts of long requests": Scenario(bursts),
    "slow links, long pauses": Scenario(lambda seed: steady(seed, profile=slow)),
    "slow links, memory nearly full": Scenario(
        lambda seed: steady(seed, profile=slow, kv=1.0, cv=1.0, longest=8192)
    ),
    # With those of the first one, for how many moves which balance is to be had.
    "other thresholds": Scenario(steady, thresholds=(0.03, 0.3), arms=BY_THRESHOLD),
    "placement alone, bursty arrivals": Scenario(
        lambda seed: steady(seed, kv=1.1, cv=1.5, arrival_cv=4.0), placing=True
    ),
}


def run(config: SimulationConfig, stream: RequestStream) -> Row:
    """The figures of one run."""
    summary = Simulation(config, stream).run().summary()
    slo = summary["slo"]
    return {
        "requests": summary["requests"],
        "tpot_p50_ms": round(summary["tpot_ms"]["p50"], 3),
        "tpot_p99_ms": round(summary["tpot_ms"]["p99"], 3),
        "ttft_p99_ms": round(summary["ttft_ms"]["p99"], 1),
        "gap_p99_ms": round(summary["longest_gap_ms"]["p99"], 1),
        "within_slo": round(slo["attainment"] * summary["requests"]),
        "attainment": round(slo["attainment"], 4),
        "retractions": summary["retractions"],
        "migrations": summary["migrations"],
        "moved_gb": round(summary["moved_bytes"] / 1e9, 3),
        "imbalance_cv": round(summary["imbalance"]["cv"], 4),
        "cpu_s": round(summary["cpu_s"], 2),
    }


def configurations(scenario: Scenario, config: SimulationConfig) -> Iterable[tuple[Row, Any]]:
    """What names each run of a scenario, and its configuration."""
    if scenario.placing:
        for arm, (placement, prediction) in PLACING.items():
            yield {"arm": arm}, replace(config, placement=placement, prediction=prediction)
        return
    for threshold in scenario.thresholds:
        for arm in scenario.arms:
            rescheduling, prediction, scale = MOVING[arm]
            yield (
                {"arm": arm, "threshold": threshold},
                replace(
                    config,
                    placement="least_tokens",
                    rescheduling=rescheduling,
                    prediction=prediction,
                    error_scale=scale,
                    threshold=threshold,
                ),
            )


def main() -> int:
    """Run what is missing from ``--json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    rows = read_rows(args.json)
    runs = []
    for seed in args.seeds:
        for name in args.scenarios:
            scenario = SCENARIOS[name]
            config, stream = scenario.scene(seed)
            for named, arm in configurations(scenario, config):
                row = {"scenario": name, "seed": seed} | named
                if not any(row.items() <= done.items() for done in rows):
                    runs.append((row, arm, stream))
    for row, config, stream in tqdm(runs, unit="run"):
        rows.append(row | run(config, stream))
        write_rows(args.json, {"seeds": args.seeds, "lifetimes": [LIFETIMES, WARM_UP]}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
