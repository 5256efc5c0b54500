"""Ours: the split that the next seconds will need, reached by emptying decode workers.

Every pass forecasts both loads as ratios to their SLO for every possible split of the workers, and
flips one worker towards the split whose worse load is smallest, if that saves enough. A worker
that leaves decode is emptied by live migration, so its flip costs the copying, not the longest
output it holds; that cost counts against the gain, and without room on the others there is none.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from sglang_ares.srt.policy.elastic.arrow import flip_candidate, flipped
from sglang_ares.srt.policy.elastic.decisions import (
    REQUEST_SCHEDULING,
    ROLES,
    Assignment,
    Flip,
    FlipMemory,
    Moment,
    RequestScheduling,
)


def prefill_load(moment: Moment, workers: float) -> float:
    """Prefill work that must be done in time, as a share of what so many workers can do: the
    backlog and what arrives within the horizon, against the horizon and one TTFT SLO after it."""
    if workers <= 0:
        return math.inf
    horizon_s = moment.rules.horizon_s
    work_ms = float(moment.instances.prefill_ms.sum()) + moment.demand.prefill_work_ms(horizon_s)
    return work_ms / (workers * (1000 * horizon_s + moment.slo.ttft_ms))


def resident_tokens(moment: Moment) -> float:
    """Tokens expected to be resident for decoding at the horizon.

    A request stays ``τ = output tokens × time per token``: what is resident now decays by
    ``exp(-H/τ)``, what arrives approaches arrivals × τ × its mean size (prompt and half its
    output). Prompts that wait for prefill are on their way.
    """
    instances, demand, horizon_s = moment.instances, moment.demand, moment.rules.horizon_s
    now = float(instances.decode_tokens.sum() + instances.prefill_tokens.sum())
    busy = instances.token_ms[instances.token_ms > 0]
    token_s = (float(busy.mean()) if len(busy) else moment.slo.tpot_ms) / 1000
    stay_s = demand.output_tokens * token_s
    if stay_s <= 0:
        return now
    kept = math.exp(-horizon_s / stay_s)
    per_s = demand.requests(horizon_s) / horizon_s
    arriving = per_s * stay_s * (demand.prompt_tokens + demand.output_tokens / 2)
    return now * kept + arriving * (1 - kept)


def decode_load(moment: Moment, tokens: float, workers: float) -> float:
    """``tokens`` as a share of what so many mean workers may hold within the TPOT SLO."""
    capacity = workers * float(moment.instances.max_tokens.mean())
    return tokens / capacity if capacity > 0 else math.inf


def has_room_without(moment: Moment, row: int) -> bool:
    """Whether the other decode workers can take what row ``row`` holds."""
    instances = moment.instances
    others = instances.pool(decodes=True)
    others = others[others != row]
    free = instances.kv_capacity[others] - instances.kv_tokens[others]
    room = np.maximum(0, free - moment.rules.headroom_tokens).sum()
    return bool(room >= instances.decode_tokens[row])


@ROLES.register("ares")
def plan_roles(moment: Moment) -> tuple[Flip | None, FlipMemory]:
    """One flip towards the split whose worse forecast load is smallest."""
    instances, rules, memory = moment.instances, moment.rules, moment.memory
    total = len(instances)
    if total < 3:
        return None, memory
    tokens = resident_tokens(moment)
    prefills = len(instances.pool(decodes=False))

    def worse(workers: int, lost: float = 0.0, *, to_decode: bool = True) -> float:
        """The worse load with so many prefill workers, while the flip costs ``lost`` workers."""
        prefill = prefill_load(moment, workers - (0.0 if to_decode else lost))
        decode = decode_load(moment, tokens, total - workers - (lost if to_decode else 0.0))
        return max(prefill, decode)

    current = worse(prefills)
    best = min(range(1, total), key=lambda n: (worse(n), abs(n - prefills)))
    row = None
    if best != prefills and current > rules.shrink:
        to_decode = best < prefills
        row = flip_candidate(moment, to_decode=to_decode)
    if row is None or (not to_decode and not has_room_without(moment, row)):
        return None, msgspec.structs.replace(memory, held_passes=0)
    after = prefills + (-1 if to_decode else 1)
    busy_s = (
        instances.prefill_ms[row] / 1000
        if to_decode
        else rules.cost.seconds(float(instances.decode_tokens[row]))
    )
    saved = current - worse(after, min(1.0, busy_s / rules.horizon_s), to_decode=to_decode)
    if saved < rules.gain * current:
        return None, msgspec.structs.replace(memory, held_passes=0)
    held = memory.held_passes + 1
    if held < rules.sustained and current < rules.expand:
        return None, msgspec.structs.replace(memory, held_passes=held)
    reason = (
        f"within {rules.horizon_s:g} s the worse load falls from {current:.2f} to "
        f"{current - saved:.2f} with {after} prefill workers"
    )
    return Flip(row, to_decode, reason), flipped(memory, moment.now, to_decode=to_decode)


def assign_prefill(prompt_ms: float, moment: Moment) -> Assignment:
    """The prefill worker that will be done first; one flipped from decode if that is too late,
    decode load is low, and the others have room."""
    instances = moment.instances
    rows = instances.pool(decodes=False)
    row = int(rows[instances.prefill_ms[rows].argmin()])
    late = instances.prefill_ms[row] + prompt_ms > moment.slo.ttft_ms
    if late and instances.decode_load(moment.slo) <= moment.rules.shrink:
        candidate = flip_candidate(moment, to_decode=False)
        if candidate is not None and has_room_without(moment, candidate):
            return Assignment(candidate, flip=True)
    return Assignment(row)


def assign_decode(tokens: int, prefill_row: int, moment: Moment) -> Assignment:
    """Where its prompt was computed, if that worker decodes by now; else the decode worker that
    is the smallest share of its ``max_tokens`` full, one without room for it last."""
    instances = moment.instances
    if instances.decodes[prefill_row]:
        return Assignment(prefill_row)
    rows = instances.pool(decodes=True)
    full = (instances.decode_tokens[rows] + tokens) / np.maximum(1, instances.max_tokens[rows])
    no_room = instances.kv_capacity[rows] - instances.kv_tokens[rows] < tokens
    return Assignment(int(rows[np.lexsort((full, no_room))[0]]))


REQUEST_SCHEDULING.register("ares")(RequestScheduling(assign_prefill, assign_decode))
