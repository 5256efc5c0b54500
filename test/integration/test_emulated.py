"""An emulated cluster: one prefill and three decode workers without a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from statistics import median
from typing import Any

import httpx
import msgspec
import pytest

from integration.moving import run_all
from integration.servers import Server, start_server, stop_server
from sglang_ares.profiles.profile import PrefillTime, Profile
from sglang_ares.srt.policy.types import StepTime

# Steps long enough for two cores that others use too.
PROFILE = Profile(
    name="test",
    hardware="none",
    model="none",
    source="made up for tests",
    decode=StepTime(fixed_ms=40, per_request_ms=4, per_token_ms=0.004),
    prefill=PrefillTime(fixed_ms=20, per_token_ms=0.2, per_square_ms=0.0),
    kv_capacity_tokens=50_000,
    kv_bytes_per_token=1000,
    link_bytes_per_s=1e9,
    move_fixed_ms=0,
    move_pause_ms=0,
    transfer_fixed_ms=0,
    max_running=64,
    chunked_prefill_tokens=2048,
)
# Shared machines stall: a step may take this much longer than its law, and hardly less.
SLOWER, FASTER = 1.25, 0.98


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("emulated")
    path = folder / "profile.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    process, server = start_server(
        folder / "server.log",
        f"--ares-emulate={path}",
        "--ares-decode-workers=3",
        "--ares-placement=round_robin",
        "--ares-rescheduling=none",
        "--ares-report-interval=0.1",
        "--log-level=info",
    )
    try:
        yield server
        text = server.log.read_text()
        assert "integrity check failed" not in text
    finally:
        stop_server(process)


def body(prompt: int, output: int, seed: int) -> dict[str, Any]:
    return {
        "input_ids": [64 + (seed + i * i) % 64 for i in range(prompt)],
        "sampling_params": {"temperature": 0, "max_new_tokens": output, "ignore_eos": True},
    }


def test_the_server_says_that_it_is_emulated(emulated: Server) -> None:
    """Status and log; the models it lists are those it would list otherwise."""
    status = emulated.status()
    assert status["emulated"].endswith("profile.json")
    assert status["time_dilation"] == 1
    assert {w["kv_capacity"] for w in status["workers"]} == {50_000}
    assert "EMULATED: no model runs" in emulated.log.read_text()
    models = httpx.get(f"{emulated.url}/v1/models", timeout=30).json()
    assert models["data"][0]["id"].endswith("weights")


@pytest.mark.parametrize("batch, prompt", [(1, 40), (9, 200)])
def test_steps_take_what_the_profile_says(emulated: Server, batch: int, prompt: int) -> None:
    """A third of the requests on each worker; the median of the workers' reports counts."""

    async def go() -> list[float]:
        reported: list[float] = []
        async with httpx.AsyncClient(base_url=emulated.url, timeout=120) as client:
            ended = asyncio.gather(
                *(client.post("/generate", json=body(prompt, 100, i)) for i in range(batch))
            )
            while not ended.done():
                workers = (await client.get("/ares/status")).json()["workers"]
                full = [w for w in workers if w["role"] == "decode" and w["running"]]
                reported += [
                    w["decode_step_ms"]
                    for w in full
                    if w["decode_step_ms"] and w["running"] == -(-batch // 3)
                ]
                await asyncio.sleep(0.1)
            for answer in await ended:
                assert answer.status_code == 200
        return reported

    measured = median(asyncio.run(go()))
    each = -(-batch // 3)
    law = PROFILE.decode.ms(each, each * (prompt + 50))
    assert FASTER * law - 0.5 <= measured <= SLOWER * law, (measured, law)


def test_prefill_takes_what_the_profile_says(emulated: Server) -> None:
    """Long prompts against short ones: the difference is the law's, whatever the rest takes."""

    def ttft_ms(prompt: int) -> float:
        answers = [
            httpx.post(
                f"{emulated.url}/generate", json=body(prompt, 1, 31 * prompt + i), timeout=60
            )
            for i in range(5)
        ]
        return median(1e3 * a.json()["meta_info"]["e2e_latency"] for a in answers)

    difference = ttft_ms(2000) - ttft_ms(100)
    law = PROFILE.prefill.ms(2000) - PROFILE.prefill.ms(100)
    assert 0.9 * law <= difference <= 1.5 * law, (difference, law)


def test_moved_answers_are_equal_and_of_the_length_that_was_asked_for(emulated: Server) -> None:
    bodies = {f"emulated-{i}": body(30 + 17 * i, 60 + 9 * i, i) for i in range(12)}
    plain, _ = asyncio.run(run_all(emulated.url, bodies, at_once=12))
    moved, log = asyncio.run(
        run_all(
            emulated.url,
            {f"{rid}-moved": b for rid, b in bodies.items()},
            at_once=12,
            move_on=emulated.decode_workers(),
        )
    )
    assert sum(log.completed.values()) >= 12, log
    for rid, wanted in bodies.items():
        expected, found = plain[rid], moved[f"{rid}-moved"]
        assert len(expected["output_ids"]) == wanted["sampling_params"]["max_new_tokens"]
        assert found["output_ids"] == expected["output_ids"]
        assert found["text"] == expected["text"]
    assert len({tuple(a["output_ids"][:20]) for a in plain.values()}) == len(bodies)
    emulated.wait_until_idle()


def test_what_only_a_model_has_is_refused(emulated: Server) -> None:
    answer = httpx.post(
        f"{emulated.url}/generate", json={**body(5, 5, 0), "return_logprob": True}, timeout=30
    )
    assert answer.status_code == 400
    assert "--ares-emulate" in answer.text


def test_policies_change_while_it_serves(emulated: Server) -> None:
    def use(**policies: str) -> httpx.Response:
        return httpx.post(f"{emulated.url}/ares/policy", json=policies, timeout=30)

    assert use(placement="least_tokens", rescheduling="reactive").status_code == 200
    status = emulated.status()
    assert (status["placement"], status["rescheduling"]) == ("least_tokens", "reactive")
    assert use(rescheduling="nobodys").status_code == 400
    assert use(placement="round_robin", rescheduling="none").status_code == 200
