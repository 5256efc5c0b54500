"""What the elastic policies read: every worker, whatever its role, as columns."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from sglang_ares.srt.policy.snapshot import Bools, Floats, Ints
from sglang_ares.srt.policy.types import StepTime


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are promised: milliseconds to the first token, and per token after it."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True, eq=False)
class InstanceTable:
    """Columns of shape ``(N,)``, a row a worker.

    ``worker_id``: int64. ``decodes``: bool, its label: the pool the scheduler draws it from.
    ``prefill_tokens``, ``prefill_ms``: tokens of the requests that wait for or are in prefill
    there, and the sum of their predicted prefill times. ``decode_tokens``, ``decode_requests``:
    resident tokens and number of the requests that decode there, or are promised to.
    ``max_tokens``: the most resident tokens within the TPOT SLO (:func:`max_tokens`).
    ``token_ms``: mean time per token over the last completed interval, intervals with a KV
    transfer left out; of a worker that makes no progress, the time since its last token, so that
    it does not read as idle; 0 without decode requests. ``kv_tokens`` of ``kv_capacity`` tokens of
    KV memory are held.
    """

    worker_id: Ints
    decodes: Bools
    prefill_tokens: Ints
    prefill_ms: Floats
    decode_tokens: Ints
    decode_requests: Ints
    max_tokens: Ints
    token_ms: Floats
    kv_tokens: Ints
    kv_capacity: Ints

    def __len__(self) -> int:
        return len(self.worker_id)

    def pool(self, *, decodes: bool) -> Ints:
        """Rows of the workers with that label, ascending."""
        return np.flatnonzero(self.decodes == decodes)

    @property
    def unfinished(self) -> Bools:
        """``(N,)`` workers that still hold work of the role they left (pools P→D and D→P)."""
        return np.where(self.decodes, self.prefill_tokens > 0, self.decode_tokens > 0)

    def prefill_load(self, slo: Slo) -> float:
        """Mean over the prefill pool of predicted prefill time over the TTFT SLO."""
        rows = self.pool(decodes=False)
        return float(self.prefill_ms[rows].mean() / slo.ttft_ms) if len(rows) else 0.0

    def decode_load(self, slo: Slo) -> float:
        """Mean over the decode pool of token latency over the TPOT SLO."""
        rows = self.pool(decodes=True)
        return float(self.token_ms[rows].mean() / slo.tpot_ms) if len(rows) else 0.0


def max_tokens(step: StepTime, requests: float, slo: Slo, capacity: int) -> int:
    """Arrow's ``MT``: the most resident tokens with which a step over ``requests`` requests keeps
    within the TPOT SLO; never above the KV ``capacity``."""
    room_ms = slo.tpot_ms - step.fixed_ms - step.per_request_ms * requests
    if step.per_token_ms <= 0:
        return capacity if room_ms >= 0 else 0
    return int(min(capacity, max(0.0, room_ms / step.per_token_ms)))
