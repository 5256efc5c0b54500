"""Runs requests on an engine that predicts and records, moves them, and prints what it saw as JSON.

``python predicting.py HEAD RECORDINGS ENGINE_KWARGS``; a process of its own, as an engine is one.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

REQUESTS = 6
TOKENS = 260


async def run(engine: Any) -> dict[str, Any]:
    """The answers by rid, how often each was moved, and predictions of live requests."""
    moved: dict[str, int] = {}
    seen: list[dict[str, Any]] = []

    async def one(number: int) -> tuple[str, Any]:
        rid = f"p-{number}"
        sampling: dict[str, Any] = {
            "max_new_tokens": TOKENS,
            "temperature": 1.0,
            "sampling_seed": number,
            "ignore_eos": True,
        }
        if number % 2 == 0:
            sampling["custom_params"] = {"return_predicted_remaining": True}
        answer = await engine.async_generate(f"walk {10 + number}\n", sampling, rid=rid)
        return rid, answer["meta_info"]

    async def move() -> None:
        choice = random.Random(0)
        while True:
            await asyncio.sleep(0.05)
            for request in await engine.async_ares_requests():
                seen.append(request)
                target = 3 - request["worker"]  # decode workers are 1 and 2
                if choice.random() < 0.3 and moved.get(request["rid"], 0) < 3:
                    outcome = await engine.async_ares_migrate(request["rid"], target)
                    if outcome["outcome"] == "completed":
                        moved[request["rid"]] = moved.get(request["rid"], 0) + 1

    mover = asyncio.create_task(move())
    answers = dict(await asyncio.gather(*(one(i) for i in range(REQUESTS))))
    mover.cancel()
    return {"answers": answers, "moved": moved, "seen": seen}


def main() -> None:
    """Command line."""
    head, recordings, kwargs = sys.argv[1:]
    from sglang_ares import Engine

    with Engine(
        ares_decode_workers=2,
        ares_profile_cache="off",
        ares_rescheduling="none",
        ares_report_interval=0.05,
        ares_predictor=head,
        ares_predictor_record=recordings,
        ares_predictor_correction=False,
        **json.loads(kwargs),
    ) as engine:
        document = engine.loop.run_until_complete(run(engine))
    print("RESULT " + json.dumps(document, default=str))


if __name__ == "__main__":
    main()
