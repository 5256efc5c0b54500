"""What workers report about themselves, what a policy is told besides, and what it decides.

The reports are msgspec structs because they travel from worker to controller; policies read them
as columns (:mod:`sglang_ares.srt.policy.snapshot`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.security.bounds import (
    MAX_LISTED,
    Count,
    Milliseconds,
    PredictedTokens,
    Rid,
    Role,
    Seconds,
    WorkerId,
)

PREFILL = "prefill"
DECODE = "decode"

# Quantiles at which a remaining length is predicted.
LEVELS = (0.25, 0.5, 0.75, 0.9)
# Tokens still to be produced, at LEVELS; ascending.
Remaining = tuple[PredictedTokens, PredictedTokens, PredictedTokens, PredictedTokens]


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """The law of one worker's decode steps: a step over ``n`` requests with ``t`` resident tokens
    takes ``fixed_ms + per_request_ms * n + per_token_ms * t`` milliseconds."""

    fixed_ms: Milliseconds
    per_request_ms: Milliseconds
    per_token_ms: Milliseconds

    def ms(self, requests: float, tokens: float) -> float:
        """Milliseconds of one step."""
        return self.fixed_ms + self.per_request_ms * requests + self.per_token_ms * tokens


class RequestLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One request on a worker.

    ``tokens``: resident tokens (prompt and output so far). ``output_tokens``: output so far.
    ``age_s``: seconds since this worker took it over. ``since_move_s``: seconds since its last
    move, or since it was dispatched. ``movable``: false while it waits, migrates, or uses a
    feature that cannot move. ``remaining``: quantiles of the tokens it will still produce, at
    :data:`LEVELS`; None where nobody predicts.
    """

    rid: Rid
    tokens: Count
    output_tokens: Count
    age_s: Seconds
    since_move_s: Seconds
    movable: bool
    remaining: Remaining | None = None


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One worker.

    ``kv_tokens`` of ``kv_capacity`` tokens are held by requests (the evictable part of the
    prefix cache does not count). ``queued``: requests not yet running. ``queued_tokens``:
    their tokens, as far as they hold no KV yet. ``decode_step_ms``: mean duration of its last
    decode steps (0: unknown).
    """

    worker_id: WorkerId
    role: Role
    kv_tokens: Count
    kv_capacity: Count
    running: Count
    queued: Count
    queued_tokens: Count
    decode_step_ms: Milliseconds = 0.0
    step: StepTime | None = None
    requests: Annotated[tuple[RequestLoad, ...], msgspec.Meta(max_length=MAX_LISTED)] = ()

    @property
    def load_tokens(self) -> int:
        """Resident tokens plus those already on their way here."""
        return self.kv_tokens + self.queued_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens of KV memory neither held nor promised; never negative."""
        return max(0, self.kv_capacity - self.load_tokens)

    @property
    def remaining_tokens(self) -> float:
        """Sum of the requests' median predicted remaining lengths, as far as there are any."""
        return sum(r.remaining[1] for r in self.requests if r.remaining is not None)


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to place. ``sequence`` counts dispatched requests from 0. ``remaining``: what is
    predicted for it, at :data:`LEVELS`, if anything is."""

    prompt_tokens: int
    sequence: int
    remaining: Remaining | None = None


class MoveCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a migration takes.

    ``tokens_per_s``: tokens of KV one migration copies per second (0: unlimited). ``fixed_s``:
    seconds any migration takes besides copying. ``pause_s``: seconds the moved request produces
    nothing. ``budget_tokens``: most tokens that the moves of one round may copy (0: unlimited).
    """

    tokens_per_s: float = 0.0
    fixed_s: float = 0.05
    pause_s: float = 0.03
    budget_tokens: int = 0

    def seconds(self, tokens: float) -> float:
        """Seconds to move a request of ``tokens`` tokens."""
        return self.fixed_s + (tokens / self.tokens_per_s if self.tokens_per_s > 0 else 0.0)

    def seconds_of(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """The same of many requests, shape ``(R,)``."""
        per_token = 1 / self.tokens_per_s if self.tokens_per_s > 0 else 0.0
        return np.asarray(self.fixed_s + tokens * per_token, np.float64)


class RescheduleLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a rescheduling round may do.

    ``max_moves``: moves per round. ``threshold``: relative deviation from the mean load at
    which a worker counts as over- or underloaded. ``min_gap_tokens``: no move for less.
    ``headroom_tokens``: KV that must stay free on the target on top of the request.
    ``reserved_tokens``: KV that a worker keeps free for each of its requests, running or queued,
    before it lets in another one, moved or new (upstream's ``--num-reserved-decode-tokens``).
    ``cooldown_s``: a moved request stays at least this long. ``interval_s``: seconds to the next
    round. ``tpot_slo_ms``: the time per output token that requests are promised (0: none).
    ``cost``: what a migration takes. ``closed``: ids of workers that no request may be moved to.
    """

    max_moves: int = 2
    threshold: float = 0.1
    min_gap_tokens: int = 128
    headroom_tokens: int = 256
    reserved_tokens: int = 0
    cooldown_s: float = 1.0
    interval_s: float = 1.0
    tpot_slo_ms: float = 0.0
    cost: MoveCost = MoveCost()
    closed: frozenset[int] = frozenset()

    def may_take(self, worker_id: NDArray[np.int64]) -> NDArray[np.bool_]:
        """``(W,)`` which of these workers requests may be moved to."""
        return ~np.isin(worker_id, list(self.closed))


def moves_per_round(decode_workers: int, most: int = 0) -> int:
    """``most``, or without one what suits so many decode workers."""
    return most or max(2, decode_workers // 2)


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: move request ``rid`` from worker ``source`` to worker ``target``."""

    rid: str
    source: int
    target: int
