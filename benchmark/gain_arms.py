"""The arms that the surveys compare, and how one is measured on one cluster and workload."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.profiles.profile import Profile
from sglang_ares.simulator import SimulationConfig
from sglang_ares.simulator.goodput import try_rate
from sglang_ares.simulator.lattice import lattice_goodput

# Name: placement, admission, rescheduling, prediction. Ours lets requests in by their SLO; the arms
# after it tell what that does by itself, for the others, and what ours is without it.
ARMS = {
    "round_robin": ("round_robin", "worker", "none", "none"),
    "least_tokens": ("least_tokens", "worker", "none", "none"),
    "reactive": ("least_tokens", "worker", "reactive", "none"),
    "star": ("least_tokens", "worker", "star", "noisy"),
    "ares": ("least_tokens", "slo", "ares", "noisy"),
    "oracle": ("least_tokens", "slo", "oracle", "true"),
    "least_tokens_slo": ("least_tokens", "slo", "none", "none"),
    "star_slo": ("least_tokens", "slo", "star", "noisy"),
    "ares_worker": ("least_tokens", "worker", "ares", "noisy"),
}
SHARES = (0.9, 0.99)
TTFT_SLO_MS = 2000.0
# What admission leaves free for each request, upstream's default.
RESERVED_TOKENS = 512
# The SLO for TPOT, as a multiple of the step at mean load.
TPOT_SLO = 1.5

Row = dict[str, Any]


@dataclass(frozen=True)
class MeanLoad:
    """A decode worker that holds ``concurrency`` requests on average: their ``tokens``, the
    ``step_ms`` over them, and how long a request stays, ``lifetime_s``."""

    concurrency: float
    tokens: float
    step_ms: float
    lifetime_s: float

    @property
    def rate(self) -> float:
        """Requests per second and worker, by Little's law."""
        return self.concurrency / self.lifetime_s


def mean_load(lengths: RequestStream, concurrency: float, base: Profile) -> MeanLoad:
    """What ``concurrency`` requests of these prompt and output lengths amount to.

    Seen at a random moment, a request of length L is there with probability ~ L, half done.
    """
    outputs = lengths.output_tokens.astype(np.float64)
    held = lengths.prompt_tokens + outputs / 2
    tokens = concurrency * float((outputs * held).sum() / outputs.sum())
    step_ms = base.decode.ms(concurrency, tokens)
    return MeanLoad(concurrency, tokens, step_ms, float(outputs.mean()) * step_ms / 1000)


def cluster_under(
    load: MeanLoad, base: Profile, *, workers: int, kv: float, longest: int, **changes: Any
) -> SimulationConfig:
    """``workers`` decode workers with KV memory for ``kv`` times what the mean load holds and has
    reserved, and for the longest request in any case; placement and rescheduling are the arm's."""
    held = load.tokens + RESERVED_TOKENS * load.concurrency
    capacity = int(max(kv * held, 1.1 * longest))
    settings: dict[str, Any] = {
        "reserved_tokens": RESERVED_TOKENS,
        "prefill_workers": max(2, workers // 2),
        "decode_workers": workers,
        "profile": msgspec.structs.replace(base, kv_capacity_tokens=capacity),
        "ttft_slo_ms": TTFT_SLO_MS,
        "tpot_slo_ms": TPOT_SLO * load.step_ms,
    }
    return SimulationConfig(**(settings | changes))


def configured(config: SimulationConfig, arm: str) -> SimulationConfig:
    """The same cluster under an arm's policies."""
    names = ("placement", "admission", "rescheduling", "prediction")
    return replace(config, **dict(zip(names, ARMS[arm], strict=True)))


def measure(
    config: SimulationConfig,
    stream: RequestStream,
    arm: str,
    *,
    window_s: float,
    precision: float,
    near: Row | None,
) -> Row:
    """P99 TPOT at the stream's own rate, and goodput, on a lattice of rates whose neighbours differ
    by ``precision``; looked for from where ``near``, another arm's row, found its own. Requests
    arrive for ``window_s``, whatever the rate."""
    config = configured(config, arm)
    started = time.process_time()
    equal = try_rate(config, stream, stream.rate, window_s=window_s)
    start = {share: round((near or {}).get(f"exponent_{share * 100:g}") or 0) for share in SHARES}
    found = lattice_goodput(
        config, stream, step=1 + precision, start=start, known=equal, window_s=window_s
    )
    arrive = stream.arrival_s < window_s
    return {
        "arm": arm,
        "window_s": round(window_s, 1),
        "requests": int(arrive.sum()),
        "counted": int((arrive & (stream.arrival_s >= config.warmup_s)).sum()),
        "rate": round(stream.rate, 4),
        "tpot_slo_ms": round(config.tpot_slo_ms, 3),
        "tpot_p99_ms": round(equal.tpot_p99_ms, 3),
        "attainment": round(equal.attainment, 4),
        "migrations": equal.migrations,
        "moved_tokens": equal.moved_tokens,
        "retractions": equal.retractions,
        **{f"goodput_{share * 100:g}": round(found.rate[share], 4) for share in SHARES},
        **{f"exponent_{share * 100:g}": found.exponent[share] for share in SHARES},
        "top": found.top,
        "tries": found.tries + 1,
        "cpu_s": round(time.process_time() - started, 2),
    }


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that :func:`write_rows` wrote; none if there is no such file."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def write_rows(path: Path, settings: dict[str, Any], rows: list[Row]) -> None:
    """JSON with a line for each row."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"settings": {json.dumps(settings)}, "rows": [\n{lines}\n]}}\n')
