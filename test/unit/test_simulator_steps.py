"""The closed form against simulations that go step by step."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares.bench.workloads import RequestStream
from sglang_ares.profiles.profile import PrefillTime, Profile
from sglang_ares.simulator import Result, Simulation, SimulationConfig, decode_pool
from sglang_ares.simulator.decode_worker import IDLE, DecodeWorker
from sglang_ares.srt.policy.types import StepTime

PROFILE = Profile(
    name="small",
    hardware="none",
    model="none",
    source="made up",
    decode=StepTime(fixed_ms=5.0, per_request_ms=0.1, per_token_ms=0.004),
    prefill=PrefillTime(fixed_ms=2.0, per_token_ms=0.05, per_square_ms=1e-5),
    kv_capacity_tokens=3000,
    kv_bytes_per_token=1000,
    link_bytes_per_s=1e9,
    move_fixed_ms=8.0,
    move_pause_ms=15.0,
    transfer_fixed_ms=1.0,
    max_running=64,
    chunked_prefill_tokens=256,
)


def stream_of(seed: int, count: int, gap_s: float, output_mean: float) -> RequestStream:
    rng = np.random.default_rng(seed)
    return RequestStream(
        name="drawn",
        origin=f"seed {seed}",
        arrival_s=np.cumsum(rng.exponential(gap_s, count)),
        prompt_tokens=rng.integers(1, 600, count),
        output_tokens=np.minimum(1 + rng.geometric(1 / output_mean, count), 2000),
    )


class SteppingWorker(DecodeWorker):
    """A decode worker without closed form: an event for every step."""

    def duration(self, k: int) -> float:
        n = len(self.running)
        return sum(self._a + self._b * n + self._c * (self.tokens + n * j) for j in range(k))

    def steps_until(self, time_s: float) -> int:
        k, n, clock = 0, len(self.running), self.clock
        while n and clock < time_s:
            clock += self._a + self._b * n + self._c * (self.tokens + n * k)
            k += 1
        return k

    def advance(self, k: int) -> None:
        for _ in range(k):
            assert self.tokens + len(self.running) + self.promised <= self.capacity
            super().advance(1)

    def schedule(self) -> float:
        if super().schedule() == IDLE:
            return IDLE
        self.due = min(1, self.due)
        return self.clock + self.duration(self.due)


def simulate(config: SimulationConfig, stream: RequestStream, worker: type) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_pool, "DecodeWorker", worker)
        return Simulation(config, stream).run()


def assert_same(one: Result, other: Result) -> None:
    for name in ("prefilled_s", "first_token_s", "finished_s", "longest_gap_s"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)
    for name in ("retractions", "moves", "worker"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.counters == other.counters


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 60),
    gap_s=st.sampled_from([0.002, 0.02, 0.2]),
    output_mean=st.sampled_from([3, 40, 300]),
    capacity=st.sampled_from([2700, 4000, 10**6]),
    reserved=st.sampled_from([1, 20, 512]),
    rescheduling=st.sampled_from(["none", "reactive"]),
    per_token_ms=st.sampled_from([0.0, 0.004]),
)
def test_closed_form_is_step_by_step(
    seed: int,
    count: int,
    gap_s: float,
    output_mean: float,
    capacity: int,
    reserved: int,
    rescheduling: str,
    per_token_ms: float,
) -> None:
    """Every time, gap, move and retraction, under memory pressure and with migrations."""
    law = StepTime(fixed_ms=5.0, per_request_ms=0.1, per_token_ms=per_token_ms)
    config = SimulationConfig(
        decode_workers=3,
        placement="round_robin",
        rescheduling=rescheduling,
        reschedule_interval_s=0.05,
        cooldown_s=0.1,
        max_moves=3,
        min_gap_tokens=16,
        headroom_tokens=4,
        reserved_tokens=reserved,
        profile=msgspec.structs.replace(PROFILE, decode=law, kv_capacity_tokens=capacity),
    )
    stream = stream_of(seed, count, gap_s, output_mean)
    closed = simulate(config, stream, DecodeWorker)
    assert_same(closed, simulate(config, stream, SteppingWorker))
    ended = ~np.isnan(closed.finished_s)
    assert ended.sum() + (closed.worker < 0).sum() == count


def naive_pipeline(profile: Profile, stream: RequestStream) -> dict[str, list[float]]:
    """One prefill and one decode worker with all the memory they want, written anew: a loop over
    prefill steps, one over transfers, one over decode steps."""
    prompts, outputs = stream.prompt_tokens.tolist(), stream.output_tokens.tolist()
    arrivals = stream.arrival_s.tolist()
    done = [0] * len(prompts)
    prefilled = [math.nan] * len(prompts)
    now, law = 0.0, profile.prefill
    while min(d - p for d, p in zip(done, prompts)) < 0:
        queue = [i for i, t in enumerate(arrivals) if t <= now and done[i] < prompts[i]]
        if not queue:
            now = min(t for t, d, p in zip(arrivals, done, prompts) if d < p)
            continue
        left, ms = profile.chunked_prefill_tokens, law.fixed_ms
        stepped = []
        for i in queue:
            n = min(left, prompts[i] - done[i])
            if n == 0:
                break
            ms += law.per_token_ms * n + law.per_square_ms * ((done[i] + n) ** 2 - done[i] ** 2)
            done[i] += n
            left -= n
            stepped.append(i)
        now += ms / 1e3
        for i in stepped:
            if done[i] == prompts[i]:
                prefilled[i] = now
    landed, link = {}, 0.0
    for i in sorted(range(len(prompts)), key=lambda i: (prefilled[i], arrivals[i])):
        link = max(link, prefilled[i]) + prompts[i] / profile.link_tokens_per_s
        landed[i] = link + profile.transfer_fixed_ms / 1e3
    tokens: dict[int, list[float]] = {i: [] for i in landed}
    batch: list[int] = []
    now = 0.0
    while any(len(tokens[i]) < outputs[i] for i in landed):
        for i in sorted(landed, key=landed.__getitem__):
            if landed[i] <= now and not tokens[i]:
                tokens[i].append(now)
                batch.append(i)
        batch = [i for i in batch if len(tokens[i]) < outputs[i]]
        if not batch:
            coming = [t for i, t in landed.items() if not tokens[i]]
            if coming:
                now = max(now, min(coming))
            continue
        held = sum(prompts[i] + len(tokens[i]) for i in batch)
        now += profile.decode.ms(len(batch), held) / 1e3
        for i in batch:
            tokens[i].append(now)
    return {
        "prefilled_s": prefilled,
        "first_token_s": [tokens[i][0] for i in range(len(prompts))],
        "finished_s": [tokens[i][-1] for i in range(len(prompts))],
        "longest_gap_s": [
            max((b - a for a, b in pairwise(tokens[i])), default=0.0) for i in range(len(prompts))
        ],
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 25),
    gap_s=st.sampled_from([0.005, 0.05, 1.0]),
    output_mean=st.sampled_from([2, 30, 200]),
)
def test_one_worker_of_each_role_equals_a_naive_loop(
    seed: int, count: int, gap_s: float, output_mean: float
) -> None:
    profile = msgspec.structs.replace(PROFILE, kv_capacity_tokens=10**7)
    stream = stream_of(seed, count, gap_s, output_mean)
    result = Simulation(SimulationConfig(decode_workers=1, profile=profile), stream).run()
    for name, column in naive_pipeline(profile, stream).items():
        np.testing.assert_allclose(getattr(result, name), column, rtol=1e-9, atol=1e-9)
