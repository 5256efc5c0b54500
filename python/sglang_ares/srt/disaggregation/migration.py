"""Vocabulary of a migration: states of both sides, allowed transitions, the record of one move.

The protocol (messages in ``managers/io_struct.py``; live copy: the request keeps decoding until
STOPPING)::

    source                                       target
    OFFERED   ── Offer ──────────────────────►   BUILDING   the request, its grammar
                                                 RESERVED   memory for tokens + headroom
              ◄── Accept | Refuse ───────────
    COPYING   ── KV pages, ChunkSent … ──────►   RECEIVING
    STOPPING     (the step under way ends)
    HANDOVER  ── last KV pages, Commit ──────►
              ◄── Committed ─────────────────    COMMITTED  it owns the request
    DONE

Whatever goes wrong, the source decides: before ``Commit`` it still owns the request and simply
goes on (CANCELLING drains the copy, then ``Cancel`` lets the target free its memory). After
``Commit`` it may take the request back only when the target has answered ``Cancelled``
(RECALLING): so at any moment exactly one of the two may emit tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

logger = logging.getLogger(__name__)


class SourceState(Enum):
    """States of the sending side; DONE and ENDED are final (moved, or stayed)."""

    OFFERED = "OFFERED"
    COPYING = "COPYING"
    STOPPING = "STOPPING"
    HANDOVER = "HANDOVER"
    CANCELLING = "CANCELLING"
    RECALLING = "RECALLING"
    DONE = "DONE"
    ENDED = "ENDED"


class TargetState(Enum):
    """States of the receiving side; COMMITTED and RELEASED are final."""

    BUILDING = "BUILDING"
    RESERVED = "RESERVED"
    RECEIVING = "RECEIVING"
    ABORTING = "ABORTING"
    COMMITTED = "COMMITTED"
    RELEASED = "RELEASED"


SOURCE_TRANSITIONS: dict[SourceState, frozenset[SourceState]] = {
    SourceState.OFFERED: frozenset(
        {SourceState.COPYING, SourceState.CANCELLING, SourceState.ENDED}
    ),
    SourceState.COPYING: frozenset({SourceState.STOPPING, SourceState.CANCELLING}),
    SourceState.STOPPING: frozenset({SourceState.HANDOVER, SourceState.CANCELLING}),
    SourceState.HANDOVER: frozenset({SourceState.DONE, SourceState.RECALLING}),
    SourceState.RECALLING: frozenset({SourceState.DONE, SourceState.ENDED}),
    SourceState.CANCELLING: frozenset({SourceState.ENDED}),
    SourceState.DONE: frozenset(),
    SourceState.ENDED: frozenset(),
}
TARGET_TRANSITIONS: dict[TargetState, frozenset[TargetState]] = {
    TargetState.BUILDING: frozenset({TargetState.RESERVED, TargetState.RELEASED}),
    TargetState.RESERVED: frozenset(
        {TargetState.RECEIVING, TargetState.ABORTING, TargetState.RELEASED}
    ),
    TargetState.RECEIVING: frozenset(
        {TargetState.COMMITTED, TargetState.ABORTING, TargetState.RELEASED}
    ),
    TargetState.ABORTING: frozenset({TargetState.RELEASED}),
    TargetState.COMMITTED: frozenset(),
    TargetState.RELEASED: frozenset(),
}
FINAL_STATES = frozenset(
    {SourceState.DONE, SourceState.ENDED, TargetState.COMMITTED, TargetState.RELEASED}
)

COMPLETED = "completed"
REFUSED = "refused"
FAILED = "failed"
CANCELLED = "cancelled"
OUTCOMES = (COMPLETED, REFUSED, FAILED, CANCELLED)


class ProtocolError(RuntimeError):
    """A transition that the protocol does not have: a bug, never a network condition."""


@dataclass(frozen=True)
class MigrationLimits:
    """``timeout_s``: longest stay in one state, in COPYING and RECEIVING without progress.
    ``headroom_tokens``: how far the request may grow while it is copied, at least.
    ``final_tokens``: hand over once at most this much is left to send. ``chunk_tokens``: most
    tokens sent in one piece. ``stopped_s``: longest that a request whose live copy ran out of room
    waits, stopped, for the piece under way.
    ``max_inbound``, ``max_outbound``: most migrations at once. ``bandwidth_mb_s``: 10^6 bytes of KV
    per second that a worker may send for migrations, 0 for any. ``memory_share``: largest share of
    the KV pool that inbound migrations may hold reserved. ``live_copy``: copy while the request
    decodes; without, it stops first (for measurements). ``kv_checksum``: send a checksum of the KV
    along.
    """

    timeout_s: float
    headroom_tokens: int = 64
    final_tokens: int = 16
    chunk_tokens: int = 2048
    stopped_s: float = 0.5
    max_inbound: int = 8
    max_outbound: int = 8
    bandwidth_mb_s: float = 0.0
    memory_share: float = 0.5
    live_copy: bool = True
    kv_checksum: bool = False


@dataclass
class Migration:
    """One move as one side sees it. Times are monotonic seconds of that side's rank 0.

    ``tokens``: what the request holds; of these, ``tokens_sent`` went over and ``tokens_saved``
    were in the target's cache already.
    """

    migration_id: int
    rid: str
    source: int
    target: int
    room: int
    started_at: float
    state: SourceState | TargetState
    deadline: float
    tokens: int = 0
    tokens_sent: int = 0
    tokens_saved: int = 0
    outcome: str = ""
    reason: str = ""
    history: list[tuple[str, float]] = field(default_factory=list)
    # Called after every transition.
    on_enter: Callable[[Migration], None] | None = None

    def enter(self, state: SourceState | TargetState, now: float, timeout_s: float) -> None:
        """Go to ``state``, log the transition and restart the clock."""
        allowed = (
            SOURCE_TRANSITIONS[self.state]
            if isinstance(self.state, SourceState)
            else TARGET_TRANSITIONS[self.state]
        )
        if state not in allowed:
            raise ProtocolError(
                f"migration {self.migration_id}: no transition {self.state.value} → {state.value}"
            )
        logger.debug(
            "migration %d rid=%s %d→%d: %s → %s at %.6f",
            self.migration_id,
            self.rid,
            self.source,
            self.target,
            self.state.value,
            state.value,
            now,
        )
        self.history.append((state.value, now))
        self.state = state
        self.extend_deadline(now, timeout_s)
        if self.on_enter is not None:
            self.on_enter(self)

    def extend_deadline(self, now: float, timeout_s: float) -> None:
        """There was progress within the state."""
        self.deadline = now + timeout_s

    @property
    def final(self) -> bool:
        """Whether this side is done with the migration."""
        return self.state in FINAL_STATES
