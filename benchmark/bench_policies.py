"""How long the policies take to plan: ``python -m pytest benchmark/bench_policies.py``.

A plan for 256 workers with 64 running requests each should take at most 20 ms, one for 1,024
workers at most 100 ms, on one core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sglang_ares.srt.policy import placement, rescheduling  # noqa: F401  (they register)
from sglang_ares.srt.policy.length_prior import LengthPrior
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING
from sglang_ares.srt.policy.snapshot import RequestTable, Snapshot, WorkerTable
from sglang_ares.srt.policy.types import LEVELS, NewRequest, RescheduleLimits

REQUESTS = 64
# Moves per round: as many as an eighth of the workers.
SHARE = 8


def cluster(workers: int, seed: int = 0) -> Snapshot:
    """Lognormal lengths and predictions; every worker has a tenth of its memory left or more."""
    rng = np.random.default_rng(seed)
    count = workers * REQUESTS
    where = np.sort(rng.integers(0, workers, count))
    tokens = rng.lognormal(8, 1, count).astype(np.int64) + 1
    held = np.bincount(where, tokens, workers).astype(np.int64)
    median = rng.lognormal(8, 1, count)
    return Snapshot(
        WorkerTable(
            worker_id=np.arange(workers),
            kv_tokens=held,
            kv_capacity=np.full(workers, int(held.max() * 1.1)),
            running=np.bincount(where, minlength=workers),
            queued=np.zeros(workers, np.int64),
            queued_tokens=np.zeros(workers, np.int64),
            remaining_tokens=np.bincount(where, median, workers),
            step_ms=np.tile([5.0, 0.02, 5e-5], (workers, 1)),
        ),
        RequestTable(
            rids=[str(i) for i in range(count)],
            worker=where,
            tokens=tokens,
            output_tokens=tokens // 2,
            remaining=median[:, None] * np.exp(np.linspace(-1, 1.5, len(LEVELS))),
            since_move_s=np.full(count, 100.0),
            movable=np.ones(count, np.bool_),
        ),
    )


@pytest.mark.parametrize("workers", [8, 256, 1024])
@pytest.mark.parametrize("name", [n for n in RESCHEDULING.names() if n != "none"])
def test_bench_rescheduling(benchmark: Any, name: str, workers: int) -> None:
    """One round; the snapshot is new each time, as its cached columns are part of the work."""
    limits = RescheduleLimits(max_moves=max(2, workers // SHARE))
    policy, fresh = RESCHEDULING.get(name), cluster(workers)
    moves = benchmark.pedantic(
        policy,
        setup=lambda: ((Snapshot(fresh.workers, fresh.requests), limits), {}),
        rounds=10,
        warmup_rounds=2,
    )
    benchmark.extra_info["moves"] = len(moves)
    assert moves


@pytest.mark.parametrize("name", PLACEMENT.names())
def test_bench_placement(benchmark: Any, name: str) -> None:
    """One request among 1,024 workers."""
    workers = cluster(1024).workers
    benchmark(PLACEMENT.get(name), NewRequest(prompt_tokens=100, sequence=7), workers)


def test_bench_length_prior(benchmark: Any) -> None:
    """Quantiles for 65,536 running requests."""
    prior = LengthPrior()
    lengths = np.random.default_rng(0).lognormal(7, 1, 1000).astype(int)
    for length in lengths.tolist():
        prior.observe(length)
    benchmark(prior.remaining, np.resize(lengths, 65_536))
