"""Seeded workloads: what is asked, with which seed, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkItem:
    """One request: it arrives ``arrival_s`` seconds after the replay starts. ``input_ids``: the
    prompt as tokens, in place of the text."""

    rid: str
    arrival_s: float
    prompt: str = ""
    sampling_params: dict[str, Any] = field(default_factory=dict)
    input_ids: list[int] = field(default_factory=list)


def poisson_workload(
    prompts: Sequence[str],
    *,
    rate: float,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[WorkItem]:
    """One request per prompt, in order, as a Poisson process; the same for the same arguments.

    Every request carries a ``sampling_seed`` of its own, so that its answer depends neither on
    when it runs nor on what runs beside it.

    Args:
        rate: mean arrivals per second.
        max_new_tokens: longest answer, in tokens.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate}; it must be above 0 requests per second")
    rng = random.Random(seed)
    arrival_s = 0.0
    items = []
    for index, prompt in enumerate(prompts):
        items.append(
            WorkItem(
                rid=f"request-{index:04d}",
                arrival_s=arrival_s,
                prompt=prompt,
                sampling_params={
                    "temperature": temperature,
                    "max_new_tokens": max_new_tokens,
                    "sampling_seed": rng.randrange(2**31),
                },
            )
        )
        arrival_s += rng.expovariate(rate)
    return items
