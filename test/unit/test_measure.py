"""Measuring at start: what is sent, when it stops, and that it cannot harm the start."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ares.ares_args import AresArgs
from sglang_ares.srt.entrypoints.measure import (
    Load,
    Measurement,
    loads_for,
    measure_before_serving,
    measure_if_needed,
    prefill_and_decode,
)
from sglang_ares.srt.managers.attempts import internal_rid
from sglang_ares.srt.managers.output_streamer import has_come_to_its_end
from sglang_ares.srt.managers.probes import is_probe

LAW = {"fixed_ms": 1.0}
ELASTIC = AresArgs(roles="ares", ttft_slo_ms=1000.0, tpot_slo_ms=50.0)


def status(
    prefill: int = 2, decode: int = 3, capacity: int = 100_000, *, known: bool = False
) -> Any:
    workers = [
        {"role": role, "state": "ready", "kv_capacity": capacity}
        for role in ["prefill"] * prefill + ["decode"] * decode
    ]
    law = LAW if known else None
    return {"workers": workers, "profile": {"prefill": law, "decode": law}}


def test_every_worker_gets_its_share() -> None:
    loads = loads_for(status(), 32_768)
    assert {load.requests for load in loads if load.output_tokens == 1} == {2}
    assert {load.requests for load in loads if load.output_tokens > 1} == {3, 12, 24}
    assert {load.prompt_tokens for load in loads if load.output_tokens == 1} == {
        32, 128, 512, 2048, 8192
    }  # fmt: skip


@pytest.mark.parametrize("context,capacity", [(600, 100_000), (32_768, 1200), (64, 64), (20, 20)])
def test_nothing_is_sent_that_does_not_fit(context: int, capacity: int) -> None:
    for load in loads_for(status(capacity=capacity), context):
        tokens = load.prompt_tokens + load.output_tokens
        assert load.prompt_tokens > 0 and tokens < context
        if load.output_tokens > 1:
            assert load.requests // 3 * tokens <= capacity // 2


def test_both_kinds_come_early_the_short_ones_first() -> None:
    loads = loads_for(status(), 32_768)
    ordered = prefill_and_decode(loads)
    assert sorted(ordered) == sorted(loads)
    assert {load.output_tokens > 1 for load in ordered[:4]} == {True, False}
    prompts = [load.prompt_tokens for load in ordered if load.output_tokens == 1]
    assert prompts == sorted(prompts)


class Cluster:
    """Requests take ``seconds`` each of a clock of the test's; laws are known after ``enough``."""

    def __init__(self, seconds: float, enough: int) -> None:
        self.now, self.seconds, self.enough = 0.0, seconds, enough
        self.sent: list[Any] = []

    async def send(self, request: Any) -> None:
        self.sent.append(request)
        self.now += self.seconds

    async def status(self) -> Any:
        self.now += 0.5
        return status(known=len(self.sent) >= self.enough)

    def run(self, loads: list[Load]) -> bool:
        measurement = Measurement(self.send, self.status, 50, lambda: self.now)
        return asyncio.run(measurement.run(loads))


def test_the_requests_are_told_from_users() -> None:
    cluster = Cluster(0.01, 3)
    assert cluster.run([Load(2, 8, 1), Load(1, 5, 32)])
    assert [len(r.input_ids) for r in cluster.sent] == [8, 8, 5]
    assert all(0 <= i < 50 for r in cluster.sent for i in r.input_ids)
    assert len({r.rid for r in cluster.sent}) == 3
    assert cluster.sent[0].input_ids != cluster.sent[1].input_ids
    for request in cluster.sent:
        assert not request.log_metrics and is_probe(internal_rid(request.rid, 0))
    assert not is_probe("walk-1#00")


def test_a_slow_server_is_not_kept_waiting() -> None:
    cluster = Cluster(4.0, 1)
    assert cluster.run([Load(1, 8, 1)] * 10)
    assert len(cluster.sent) == 2, "none is begun after six seconds"


def test_it_gives_up_when_nothing_is_learnt() -> None:
    cluster = Cluster(0.01, 99)
    assert not cluster.run([Load(1, 8, 1)])
    assert cluster.now < 6


def test_a_probe_teaches_no_lengths() -> None:
    ended = SimpleNamespace(
        rid="ARES_PROBE_1#00", finished=lambda: True, finished_output=False, finished_reason=None
    )
    assert not has_come_to_its_end(ended)
    ended.rid = "r#00"
    assert has_come_to_its_end(ended)


# --- at start -------------------------------------------------------------------------------


class Front:
    """The tokenizer manager and the client of the controller."""

    def __init__(self, *, known: bool, fail: bool = False) -> None:
        self.model_config, self.context_len = SimpleNamespace(vocab_size=50), 4096
        self.known, self.fail = known, fail
        self.sent = self.asked = self.flushed = 0

    async def generate_request(self, request: Any, http: Any) -> Any:
        if self.fail:
            raise ValueError("no worker")
        self.sent += 1
        self.known = True
        yield {}

    async def flush_cache(self) -> None:
        self.flushed += 1

    async def status(self) -> Any:
        self.asked += 1
        return 200, status(known=self.known)


def measured(front: Any, args: AresArgs = ELASTIC) -> Any:
    asyncio.run(measure_if_needed(front, front, args))
    return front


def test_it_measures_and_leaves_no_prompts_in_the_cache() -> None:
    front = measured(Front(known=False))
    assert front.sent > 20 and front.flushed == 1


def test_what_is_known_is_not_measured() -> None:
    assert not measured(Front(known=True)).sent


@pytest.mark.parametrize(
    "args",
    [AresArgs(ttft_slo_ms=1000.0), AresArgs(**{**vars(ELASTIC), "profile_at_start": "off"})],
)
def test_fixed_roles_and_the_flag_do_without(args: AresArgs) -> None:
    front = measured(Front(known=False), args)
    assert not front.sent and not front.asked


def test_a_failure_does_not_keep_the_server_from_starting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    measured(Front(known=False, fail=True))
    assert "no worker" in caplog.text and "--ares-profile-at-start" in caplog.text


def test_it_comes_before_the_servers_own_start() -> None:
    from contextlib import asynccontextmanager

    from fastapi import FastAPI

    order: list[str] = []

    @asynccontextmanager
    async def upstreams(app: FastAPI) -> Any:
        order.append("start")
        yield
        order.append("end")

    async def measure() -> None:
        order.append("measure")

    async def life() -> None:
        app = FastAPI(lifespan=upstreams)
        measure_before_serving(app, measure)
        async with app.router.lifespan_context(app):
            order.append("serve")

    asyncio.run(life())
    assert order == ["measure", "start", "serve", "end"]
