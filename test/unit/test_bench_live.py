"""The live client's requests, its stretched time, and SLOs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest
from aiohttp import web

from sglang_ares.bench.live import LiveError, LiveServer, contracted, replay_live, work_items
from sglang_ares.bench.replay import LoadSample, RequestResult, Run
from sglang_ares.bench.slo import Slo
from sglang_ares.bench.workloads import RequestStream
from sglang_ares.srt.security.control_plane import free_ports


def stream(**fields: object) -> RequestStream:
    columns = {
        "arrival_s": np.array([0.0, 0.5, 2.0]),
        "prompt_tokens": np.array([5, 1, 1200]),
        "output_tokens": np.array([7, 1, 30]),
    }
    return RequestStream(**{"name": "s", "origin": "o", **columns, **fields})  # type: ignore[arg-type]


def test_requests_have_exact_lengths_and_are_the_same_for_the_same_seed() -> None:
    items = work_items(stream(), seed=3)
    assert [len(i.input_ids) for i in items] == [5, 1, 1200]
    assert [i.sampling_params["max_new_tokens"] for i in items] == [7, 1, 30]
    assert all(i.sampling_params["ignore_eos"] for i in items)
    assert [i.arrival_s for i in items] == [0.0, 0.5, 2.0]
    assert items == work_items(stream(), seed=3)
    assert items[0].input_ids != work_items(stream(), seed=4)[0].input_ids
    assert items[0].input_ids != work_items(stream(), seed=3, name="again")[0].input_ids


def test_equal_blocks_are_equal_prefixes() -> None:
    blocks = ((1, 2), (1, 3), (1, 2, 9))
    lengths = np.array([12, 12, 1200])
    items = work_items(stream(prefix_blocks=blocks, block_tokens=5, prompt_tokens=lengths), seed=0)
    first, second, third = (i.input_ids for i in items)
    assert [len(first), len(second), len(third)] == [12, 12, 1200]
    assert first[:5] == second[:5] == third[:5]
    assert first[5:10] == third[5:10] != second[5:10]
    assert first[10:] != third[10:12]


def test_times_are_contracted_and_counts_are_not() -> None:
    run = Run(
        results=[RequestResult("r", 2.0, 4.0, 10.0, 1.0, [1, 2, 3, 4], "length")],
        samples=[LoadSample(8.0, {1: 5}, 2)],
        duration_s=12.0,
    )
    short = contracted(run, 4)
    result = short.results[0]
    assert (result.sent_s, result.ttft_s, result.tpot_s) == (0.5, 0.5, 0.5)
    assert result.longest_gap_s == 0.25
    assert short.samples == [LoadSample(2.0, {1: 5}, 2)]
    assert short.duration_s == 3


def result(ttft_s: float, tpot_s: float, tokens: int = 11, error: str = "") -> RequestResult:
    last = ttft_s + tpot_s * (tokens - 1)
    return RequestResult("r", 0.0, ttft_s, last, 0.0, [1] * tokens, "length", error)


def test_an_slo_is_met_by_both_times_or_not_at_all() -> None:
    slo = Slo(ttft_ms=1000, tpot_ms=50)
    assert slo.met_by(result(0.9, 0.04))
    assert not slo.met_by(result(1.1, 0.04))
    assert not slo.met_by(result(0.9, 0.06))
    assert slo.met_by(result(0.9, 9.0, tokens=1))
    assert not slo.met_by(result(0.9, 0.04, error="gone"))
    assert not slo.met_by(RequestResult("r"))


def test_attainment_is_a_share_of_what_came_after_the_warm_up() -> None:
    run = Run(results=[result(0.5, 0.04), result(0.5, 0.09)])
    run.results[0].sent_s = 0.0
    run.results[1].sent_s = 10.0
    slo = Slo(1000, 50)
    run.results[1].first_token_s += 10
    run.results[1].last_token_s += 10
    assert slo.attainment(run) == 0.5
    assert slo.attainment(run, warmup_s=5) == 0
    assert slo.attainment(run, warmup_s=50) == 1


# --- against a server that answers as SGLang does --------------------------------------------


class Imitation:
    """``/generate`` and ``/ares/status``; whether pieces repeat what came before them."""

    def __init__(self, *, incremental: bool) -> None:
        self._incremental = incremental
        self.aborted: list[str] = []
        self.policies = [{"placement": "p", "admission": "a", "rescheduling": "r"}]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["rid"].endswith("-1"):
            return web.json_response({"error": {"message": "too long"}}, status=400)
        answer = web.StreamResponse()
        await answer.prepare(request)
        total = body["sampling_params"]["max_new_tokens"]
        every = body["sampling_params"]["stream_interval"]
        sent = 0
        for end in [*range(1, total, every), total]:
            ids = list(range(sent if self._incremental else 0, end))
            sent = end
            done = {"type": "length"} if end == total else None
            piece = {
                "output_ids": ids,
                "meta_info": {"completion_tokens": end, "finish_reason": done},
            }
            await answer.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        return answer

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"workers": [], "migrations": {"completed": 0}, **self.policies[-1]}
        )

    async def policy(self, request: web.Request) -> web.Response:
        self.policies.append(await request.json())
        return web.json_response({})

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/ares/status", self.status)
        app.router.add_post("/abort_request", self.abort)
        app.router.add_post("/ares/policy", self.policy)
        runner = web.AppRunner(app)
        await runner.setup()
        port = free_ports(1)[0]
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{port}"
        await runner.cleanup()


@pytest.mark.parametrize("incremental", [False, True])
def test_every_token_is_counted_once(incremental: bool) -> None:
    async def go() -> None:
        imitation = Imitation(incremental=incremental)
        async for url in imitation.serve():
            async with LiveServer(url, stream_interval=4) as server:
                run = await replay_live(server, work_items(stream(), seed=0), dilation=0.1)
        first, second, third = run.results
        assert first.token_ids == list(range(7))
        assert third.token_ids == list(range(30))
        assert third.sent_s == pytest.approx(2.0, abs=1.0)
        assert "too long" in second.error
        assert imitation.aborted == [second.rid]

    asyncio.run(go())


def test_an_answer_that_is_no_200_is_an_error_with_its_text() -> None:
    async def go() -> None:
        async for url in Imitation(incremental=True).serve():
            async with LiveServer(url) as server:
                with pytest.raises(LiveError, match="404"):
                    await server.post("/nowhere", {})

    asyncio.run(go())


def test_policies_are_put_back_even_after_an_error() -> None:
    async def fail(server: LiveServer) -> None:
        async with server.policies_kept() as status:
            assert status["workers"] == []
            await server.use_policies("other", "none", "slo")
            raise ZeroDivisionError

    async def go() -> None:
        imitation = Imitation(incremental=True)
        async for url in imitation.serve():
            async with LiveServer(url) as server:
                with pytest.raises(ZeroDivisionError):
                    await fail(server)
        kept, changed, last = imitation.policies
        assert kept == last != changed

    asyncio.run(go())
