"""Clusters for the tests of policies: by hand, drawn by hypothesis, and with moves applied."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from sglang_ares.srt.policy import placement, rescheduling  # noqa: F401  (they register)
from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.types import (
    DECODE,
    Move,
    MoveCost,
    Remaining,
    RequestLoad,
    RescheduleLimits,
    StepTime,
    WorkerLoad,
)

# Milliseconds as on a large GPU: 5 for the weights, 10 for 200,000 resident tokens.
STEP = StepTime(fixed_ms=5.0, per_request_ms=0.02, per_token_ms=5e-5)


def exactly(tokens: float) -> Remaining:
    """A remaining length that is known."""
    return (tokens, tokens, tokens, tokens)


def request(
    rid: str,
    tokens: int,
    remaining: Remaining | None = None,
    *,
    movable: bool = True,
    since_move_s: float = 100.0,
) -> RequestLoad:
    return RequestLoad(
        rid=rid,
        tokens=tokens,
        output_tokens=max(1, tokens // 2),
        age_s=100.0,
        since_move_s=since_move_s,
        movable=movable,
        remaining=remaining,
    )


def worker(
    worker_id: int,
    requests: list[RequestLoad],
    *,
    capacity: int = 1_000_000,
    extra_tokens: int = 0,
    queued_tokens: int = 0,
    step: StepTime | None = STEP,
) -> WorkerLoad:
    return WorkerLoad(
        worker_id=worker_id,
        role=DECODE,
        kv_tokens=sum(r.tokens for r in requests) + extra_tokens,
        kv_capacity=capacity,
        running=len(requests),
        queued=1 if queued_tokens else 0,
        queued_tokens=queued_tokens,
        requests=tuple(requests),
        step=step,
    )


def planned(name: str, workers: list[WorkerLoad], limits: RescheduleLimits) -> tuple[Move, ...]:
    """The moves that rescheduling policy ``name`` plans."""
    return RESCHEDULING.get(name)(Snapshot.of(workers), limits)


def after(workers: list[WorkerLoad], moves: tuple[Move, ...]) -> list[WorkerLoad]:
    """The cluster once the moves are done, nothing else having happened."""
    going = {m.rid: m.target for m in moves}
    stock = {r.rid: r for w in workers for r in w.requests}
    result = []
    for w in workers:
        stayed = [r for r in w.requests if r.rid not in going]
        came = [stock[rid] for rid, target in going.items() if target == w.worker_id]
        left = sum(r.tokens for r in w.requests if r.rid in going)
        result.append(
            msgspec.structs.replace(
                w,
                requests=tuple(stayed + came),
                running=w.running - (len(w.requests) - len(stayed)) + len(came),
                kv_tokens=w.kv_tokens - left + sum(r.tokens for r in came),
            )
        )
    return result


QUANTILES = st.one_of(
    st.none(),
    st.integers(0, 30_000).map(exactly),
    st.tuples(*[st.integers(0, 30_000)] * 4).map(sorted).map(tuple),
)
REQUESTS = st.lists(
    st.tuples(st.integers(1, 20_000), QUANTILES, st.booleans(), st.floats(0, 5)), max_size=8
)
STEPS = st.sampled_from([None, STEP, StepTime(fixed_ms=0, per_request_ms=1, per_token_ms=0)])


@st.composite
def clusters(draw: st.DrawFn, min_size: int = 0, step: StepTime | None = None) -> list[WorkerLoad]:
    """Decode workers with up to eight requests each, crowded or not, predicted or not. All have
    the law ``step``, or each a law of its own."""
    result = []
    for index in range(draw(st.integers(min_size, 6))):
        requests = [
            request(f"{index}-{i}", tokens, remaining, movable=movable, since_move_s=since)
            for i, (tokens, remaining, movable, since) in enumerate(draw(REQUESTS))
        ]
        extra, queued, spare = (draw(st.integers(0, n)) for n in (2000, 2000, 40_000))
        held = sum(r.tokens for r in requests) + extra
        result.append(
            worker(
                3 + 2 * index,
                requests,
                capacity=held + spare + 1,
                extra_tokens=extra,
                queued_tokens=queued,
                step=step or draw(STEPS),
            )
        )
    return result


LIMITS = st.builds(
    RescheduleLimits,
    max_moves=st.integers(0, 8),
    threshold=st.floats(0, 0.5),
    min_gap_tokens=st.integers(0, 500),
    headroom_tokens=st.integers(0, 300),
    reserved_tokens=st.sampled_from([0, 16, 512]),
    cooldown_s=st.floats(0, 4),
    tpot_slo_ms=st.sampled_from([0.0, 6.0, 50.0]),
    cost=st.builds(
        MoveCost,
        tokens_per_s=st.sampled_from([0.0, 100.0, 1e5]),
        fixed_s=st.floats(0, 1),
        pause_s=st.floats(0, 1),
        budget_tokens=st.sampled_from([0, 1, 5000, 50_000]),
    ),
)
