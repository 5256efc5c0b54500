"""The frozen snapshots every policy reads, and the decisions it returns.

They are msgspec structs so that the worker's report travels to the controller in the very
type a policy reads; the simulator builds the same types.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from sglang_ares.srt.security.bounds import MAX_LISTED, Count, Rid, Role, Seconds, WorkerId

PREFILL = "prefill"
DECODE = "decode"


class RequestLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One request on a worker.

    ``tokens``: resident tokens (prompt and output so far). ``output_tokens``: output so far.
    ``age_s``: seconds since this worker took it over. ``since_move_s``: seconds since its last
    move, or since it was dispatched. ``movable``: false while it waits, migrates, or uses a
    feature that cannot move.
    """

    rid: Rid
    tokens: Count
    output_tokens: Count
    age_s: Seconds
    since_move_s: Seconds
    movable: bool


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
    decode_step_ms: Seconds = 0.0
    requests: Annotated[tuple[RequestLoad, ...], msgspec.Meta(max_length=MAX_LISTED)] = ()

    @property
    def load_tokens(self) -> int:
        """Resident tokens plus those already on their way here."""
        return self.kv_tokens + self.queued_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens of KV memory neither held nor promised; never negative."""
        return max(0, self.kv_capacity - self.load_tokens)


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to place. ``sequence`` counts dispatched requests from 0."""

    prompt_tokens: int
    sequence: int


class RescheduleLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a rescheduling round may do.

    ``max_moves``: moves per round. ``threshold``: relative deviation from the mean load at
    which a worker counts as over- or underloaded. ``min_gap_tokens``: no move for less.
    ``headroom_tokens``: KV that must stay free on the target on top of the request.
    ``cooldown_s``: a moved request stays at least this long.
    """

    max_moves: int = 2
    threshold: float = 0.1
    min_gap_tokens: int = 128
    headroom_tokens: int = 256
    cooldown_s: float = 1.0


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: move request ``rid`` from worker ``source`` to worker ``target``."""

    rid: str
    source: int
    target: int
