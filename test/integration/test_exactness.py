"""Moved requests answer exactly as unmoved ones: tokens, text, log-probabilities, usage.

A third of the requests, with shorter outputs, by default; all 275 with ``--full`` (``make
test-exactness``).
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from integration.moving import run_all
from integration.servers import Server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

MOVES_EACH = 3
LOGPROB_TOLERANCE = 1e-4
AT_ONCE = 8

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 60},
        "values": {"type": "array", "items": {"type": "integer"}},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "values", "ok"],
    "additionalProperties": False,
}
# Family name -> (share of the requests, sampling parameters, other fields).
FAMILIES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "greedy": (60, {"temperature": 0}, {}),
    "seeded": (60, {"temperature": 1.0}, {}),
    "top_p_top_k_min_p": (20, {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.02}, {}),
    "frequency_penalty": (20, {"temperature": 0.8, "frequency_penalty": 0.5}, {}),
    "presence_repetition": (
        15,
        {"temperature": 0.8, "presence_penalty": 0.4, "repetition_penalty": 1.15},
        {},
    ),
    "greedy_penalties": (
        10,
        {"temperature": 0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
        {},
    ),
    "min_new_tokens": (10, {"temperature": 1.0, "min_new_tokens": 0}, {}),
    "stop_string": (15, {"temperature": 1.0, "stop": ["77 7 7", "0 0 0 0"]}, {}),
    "stop_token_ids": (
        10,
        {"temperature": 1.0, "stop_token_ids": [61], "logit_bias": {"2": -100}},
        {},
    ),
    "logit_bias": (10, {"temperature": 0.9, "logit_bias": {"35": 1.5}}, {}),
    "logprobs": (
        15,
        {"temperature": 0.7},
        {"return_logprob": True, "top_logprobs_num": 3, "token_ids_logprob": [35, 56]},
    ),
    "prompt_logprobs": (
        5,
        {"temperature": 0},
        {"return_logprob": True, "logprob_start_len": 0},
    ),
    "n_2": (10, {"temperature": 1.0, "n": 2}, {}),
    "json_schema": (15, {"temperature": 1.0, "json_schema": ""}, {}),
}


@dataclass(frozen=True)
class Size:
    """``share``: of each family's requests; ``tokens``: least output of those that do not end by
    themselves, which must leave time for the moves; ``min_new_tokens`` and ``min_items`` keep the
    families of these names going; ``moved``: share that must have been moved often enough."""

    share: float
    tokens: int
    min_new_tokens: int
    min_items: int
    moved: float

    def fill(self, params: dict[str, Any]) -> None:
        """What depends on the size in the sampling parameters."""
        if "min_new_tokens" in params:
            params["min_new_tokens"] = self.min_new_tokens
        if "json_schema" in params:
            values = {**_SCHEMA["properties"]["values"], "minItems": self.min_items}
            properties = {**_SCHEMA["properties"], "values": values}
            params["json_schema"] = json.dumps({**_SCHEMA, "properties": properties})


FULL = Size(share=1.0, tokens=800, min_new_tokens=700, min_items=120, moved=200 / 275)
SHORT = Size(share=1 / 3, tokens=360, min_new_tokens=300, min_items=60, moved=0.7)


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> Size:
    return FULL if request.config.getoption("--full") else SHORT


def bodies(size: Size) -> dict[str, dict[str, Any]]:
    """The requests of all families, by rid."""
    requests: dict[str, dict[str, Any]] = {}
    for family, (count, sampling, fields) in FAMILIES.items():
        for i in range(math.ceil(size.share * count)):
            params = {
                "max_new_tokens": size.tokens + 13 * (i % 8),
                "sampling_seed": 1000 + i,
                # Stop conditions and grammars end a request by themselves.
                "ignore_eos": family not in ("stop_string", "stop_token_ids", "json_schema"),
                **sampling,
            }
            size.fill(params)
            requests[f"{family}-{i}"] = {
                "text": f"walk {5 + i % 20}\n",
                "sampling_params": params,
                **fields,
            }
    return requests


def flat(answer: Any) -> list[dict[str, Any]]:
    """``n > 1`` answers with a list."""
    return answer if isinstance(answer, list) else [answer]


def logprob_values(meta: dict[str, Any]) -> list[float]:
    """All log-probabilities of an answer, in order."""
    given = [*(meta.get("input_token_logprobs") or []), *meta.get("output_token_logprobs", [])]
    values = [p[0] for p in given if p[0] is not None]
    for key in ("output_top_logprobs", "output_token_ids_logprobs"):
        values += [p[0] for row in meta.get(key) or [] for p in row or []]
    return values


@pytest.fixture(scope="module")
def runs(server: Server, size: Size) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Answers without moves, answers with moves, and the log of moves."""
    requests = bodies(size)
    unmoved, _ = asyncio.run(
        run_all(server.url, {f"{r}-ref": b for r, b in requests.items()}, at_once=AT_ONCE)
    )
    moved, log = asyncio.run(
        run_all(
            server.url,
            requests,
            at_once=AT_ONCE,
            move_on=server.decode_workers(),
            moves_wanted=MOVES_EACH,
        )
    )
    return {r.removesuffix("-ref"): a for r, a in unmoved.items()}, moved, log


def test_every_request_was_moved_often_enough(runs: Any, size: Size) -> None:
    """Requests that lived long enough were moved at least three times each."""
    _, moved, log = runs
    short = [
        rid
        for rid, answer in moved.items()
        if "n_2" not in rid
        and log.completed[rid] < MOVES_EACH
        and answer["meta_info"]["completion_tokens"] >= size.tokens
    ]
    thrice = sum(1 for moves in log.completed.values() if moves >= MOVES_EACH)
    assert thrice >= size.moved * len(moved), (thrice, log.outcomes, log.reasons, short)
    assert not log.outcomes["failed"], log.outcomes


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_equals_unmoved(runs: Any, family: str) -> None:
    """Tokens, text, finish reason and usage are equal, log-probabilities within 1e-4."""
    unmoved, moved, log = runs
    moves = 0
    for rid in (r for r in moved if r.rsplit("-", 1)[0] == family):
        moves += log.completed[rid]
        for a, b in zip(flat(unmoved[rid]), flat(moved[rid]), strict=True):
            assert b["output_ids"] == a["output_ids"], rid
            assert b["text"] == a["text"], rid
            for key in ("finish_reason", "prompt_tokens", "completion_tokens"):
                assert b["meta_info"][key] == a["meta_info"][key], (rid, key)
            before, after = logprob_values(a["meta_info"]), logprob_values(b["meta_info"])
            assert len(before) == len(after), rid
            worst = max((abs(x - y) for x, y in zip(before, after, strict=True)), default=0.0)
            assert worst <= LOGPROB_TOLERANCE, (rid, worst)
    if family == "n_2":  # its samples have rids of their own
        moves = sum(n for rid, n in log.completed.items() if rid not in moved)
    assert moves > 0, f"no request of {family} was moved: nothing was tested"


def test_accounting_balances_when_idle(server: Server, runs: Any) -> None:
    """Free KV tokens, request slots and metadata slots are what they were at start."""
    status = server.wait_until_idle()
    for worker in status["workers"]:
        pools = worker["pools"]
        assert pools["kv_free"] + pools["kv_cached"] == worker["kv_capacity"], worker
        assert pools["requests"] == 0, worker
        if worker["role"] == "decode":
            assert pools["metadata_slots_free"] == 2 * pools["request_slots_free"], worker
        assert worker["migrations_in"] == worker["migrations_out"] == 0, worker
