"""Vocabulary of a migration: states of both sides, allowed transitions, the record of one move.

The protocol (messages in ``managers/io_struct.py``; live copy: the request keeps decoding until
STOPPING)::

    source                                       target
    OFFERED   ── Offer ──────────────────────►   BUILDING   the request, its grammar
                                                 RESERVED   memory for tokens + headroom
              ◄── Accept | Refuse ───────────
    COPYING   ── KV pages ───────────────────►   RECEIVING
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
    """``timeout_s``: longest stay in one state. ``headroom_tokens``: how far the request may
    grow while it is copied. ``final_tokens``: hand over once at most this much is left to send.
    ``kv_checksum``: send a checksum of the KV along.
    """

    timeout_s: float
    headroom_tokens: int = 64
    final_tokens: int = 16
    max_inbound: int = 8
    kv_checksum: bool = False


@dataclass
class Migration:
    """One move as one side sees it. Times are that side's monotonic seconds."""

    migration_id: int
    rid: str
    source: int
    target: int
    room: int
    started_at: float
    state: SourceState | TargetState
    deadline: float
    tokens: int = 0
    outcome: str = ""
    reason: str = ""
    history: list[str] = field(default_factory=list)

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
            "migration %d rid=%s %d→%d: %s → %s",
            self.migration_id,
            self.rid,
            self.source,
            self.target,
            self.state.value,
            state.value,
        )
        self.history.append(state.value)
        self.state = state
        self.deadline = now + timeout_s

    @property
    def final(self) -> bool:
        """Whether this side is done with the migration."""
        return self.state in FINAL_STATES
