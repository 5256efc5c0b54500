"""The server's interfaces, used as clients use them, while requests move underneath."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from integration.moving import run_all
from integration.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

LONG = {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True}


class Mover(threading.Thread):
    """Moves whatever runs, back and forth, until stopped."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._ended = threading.Event()
        self.completed = 0

    def run(self) -> None:
        workers = self._server.decode_workers()
        with httpx.Client(base_url=self._server.url, timeout=60) as client:
            while not self._ended.is_set():
                for request in client.get("/ares/requests").json():
                    target = next(w for w in workers if w != request["worker"])
                    body = {"rid": request["rid"], "target": target}
                    answer = client.post("/ares/migrate", json=body)
                    self.completed += answer.json()["outcome"] == "completed"
                self._ended.wait(0.01)

    def __enter__(self) -> Mover:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join(60)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_curl(server: Server) -> None:
    """``curl`` on the endpoints a newcomer tries first."""
    for path in ("/health", "/health_generate", "/v1/models", "/server_info", "/ares/status"):
        subprocess.run(["curl", "-sf", "-o", "/dev/null", server.url + path], check=True)
    body = json.dumps({"text": "sort 9 3 5\n", "sampling_params": {"temperature": 0}})
    answer = subprocess.run(
        [
            "curl",
            "-sf",
            f"{server.url}/generate",
            "-H",
            "content-type: application/json",
            "-d",
            body,
        ],
        check=True,
        capture_output=True,
    )
    assert json.loads(answer.stdout)["meta_info"]["finish_reason"]["type"] == "stop"


def test_openai_chat_and_completions(client: openai.OpenAI) -> None:
    """The ``openai`` client, plain."""
    model = client.models.list().data[0].id
    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "count 3 9"}], max_tokens=64
    )
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None and chat.usage.completion_tokens > 0
    two = client.completions.create(
        model=model, prompt="walk 9\n", max_tokens=200, n=2, seed=5, temperature=1.0
    )
    assert len({choice.text for choice in two.choices}) == 2, "n=2 must sample twice"


def test_stream_is_whole_while_its_request_moves(server: Server, client: openai.OpenAI) -> None:
    """The chunks of a moved stream add up to the unmoved answer, none of them empty."""
    model = client.models.list().data[0].id
    options: dict[str, Any] = {
        "model": model,
        "prompt": "walk 30\n",
        "max_tokens": 600,
        "temperature": 1.0,
        "seed": 11,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**options)
    with Mover(server) as mover:
        chunks = [
            c.choices[0] for c in client.completions.create(stream=True, **options) if c.choices
        ]
    assert "".join(c.text for c in chunks) == whole.choices[0].text
    assert chunks[-1].finish_reason == "length"
    assert mover.completed >= 3


