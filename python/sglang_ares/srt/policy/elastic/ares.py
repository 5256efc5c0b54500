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
    """How busy so many workers will be with prefill: the larger of the work that arrives, as a
    share of what they can do, and of the wait of a prompt that arrives at the horizon, as a share
    of the TTFT SLO."""
    if workers <= 0:
        return math.inf
    horizon_s = moment.rules.horizon_s
    arriving_ms = moment.demand.prefill_work_ms(horizon_s) / workers
    backlog_ms = float(moment.instances.prefill_ms.sum()) / workers
    wait_ms = backlog_ms + arriving_ms - 1000 * horizon_s
    return max(arriving_ms / (1000 * horizon_s), wait_ms / moment.slo.ttft_ms)


def resident_tokens(moment: Moment) -> float:
    """KV expected to be taken by decoding at the horizon, what is reserved per request included:
    what is resident now, and its trend.

    (Arrivals times the mean output would be a forecast too. But outputs are known of requests that
    have ended, so that it is wrong for as long as an output takes, just when the mix changes.)
    """
    instances, demand, rules = moment.instances, moment.demand, moment.rules
    tokens = float(instances.decode_tokens.sum())
    reserved = rules.reserved_tokens * float(instances.decode_requests.sum())
    later = max(0.0, tokens + demand.resident_trend * rules.horizon_s)
    return later + reserved * (later / tokens if tokens > 0 else 1.0)


def decode_load(moment: Moment, tokens: float, workers: float) -> float:
    """``tokens`` as a share of what so many mean workers may hold within the TPOT SLO."""
    capacity = workers * float(moment.instances.max_tokens.mean())
    return tokens / capacity if capacity > 0 else math.inf


class Split:
    """The worse of the two forecast loads, for every number of prefill workers."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment
        self._tokens = resident_tokens(moment)
        self._total = len(moment.instances)
        self.prefills = len(moment.instances.pool(decodes=False))

    def worse(self, prefills: float, lost: float = 0.0, *, to_decode: bool = True) -> float:
        """With so many prefill workers, while a flip costs ``lost`` workers of the new role."""
        prefill = prefill_load(self._moment, prefills - (0.0 if to_decode else lost))
        decodes = self._total - prefills - (lost if to_decode else 0.0)
        return max(prefill, decode_load(self._moment, self._tokens, decodes))

    @property
    def best(self) -> int:
        """The number of prefill workers with the smallest worse load, the nearest of equals."""
        return min(range(1, self._total), key=lambda n: (self.worse(n), abs(n - self.prefills)))

    def saved(self, row: int, *, to_decode: bool) -> float:
        """What the flip of worker ``row`` lowers the worse load by, its cost considered."""
        instances, rules = self._moment.instances, self._moment.rules
        busy_s = (
            instances.prefill_ms[row] / 1000
            if to_decode
            else rules.cost.seconds(float(instances.decode_tokens[row]))
        )
        after = self.prefills + (-1 if to_decode else 1)
        lost = min(1.0, busy_s / rules.horizon_s)
        return self.worse(self.prefills) - self.worse(after, lost, to_decode=to_decode)


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
    split = Split(moment)
    current, best = split.worse(split.prefills), split.best
    row = None
    if best != split.prefills and current > rules.act:
        to_decode = best < split.prefills
        row = flip_candidate(moment, to_decode=to_decode)
    if row is None or (not to_decode and not has_room_without(moment, row)):
        return None, msgspec.structs.replace(memory, held_passes=0)
    saved = split.saved(row, to_decode=to_decode)
    if saved < rules.gain * current:
        return None, msgspec.structs.replace(memory, held_passes=0)
    held = memory.held_passes + 1
    if held < rules.sustained and current < rules.expand:
        return None, msgspec.structs.replace(memory, held_passes=held)
    after = split.prefills + (-1 if to_decode else 1)
    reason = (
        f"within {rules.horizon_s:g} s the worse load falls from {current:.2f} to "
        f"{current - saved:.2f} with {after} prefill workers"
    )
    return Flip(row, to_decode, reason), flipped(memory, moment.now, to_decode=to_decode)


def assign_prefill(prompt_ms: float, moment: Moment) -> Assignment:
    """The prefill worker that will be done first; one flipped from decode if that is too late,
    the others have room, and the split would be better for it."""
    instances = moment.instances
    rows = instances.pool(decodes=False)
    row = int(rows[instances.prefill_ms[rows].argmin()])
    if instances.prefill_ms[row] + prompt_ms > moment.slo.ttft_ms:
        candidate = flip_candidate(moment, to_decode=False)
        if candidate is not None and has_room_without(moment, candidate):
            split = Split(moment)
            if split.saved(candidate, to_decode=False) > moment.rules.gain * split.worse(
                split.prefills
            ):
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
