"""A cluster under the predictive policy: what it learns, what it shows, and that outputs stay."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from integration.moving import generate
from integration.servers import Server, start_server, stop_server


@pytest.fixture(scope="module")
def predictive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("predictive") / "server.log"
    process, server = start_server(
        log,
        "--enable-metrics",
        "--ares-rescheduling=ares",
        "--ares-placement=predicted_load",
        "--ares-reschedule-interval=0.2",
        "--ares-report-interval=0.1",
        "--ares-move-cooldown=0.2",
        "--ares-min-gap-tokens=1",
    )
    try:
        yield server
        text = log.read_text()
        assert "rescheduling policy ares failed" not in text
        assert "impossible move" not in text
        assert "integrity check failed" not in text
    finally:
        stop_server(process)


async def test_the_policy_runs_on_what_the_cluster_learns(predictive: Server) -> None:
    """Three dozen requests of two kinds of lengths; the same ones again give the same output."""
    bodies = [
        {
            "text": f"walk {i}\n",
            "sampling_params": {
                "max_new_tokens": 500 if i % 6 == 0 else 40,
                "temperature": 0,
                "ignore_eos": True,
            },
        }
        for i in range(36)
    ]
    # Upstream's warm-up is a request too.
    seen_before = predictive.wait_until_idle()["length_prior"]["seen"]
    async with httpx.AsyncClient(base_url=predictive.url) as client:
        runs = [
            await asyncio.gather(*(generate(client, f"{run}-{i}", b) for i, b in enumerate(bodies)))
            for run in range(2)
        ]
    first, second = ([answer["text"] for answer in run] for run in runs)
    assert first == second
    status = predictive.wait_until_idle()
    assert status["rescheduling"] == "ares"
    assert status["length_prior"]["seen"] - seen_before == 72
    assert 30 < status["length_prior"]["median_output_tokens"] < 60
    assert status["move_cost"]["tokens_per_s"] > 0
    laws = [w["step"] for w in status["workers"] if w["role"] == "decode"]
    assert any(law is not None for law in laws), "no worker has learned how long its steps take"
    text = httpx.get(f"{predictive.url}/metrics", timeout=30).text
    assert "sglang_ares:length_prior_median_tokens{" in text
    assert "sglang_ares:decode_step_law_seconds{" in text
