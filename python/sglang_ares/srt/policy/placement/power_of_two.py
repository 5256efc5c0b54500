"""Power of two choices (Mitzenmacher 2001): the lighter of two workers drawn at random.

The draw is a hash of the request's sequence number, so that the policy stays a function of its
input.
"""

from __future__ import annotations

from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest

_MASK = (1 << 64) - 1


@PLACEMENT.register("power_of_two")
def power_of_two(request: NewRequest, workers: WorkerTable) -> int:
    """The one of two different workers with fewer resident and promised tokens, then fewer
    requests; the first drawn of equals."""
    count = len(workers)
    drawn = _hash(request.sequence)
    first = drawn % count
    if count == 1:
        return first
    second = (first + 1 + (drawn >> 32) % (count - 1)) % count
    load, requests = workers.load_tokens, workers.running + workers.queued
    keys = [(int(load[row]), int(requests[row])) for row in (first, second)]
    return first if keys[0] <= keys[1] else second


def _hash(number: int) -> int:
    """64 bits that look random (the finalizer of splitmix64)."""
    x = (number + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
