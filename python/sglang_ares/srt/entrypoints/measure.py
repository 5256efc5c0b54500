"""Measures prefill and decode times before the server serves: a few seconds of requests of its own.

Workers learn their laws from whatever they compute (``policy/prefill_time.py``, ``step_time.py``),
so all it takes is work of several sizes, through the same path as any request. Each worker gets a
share of every size, by the cluster's own placement. What is measured is then kept on disk, and the
next start needs none of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_ares.srt.managers.probes import PROBE_RID
from sglang_ares.srt.policy.types import DECODE, PREFILL

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from sglang_ares.ares_args import AresArgs
    from sglang_ares.srt.entrypoints.front_client import FrontClient

logger = logging.getLogger(__name__)

# Prompt lengths whose prefill is measured, each so many times: the first may compile kernels.
_PROMPTS = (32, 128, 512, 2048, 8192)
_ROUNDS = 3
# Decode loads: requests a worker, and their prompts; output tokens of each.
_LOADS = ((1, 32), (4, 32), (1, 1024), (4, 256), (8, 1024))
_OUTPUT_TOKENS = 32
# No further load is begun after so long; one that is under way may take so long in all.
_BEGIN_WITHIN_S = 6.0
_END_WITHIN_S = 60.0
# Workers report within so long what they have learnt.
_TOLD_WITHIN_S = 3.0
_POLL_S = 0.1


class Load(NamedTuple):
    """Requests that are sent at once: how many, their prompt tokens, their output tokens."""

    requests: int
    prompt_tokens: int
    output_tokens: int


def loads_for(status: dict[str, Any], context_tokens: int) -> list[Load]:
    """What is sent to the workers of ``status``, in this order: prompts up to what a context and
    half a worker's KV hold, then decode loads that a worker has room for."""
    count, capacity = {PREFILL: 0, DECODE: 0}, context_tokens
    for worker in status["workers"]:
        if worker["state"] == "ready":
            count[worker["role"]] += 1
            capacity = min(capacity, worker["kv_capacity"] // 2)
    longest = min(context_tokens, capacity) - _OUTPUT_TOKENS - 1
    prompts = sorted({min(n, longest) for n in _PROMPTS if longest > 0})
    measured = [Load(count[PREFILL], n, 1) for n in prompts for _ in range(_ROUNDS)]
    for requests, prompt_tokens in _LOADS:
        if prompt_tokens <= longest and requests * (prompt_tokens + _OUTPUT_TOKENS) <= capacity:
            measured.append(Load(requests * count[DECODE], prompt_tokens, _OUTPUT_TOKENS))
    return measured


def prefill_and_decode(loads: list[Load]) -> list[Load]:
    """The loads so that whatever is left out in the end, something of either kind is measured:
    the short ones first, prompts and decode loads in turn."""
    prompts = [load for load in loads if load.output_tokens == 1]
    decodes = [load for load in loads if load.output_tokens > 1]
    each = -(-len(prompts) // max(1, len(decodes)))
    ordered = []
    for i in range(max(len(decodes), 1)):
        ordered += prompts[i * each : (i + 1) * each] + decodes[i : i + 1]
    return ordered


class Measurement:
    """``send`` runs a request to its end; ``status`` is the cluster's."""

    def __init__(
        self,
        send: Callable[[GenerateReqInput], Awaitable[None]],
        status: Callable[[], Awaitable[dict[str, Any]]],
        vocabulary: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._status = status
        self._clock = clock
        self._vocabulary = vocabulary
        # Prompts that no two runs share, or a prefix cache would compute them.
        self._random = random.Random()
        self._sent = 0

    async def run(self, loads: list[Load]) -> bool:
        """Send the loads; whether both laws are known then."""
        began = self._clock()
        for load in loads:
            if self._clock() - began > _BEGIN_WITHIN_S:
                break
            await asyncio.gather(*(self._send(self._probe(load)) for _ in range(load.requests)))
        told_until = self._clock() + _TOLD_WITHIN_S
        while not known(await self._status()):
            if self._clock() > told_until:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _probe(self, load: Load) -> GenerateReqInput:
        self._sent += 1
        ids = [self._random.randrange(self._vocabulary) for _ in range(load.prompt_tokens)]
        return GenerateReqInput(
            rid=f"{PROBE_RID}_{self._random.getrandbits(48):012x}_{self._sent}",
            input_ids=ids,
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": load.output_tokens,
                "ignore_eos": True,
            },
            log_metrics=False,
        )


def known(status: dict[str, Any]) -> bool:
    """Whether the cluster knows both laws."""
    profile = status["profile"]
    return profile["prefill"] is not None and profile["decode"] is not None


async def measure_if_needed(
    client: FrontClient, tokenizer_manager: TokenizerManager, ares_args: AresArgs
) -> None:
    """Measure if roles are elastic and nothing is known; in the server's event loop, before it
    serves. Whatever goes wrong costs the measurement, not the start."""
    if ares_args.roles == "static" or ares_args.profile_at_start == "off":
        return

    async def send(request: GenerateReqInput) -> None:
        async for _ in tokenizer_manager.generate_request(request, None):
            pass

    async def status() -> dict[str, Any]:
        document: dict[str, Any] = (await client.status())[1]
        return document

    began = time.monotonic()
    try:
        now = await status()
        if known(now):
            return
        measurement = Measurement(send, status, tokenizer_manager.model_config.vocab_size)
        loads = prefill_and_decode(loads_for(now, tokenizer_manager.context_len))
        async with asyncio.timeout(_END_WITHIN_S):
            found = await measurement.run(loads)
            await tokenizer_manager.flush_cache()
    except Exception as error:
        logger.warning(
            "prefill and decode times could not be measured at start (%s: %s); they are learnt "
            "while serving (--ares-profile-at-start off does without)",
            type(error).__name__,
            error,
        )
    else:
        took = time.monotonic() - began
        verdict = "are known" if found else "are not all known yet"
        logger.info("prefill and decode times %s after %.1f s of measuring", verdict, took)


def measure_before_serving(app: FastAPI, measure: Callable[[], Awaitable[None]]) -> None:
    """Let ``measure`` run in the server's event loop before upstream's own start-up."""
    upstreams = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        await measure()
        async with upstreams(app) as state:
            yield state

    app.router.lifespan_context = lifespan