def test_a_name_may_be_used_again_at_once(server: Server) -> None:
    """What tidies up after a stream leaves the next request of that name alone."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for tokens in (1, 1500):
            started = time.monotonic()
            answer = client.post(
                "/generate",
                json={
                    "rid": "again",
                    "text": "walk 30\n",
                    "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True},
                    "stream": True,
                },
            )
            took = time.monotonic() - started
    last = json.loads(answer.text.split("data: ")[-2])["meta_info"]
    assert (last["finish_reason"]["type"], last["completion_tokens"]) == ("length", 1500)
    assert took > 2.5, "too fast for the tidying, which comes after two seconds"


def test_bench_serving_unmodified(server: Server, tmp_path: Path) -> None:
    """Upstream's ``bench_serving``: 200 requests at a finite rate, every one completed."""
    out = tmp_path / "result.json"
    host, port = server.url.removeprefix("http://").split(":")
    subprocess.run(
        [
            *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang"),
            *("--host", host, "--port", port, "--dataset-name", "random-ids"),
            *("--random-input-len", "32", "--random-output-len", "64"),
            *("--num-prompts", "200", "--request-rate", "20", "--output-file", str(out)),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert json.loads(out.read_text().splitlines()[-1])["completed"] == 200


def test_migrate_answers_what_is_wrong(server: Server) -> None:
    """404 for what does not exist, 409 for what cannot be, 400 for what cannot be read."""
    prefill = next(w["id"] for w in server.status()["workers"] if w["role"] == "prefill")
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def migrate(**body: Any) -> httpx.Response:
            return client.post("/ares/migrate", json=body)

        def running() -> dict[str, Any]:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                live = client.get("/ares/requests").json()
                found = [r for r in live if r["rid"] == "stays" and r["tokens"] > 10]
                if found:
                    request: dict[str, Any] = found[0]
                    return request
                time.sleep(0.02)
            raise AssertionError("the request never showed up")

        body = {"text": "walk 9\n", "rid": "stays", "sampling_params": {**LONG}}
        body["sampling_params"]["max_new_tokens"] = 1500  # type: ignore[index]
        thread = threading.Thread(
            target=lambda: httpx.post(f"{server.url}/generate", json=body, timeout=300)
        )
        thread.start()
        worker = running()["worker"]
        assert migrate(rid="nobody", target=worker).status_code == 404
        assert migrate(rid="stays", target=99).status_code == 404
        assert migrate(rid="stays", target=worker).status_code == 409
        assert migrate(rid="stays", target=prefill).status_code == 409
        assert migrate(rid="stays").status_code == 400
        for answer in (migrate(rid="nobody", target=1), migrate(rid="stays", target=prefill)):
            assert answer.json()["reason"]
        other = next(w for w in server.decode_workers() if w != worker)
        moved = migrate(rid="stays", target=other)
        assert moved.status_code == 200, moved.text
        assert moved.json()["tokens"] > 0 and moved.json()["kv_bytes"] > 0
        client.post("/abort_request", json={"rid": "stays"})
        thread.join(60)


def test_too_long_a_prompt_disturbs_nobody(server: Server) -> None:
    """Upstream's own 400, while another request goes on."""
    bodies: dict[str, dict[str, Any]] = {"fine": {"text": "walk 9\n", "sampling_params": LONG}}

    async def both() -> tuple[dict[str, Any], httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            too_long = client.post("/generate", json={"text": "1" * 50_000})
            (answers, _), refused = await asyncio.gather(
                run_all(server.url, bodies, at_once=1), too_long
            )
            return answers["fine"], refused

    fine, refused = asyncio.run(both())
    assert refused.status_code == 400
    assert "longer than the model's context length" in refused.text
    assert fine["meta_info"]["completion_tokens"] == 400


def test_aborts_reach_moving_requests(server: Server) -> None:
    """Clients that leave while their requests move: nothing is left behind."""

    async def leave_early() -> None:
        async with httpx.AsyncClient(base_url=server.url) as client:
            for i in range(24):
                body = {
                    "text": f"walk {i + 3}\n",
                    "stream": True,
                    "sampling_params": {**LONG, "max_new_tokens": 3000},
                }
                async with client.stream("POST", "/generate", json=body, timeout=60) as stream:
                    async for _ in stream.aiter_lines():
                        if i % 3 == 0:
                            await asyncio.sleep(0.002)
                        if _lines_seen(stream) > 5 + 7 * (i % 5):
                            break

    with Mover(server) as mover:
        asyncio.run(leave_early())
    assert mover.completed >= 3
    status = server.wait_until_idle()
    for worker in status["workers"]:
        pools = worker["pools"]
        assert pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"], worker


def _lines_seen(stream: httpx.Response) -> int:
    count = getattr(stream, "lines_seen", 0) + 1
    stream.lines_seen = count  # type: ignore[attr-defined]
    return count


def test_metrics_and_log_tell_of_migrations(server: Server) -> None:
    """Prometheus series, and one log line per migration with all it should say."""
    body = {"a": {"text": "walk 12\n", "sampling_params": LONG}}
    asyncio.run(run_all(server.url, body, at_once=1, move_on=server.decode_workers()))
    server.wait_until_idle()
    text = httpx.get(f"{server.url}/metrics").text
    completed = re.search(
        r'^sglang_ares:migrations_total\{.*outcome="completed".*\} (\S+)', text, re.M
    )
    assert completed is not None and float(completed[1]) >= 3
    for series in ("migration_seconds_count", "migration_blackout_seconds_count"):
        found = re.search(rf"^sglang_ares:{series}\{{.*\}} (\S+)", text, re.M)
        assert found is not None and float(found[1]) >= 3, series
    for series in ("migrated_kv_bytes_total", "worker_kv_tokens", "dispatched_requests_total"):
        assert f"sglang_ares:{series}" in text
    lines = [
        x for x in server.log.read_text().splitlines() if "migration" in x and "rid=a#00 " in x
    ]
    wanted = (
        r"migration \d+ rid=a#00 from=\d to=\d tokens=\d+ sent=\d+ saved=\d+ bytes=\d+ "
        r"ms=\d+\.\d outcome=completed"
    )
    assert any(re.search(wanted, line) for line in lines), lines


def test_loads_list_every_worker(server: Server) -> None:
    """``/v1/loads`` keeps upstream's meaning, with one entry per worker."""
    loads = httpx.get(f"{server.url}/v1/loads").json()["loads"]
    assert len(loads) == len(server.status()["workers"])


def test_stream_is_in_order_behind_a_slow_detokenizer(server: Server) -> None:
    """While the detokenizer lags, tokens of the new worker reach it before the old one's."""
    family = psutil.Process(server.pid).children(recursive=True)
    detokenizer = next(p for p in family if "detokenizer" in " ".join(p.cmdline()))
    bodies = {
        f"lag-{i}": {
            "text": f"walk {5 + i}\n",
            "sampling_params": {
                **LONG,
                "max_new_tokens": 1500,
                "temperature": 1.0,
                "sampling_seed": i,
            },
        }
        for i in range(8)
    }
    unmoved, _ = asyncio.run(
        run_all(server.url, {f"{r}-ref": b for r, b in bodies.items()}, at_once=8)
    )
    ended = threading.Event()

    def stutter() -> None:
        while not ended.wait(0.2):
            detokenizer.suspend()
            time.sleep(0.4)
            detokenizer.resume()

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        moved, log = asyncio.run(
            run_all(server.url, bodies, at_once=8, move_on=server.decode_workers(), moves_wanted=20)
        )
    finally:
        ended.set()
        thread.join()
        detokenizer.resume()
    assert log.outcomes["completed"] >= 16
    for rid, answer in moved.items():
        assert answer["output_ids"] == unmoved[f"{rid}-ref"]["output_ids"], rid
        assert answer["text"] == unmoved[f"{rid}-ref"]["text"], rid


def test_control_requests_reach_every_worker_and_leave_nothing(server: Server) -> None:
    """Health probes under load, and a weight update, as an orchestrator sends them."""

    async def probe_under_load() -> None:
        body = {"load": {"text": "walk 9\n", "sampling_params": {**LONG, "max_new_tokens": 1500}}}
        running = asyncio.create_task(run_all(server.url, body, at_once=1))
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            while not running.done():
                assert (await client.get("/health_generate")).status_code == 200
                await asyncio.sleep(0.05)
        await running

    asyncio.run(probe_under_load())
    status = server.wait_until_idle()
    assert all(w["queued"] == 0 and w["queued_tokens"] == 0 for w in status["workers"]), status
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["root"]
    updated = httpx.post(
        f"{server.url}/update_weights_from_disk", json={"model_path": model}, timeout=120
    )
    assert updated.status_code == 200 and updated.json()["success"], updated.text
    assert httpx.get(f"{server.url}/health_generate", timeout=60).status_code == 200
