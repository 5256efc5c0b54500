"""What the elastic policies decide, the rules they keep to, and how they are found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from sglang_ares.srt.policy.elastic.forecast import Demand
from sglang_ares.srt.policy.elastic.instances import InstanceTable, Slo
from sglang_ares.srt.policy.registry import Registry
from sglang_ares.srt.policy.types import MoveCost


class FlipRules(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and thresholds of role changes.

    ``expand``: decode load (a ratio to the SLO) at which the decode pool grows. ``shrink``:
    prefill load below which the prefill pool may give a worker away, and decode load below which
    the decode pool may. ``sustained``: consecutive passes a condition must hold. ``cooldown_s``:
    no change from prefill to decode this soon after the last one. ``horizon_s``: how far ahead
    ours looks. ``act``: the forecast load above which ours changes the split. ``gain``: how much
    of the worse of the two loads a flip must save, for ours. ``cost``: what moving requests off a
    worker takes. ``headroom_tokens``: KV that must stay free on the others. ``reserved_tokens``:
    KV that decode workers keep free for every request they admit (upstream's
    ``num_reserved_decode_tokens``).
    """

    expand: float = 1.0
    shrink: float = 0.5
    sustained: int = 3
    cooldown_s: float = 10.0
    horizon_s: float = 10.0
    act: float = 0.8
    gain: float = 0.1
    cost: MoveCost = MoveCost()
    headroom_tokens: int = 1024
    reserved_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.shrink < self.expand:
            raise ValueError(
                f"shrink is {self.shrink} and expand {self.expand}: thresholds that meet make "
                "workers flap; shrink must be the smaller one and not negative."
            )


class FlipMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a role planner remembers from pass to pass: the passes its condition has held, and
    when (seconds) a worker last changed, from prefill to decode and at all."""

    held_passes: int = 0
    last_to_decode_s: float = float("-inf")
    last_flip_s: float = float("-inf")


class Assignment(msgspec.Struct, frozen=True):
    """Row ``row`` takes the phase of the request; ``flip``: it changes its label first."""

    row: int
    flip: bool = False


class Flip(msgspec.Struct, frozen=True):
    """Row ``row`` changes its label to decode (``to_decode``) or prefill, because of ``reason``."""

    row: int
    to_decode: bool
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Moment:
    """All that an elastic policy is told. ``now``: seconds, on any clock that only rises.
    ``sequence`` counts scheduled requests from 0."""

    instances: InstanceTable
    slo: Slo
    rules: FlipRules = field(default_factory=FlipRules)
    memory: FlipMemory = field(default_factory=FlipMemory)
    demand: Demand = field(default_factory=Demand)
    now: float = 0.0
    sequence: int = 0


@dataclass(frozen=True)
class RequestScheduling:
    """Where a request's phases run.

    ``prefill(prompt_ms, moment)``: ``prompt_ms`` is the predicted prefill time.
    ``decode(tokens, prefill_row, moment)``: ``tokens`` are resident once it decodes,
    ``prefill_row`` computed its prompt.
    """

    prefill: Callable[[float, Moment], Assignment]
    decode: Callable[[int, int, Moment], Assignment]


# At most one flip, and what to remember.
RolePlanner = Callable[[Moment], tuple[Flip | None, FlipMemory]]

REQUEST_SCHEDULING: Registry[RequestScheduling] = Registry("request scheduling")
ROLES: Registry[RolePlanner] = Registry("role planning")
