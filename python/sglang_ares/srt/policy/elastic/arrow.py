"""Arrow (arXiv 2505.11916) as published: costs, Algorithms 1 to 3.

Where the paper leaves a value open (thresholds, cooldown, interval) :class:`FlipRules` has ours.
"""

from __future__ import annotations

import msgspec
import numpy as np

from sglang_ares.srt.policy.elastic.decisions import (
    REQUEST_SCHEDULING,
    ROLES,
    Assignment,
    Flip,
    FlipMemory,
    Moment,
    RequestScheduling,
)
from sglang_ares.srt.policy.snapshot import Bools, Floats, Ints


def cheapest(rows: Ints, first: Ints | Floats | Bools, second: Ints | Floats) -> int:
    """The row of ``rows`` with the smallest pair of costs, compared in order; ties go to the
    lowest row. ``first``, ``second``: ``(N,)``."""
    return int(rows[np.lexsort((second[rows], first[rows]))[0]])


def flip_candidate(moment: Moment, *, to_decode: bool) -> int | None:
    """Algorithm 3: the worker that changes its label most cheaply, if one may.

    The pool it leaves keeps at least one worker. The cooldown holds from prefill to decode only.
    First one whose earlier flip is unfinished (it still has work of the role it returns to), then
    the one with the least resident work.
    """
    instances = moment.instances
    rows = instances.pool(decodes=not to_decode)
    if len(rows) < 2:
        return None
    if to_decode and moment.now - moment.memory.last_to_decode_s < moment.rules.cooldown_s:
        return None
    work = instances.prefill_ms if to_decode else instances.decode_tokens
    return cheapest(rows, ~instances.unfinished, work)


def assign_prefill(prompt_ms: float, moment: Moment) -> Assignment:
    """Algorithm 1 for the prefill phase: the cheapest that meets the TTFT SLO; else one flipped
    from decode, while decode load is low; else the cheapest."""
    instances, slo = moment.instances, moment.slo
    rows = instances.pool(decodes=False)
    total_ms = instances.prefill_ms + prompt_ms
    meets = rows[total_ms[rows] <= slo.ttft_ms]
    if len(meets):
        return Assignment(cheapest(meets, instances.decode_tokens, total_ms))
    if instances.decode_load(slo) <= moment.rules.shrink:
        row = flip_candidate(moment, to_decode=False)
        if row is not None:
            return Assignment(row, flip=True)
    return Assignment(cheapest(rows, instances.decode_tokens, total_ms))


def assign_decode(tokens: int, prefill_row: int, moment: Moment) -> Assignment:
    """Algorithm 1 for the decode phase: where its prompt was computed, if that worker decodes by
    now (no transfer); else the cheapest that meets the TPOT SLO; else one flipped from prefill;
    else the cheapest."""
    instances = moment.instances
    if instances.decodes[prefill_row]:
        return Assignment(prefill_row)
    rows = instances.pool(decodes=True)
    excess = instances.decode_tokens + tokens - instances.max_tokens
    meets = rows[excess[rows] <= 0]
    if len(meets):
        return Assignment(cheapest(meets, instances.prefill_tokens, excess))
    row = flip_candidate(moment, to_decode=True)
    if row is not None:
        return Assignment(row, flip=True)
    return Assignment(cheapest(rows, instances.prefill_tokens, excess))


@ROLES.register("arrow")
def plan_roles(moment: Moment) -> tuple[Flip | None, FlipMemory]:
    """Algorithm 2: flips from prefill to decode when, sustained, decode load is at ``expand`` or
    above, or prefill load at ``shrink`` or below and not above decode load."""
    rules, memory = moment.rules, moment.memory
    decode = moment.instances.decode_load(moment.slo)
    prefill = moment.instances.prefill_load(moment.slo)
    if decode >= rules.expand:
        reason = f"decode load {decode:.2f} is at or above {rules.expand:g}"
    elif prefill <= rules.shrink <= decode:
        reason = f"prefill load {prefill:.2f} <= {rules.shrink:g} <= decode load {decode:.2f}"
    else:
        return None, msgspec.structs.replace(memory, held_passes=0)
    held = memory.held_passes + 1
    memory = msgspec.structs.replace(memory, held_passes=held)
    if held < rules.sustained:
        return None, memory
    row = flip_candidate(moment, to_decode=True)
    if row is None:
        return None, memory
    return Flip(row, True, reason), flipped(memory, moment.now, to_decode=True)


def flipped(memory: FlipMemory, now: float, *, to_decode: bool) -> FlipMemory:
    """What to remember after a flip at ``now``, whichever rule ordered it."""
    return FlipMemory(
        held_passes=0,
        last_to_decode_s=now if to_decode else memory.last_to_decode_s,
        last_flip_s=now,
    )


REQUEST_SCHEDULING.register("arrow")(RequestScheduling(assign_prefill, assign_decode))
