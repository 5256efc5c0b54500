"""Goodput of elastic roles: ``python benchmark/elastic_goodput.py --azure FILE --json out.json``.

Simulated, 8 workers. For every workload and arm: the highest rate at which 90 % of the requests
meet both SLOs, timestamps scaled by a constant; all arms get the same requests. Rates are
bracketed from an estimate and halved in ratio to ``--precision``; a simulation ends early once
90 % are out of reach. Of the static splits only 4P4D and the best are searched: one that does not
keep the SLOs at a higher rate than the best before it has no goodput in its row.

Rows are appended one by one: started again with the same ``--json`` it goes on where it stopped.
``--at RATE ...`` searches nothing: it tells how many requests are within their SLOs at these rates.
``--plot FILE`` draws what the JSON holds, ``--pools FILE`` the pools over time on the first
workload, at the highest rate at which the last of ``--pool-arms`` keeps the SLOs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from sglang_ares.bench.workloads import RequestStream, load_workload
from sglang_ares.profiles.profile import Profile, load_profile
from sglang_ares.simulator import SimulationConfig
from sglang_ares.simulator.roles import RolesConfig
from sglang_ares.simulator.roles.history import offered_load
from sglang_ares.simulator.roles.plot import plot_roles
from sglang_ares.simulator.roles.simulation import RolesSimulation
from sglang_ares.srt.policy.elastic.instances import Slo

WORKERS = 8
SHARE = 0.9
# The bracket is widened by this factor.
_STEP = 1.15


@dataclass(frozen=True)
class Scene:
    """A workload with its kind of worker and its SLOs (ms), set before any arm was run."""

    profile: str
    ttft_ms: float
    tpot_ms: float
    source: str = ""
    rate: float | None = None
    duration_s: float | None = None


SCENES = {
    "swing": Scene("24gb-qwen2.5-7b", 10_000, 100, "swing", 4.0, 1440.0),
    "azure": Scene("24gb-qwen2.5-7b", 5_000, 100),
    "mooncake": Scene("h200-qwen2.5-7b", 30_000, 100),
    # Its own rate is 16 per second: this asks for less of every client.
    "servegen": Scene("24gb-qwen2.5-7b", 10_000, 100, "", 3.0, 1800.0),
}

# Prefill workers, policy, request scheduling, kind of change.
ARMS: dict[str, tuple[int, str, str, str]] = {
    **{
        f"static {p}P{WORKERS - p}D": (p, "static", "", "")
        for p in sorted(range(1, WORKERS), key=lambda p: abs(p - WORKERS // 2))
    },
    "round robin 4P4D": (4, "static", "round_robin", ""),
    "colocated": (4, "colocated", "", ""),
    "arrow": (4, "arrow", "", "relabel"),
    "arrow, emptied": (4, "arrow", "", "empty"),
    "ares": (4, "ares", "", "empty"),
    "ares, relabelled": (4, "ares", "", "relabel"),
}


def requests(scene: Scene, source: str, most: int, seed: int) -> RequestStream:
    """The requests of a scene, the first ``most`` of them."""
    stream = load_workload(source, seed=seed, rate=scene.rate, duration_s=scene.duration_s)
    if len(stream) > most:
        stream = stream.between(0.0, float(stream.arrival_s[most]))
    return stream


def configuration(arm: str, scene: Scene, profile: Profile, seed: int) -> SimulationConfig:
    """The cluster of an arm."""
    prefill, policy, scheduling, change = ARMS[arm]
    return SimulationConfig(
        prefill_workers=prefill,
        decode_workers=WORKERS - prefill,
        profile=profile,
        ttft_slo_ms=scene.ttft_ms,
        tpot_slo_ms=scene.tpot_ms,
        seed=seed,
        roles=RolesConfig(policy=policy, scheduling=scheduling, change=change),
    )


def is_static(arm: str) -> bool:
    """Whether it is one of the static splits."""
    return arm.startswith("static")


def guess(config: SimulationConfig, stream: RequestStream) -> float:
    """A rate to begin with: what the workers could do if load came evenly."""
    slo = Slo(ttft_ms=config.ttft_slo_ms, tpot_ms=config.tpot_slo_ms)
    span_s = float(stream.arrival_s[-1]) + 1
    _, prefill, decode = offered_load(stream, config.profile, slo, span_s)
    p, d = float(prefill.sum()), float(decode.sum())
    assert config.roles is not None
    if config.roles.policy == "static":
        return 0.9 * stream.rate * min(config.prefill_workers / p, config.decode_workers / d)
    return 0.9 * stream.rate * WORKERS / (p + d)


def attempt(
    config: SimulationConfig, stream: RequestStream, rate: float, give_up_below: float = SHARE
) -> dict[str, Any]:
    """One simulation at a rate."""
    scaled = stream.scaled(stream.rate / rate)
    result = RolesSimulation(config, scaled, give_up_below=give_up_below).run()
    first, each = result.meets_slo()
    return {
        "rate": round(rate, 4),
        "attainment": round(result.attainment(), 4),
        "ttft": round(float(first.mean()), 4),
        "tpot": round(float(each.mean()), 4),
        "flips": result.counters["flips"],
        "migrations": result.counters["migrations"],
        "retractions": result.counters["retractions"],
    }


def search(
    config: SimulationConfig, stream: RequestStream, precision: float, beat: float = 0.0
) -> dict[str, Any]:
    """The highest rate found to keep the SLOs, and everything tried. Attainment is taken to fall
    with the rate. ``beat``: a rate to exceed by ``precision``; ``goodput`` is None where that is
    not kept."""
    points: list[dict[str, Any]] = []

    def meets(rate: float) -> bool:
        points.append(attempt(config, stream, rate))
        return bool(points[-1]["attainment"] >= SHARE)

    good, bad, rate = 0.0, 0.0, guess(config, stream)
    lowest = rate / 50
    if beat:
        rate = beat * (1 + precision)
        if not meets(rate):
            return {"goodput": None, "points": points}
        good, rate = rate, rate * _STEP
    while not (good and bad) and rate > lowest:
        if meets(rate):
            good = rate
        else:
            bad = rate
        rate = good * _STEP if good else bad / _STEP
    while good and bad > good * (1 + precision):
        rate = (good * bad) ** 0.5
        good, bad = (rate, bad) if meets(rate) else (good, rate)
    return {"goodput": round(good, 4), "points": points}


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Goodput by arm relative to static 4P4D, a panel per workload."""
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure = Figure(figsize=(3.4 * len(names) + 1.5, 4.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        found = {r["arm"]: r["goodput"] for r in rows if r["workload"] == name}
        splits = {a: rate for a, rate in found.items() if is_static(a) and rate}
        found["best static split"] = max(splits.values(), default=0.0)
        others = [a for a in ARMS if not is_static(a)]
        arms = [a for a in ("static 4P4D", "best static split", *others) if found.get(a)]
        base = found.get("static 4P4D") or float("nan")
        best = found["best static split"]
        colours = [
            "#D55E00" if a.startswith("ares") else "#0072B2" if "arrow" in a else "#999999"
            for a in arms
        ]
        places = np.arange(len(arms))[::-1]
        axes.barh(places, [found[a] / base for a in arms], color=colours)
        axes.axvline(best / base, color="black", linestyle=":", linewidth=1)
        for place, arm in zip(places, arms, strict=True):
            axes.text(0.03, place, f"{found[arm]:.2f}/s", va="center", fontsize=8)
        axes.set_yticks(places, arms)
        axes.set_title(name, loc="left")
        axes.set_xlabel("goodput over static 4P4D")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run what is missing from ``--json``, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("azure", "mooncake", "servegen"):
        parser.add_argument(f"--{name}", metavar="FILE", help="that trace; left out without")
    parser.add_argument("--workloads", nargs="+", choices=list(SCENES), default=list(SCENES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--requests", type=int, default=5000, help="most of each workload")
    parser.add_argument("--precision", type=float, default=0.03, help="of the rate, as a ratio")
    parser.add_argument("--at", type=float, nargs="+", metavar="RATE", help="do not search")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--pools", type=Path, metavar="FILE")
    parser.add_argument("--pool-arms", nargs="+", default=["arrow", "ares"], choices=list(ARMS))
    args = parser.parse_args()
    document = json.loads(args.json.read_text()) if args.json.exists() else {"rows": []}
    rows: list[dict[str, Any]] = document["rows"]
    done = {(row["workload"], row["arm"]) for row in rows}
    sources = {n: SCENES[n].source or getattr(args, n) for n in args.workloads}
    streams: dict[str, RequestStream] = {}

    def stream_of(name: str) -> RequestStream:
        if name not in streams:
            streams[name] = requests(SCENES[name], sources[name], args.requests, args.seed)
        return streams[name]

    todo = [
        (name, arm)
        for name in args.workloads
        for arm in args.arms
        if sources[name] and (name, arm) not in done
    ]
    for name, arm in tqdm(todo, unit="arm"):
        scene = SCENES[name]
        config = configuration(arm, scene, load_profile(scene.profile), args.seed)
        stream = stream_of(name)
        beat = max(
            (r["goodput"] or 0.0 for r in rows if r["workload"] == name and is_static(r["arm"])),
            default=0.0,
        )
        if args.at:
            points = [attempt(config, stream, rate, give_up_below=0.0) for rate in args.at]
            found = {"goodput": None, "points": points}
        else:
            found = search(config, stream, args.precision, beat if is_static(arm) else 0.0)
        rows.append({"workload": name, "requests": len(stream), "arm": arm, **found})
        document = {
            "settings": {
                "requests": args.requests,
                "precision": args.precision,
                "seed": args.seed,
                "scenes": {
                    n: [s.profile, s.ttft_ms, s.tpot_ms, s.rate, s.duration_s]
                    for n, s in SCENES.items()
                },
            },
            "rows": rows,
        }
        args.json.write_text(json.dumps(document) + "\n")
    if args.plot:
        plot(args.plot, rows)
    if args.pools:
        name = args.workloads[0]
        found = {row["arm"]: row["goodput"] for row in rows if row["workload"] == name}
        stream, scene = stream_of(name), SCENES[name]
        rate = found[args.pool_arms[-1]]
        scaled = stream.scaled(stream.rate / rate)
        profile = load_profile(scene.profile)
        results = {}
        for arm in args.pool_arms:
            config = replace(configuration(arm, scene, profile, args.seed), sample_interval_s=2.0)
            result = RolesSimulation(config, scaled).run()
            results[f"{arm} at {rate:.2f}/s, {result.attainment():.1%} within SLOs"] = result
        plot_roles(args.pools, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
