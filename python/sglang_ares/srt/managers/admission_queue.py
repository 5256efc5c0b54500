"""Requests that wait in the controller for a decode worker with room (``--ares-admission slo``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from sglang_ares.srt.managers.dispatcher import Sent
from sglang_ares.srt.policy.admission import (
    ADMISSIONS,
    SLO,
    WORKER,
    Turn,
    kept_for_oldest,
    next_in_turn,
)

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.cluster_views import Ownership
    from sglang_ares.srt.policy.snapshot import Ints

# More tokens than there is room for: who was tried in vain is not tried again at once.
_TRIED = 1 << 62


class AdmissionQueue:
    """In order of arrival; a request leaves it when it is sent to its workers, or ends.

    ``rooms``: ids of the decode workers and the tokens each has room for, None without workers;
    ``send`` sends a request's first attempt, to one of these decode workers if some are given;
    ``missing_role`` says why no worker will ever serve; ``end`` answers the client. ``unfit``: why
    nothing can be admitted by SLO here, if so. Times are monotonic seconds.
    """

    def __init__(
        self,
        state: ClusterState,
        ttft_slo_s: float,
        rooms: Callable[[], tuple[Ints, Ints] | None],
        send: Callable[[Ownership, Collection[int] | None], Sent],
        missing_role: Callable[[], str | None],
        end: Callable[[Ownership, int | None, str], None],
        unfit: str | None = None,
    ) -> None:
        self._state = state
        self._slo_s = ttft_slo_s
        self._rooms = rooms
        self._send = send
        self._missing_role = missing_role
        self._end = end
        self._unfit = unfit
        self._waiting: list[Ownership] = []
        # Requests let in that had waited, or passed others that wait; without those that went
        # elsewhere while a worker was kept for the oldest.
        self.admitted = 0
        self._changed = False
        self._looked_at = -math.inf
        self.admission = WORKER

    def __len__(self) -> int:
        return len(self._waiting)

    def use(self, admission: str) -> str | None:
        """Admit like this from now on, or why that is not possible. Those that wait for room go to
        the workers in order if it is to be waited there."""
        if admission not in ADMISSIONS:
            return f"there is no admission {admission!r}; choose one of: {', '.join(ADMISSIONS)}"
        if admission == SLO and self._unfit:
            return self._unfit
        self.admission = admission
        self._changed = True
        return None

    def arrive(self, owner: Ownership) -> None:
        """A request is to wait its turn; :meth:`let_in` follows."""
        self._waiting.append(owner)
        self._state.note_waiting(owner)
        self._changed = True

    def remove(self, owner: Ownership) -> None:
        """The client of a waiting request has left."""
        self._waiting.remove(owner)
        self._state.forget(owner.rid)
        self._changed = True

    def cluster_changed(self) -> None:
        """A worker has reported, came or went."""
        self._changed = True

    def let_in(self, now: float) -> None:
        """Send whoever's turn it is while there is room, if anything has changed since."""
        if not self._changed:
            return
        self._changed = False
        before, self._looked_at = self._looked_at, now
        arrived = [owner.dispatched_at for owner in self._waiting]
        tokens = [len(owner.request.input_ids or ()) for owner in self._waiting]
        while self._waiting:
            rooms = self._rooms()
            if rooms is None:
                self._turn_away(since=before)
                return
            at, among, counts = 0, None, True
            if self.admission == SLO:
                turn = self._next(arrived, tokens, rooms, now)
                if turn is None:
                    return
                at, counts, among = turn.request, turn.counts, set(rooms[0][turn.rows].tolist())
            owner = self._waiting[at]
            sent = self._send(owner, among)
            if sent is Sent.NOT_AMONG:
                tokens[at] = _TRIED
                continue
            if sent is Sent.NO_WORKER:
                self._refuse(owner, "no worker of the server's own host takes requests")
            elif counts and (at or arrived[at] <= before):
                # It had waited itself, or has passed one that waits.
                self.admitted += 1
            del self._waiting[at], arrived[at], tokens[at]
        self._state.kept = None

    def _next(
        self, arrived: list[float], tokens: list[int], rooms: tuple[Ints, Ints], now: float
    ) -> Turn | None:
        """Whose turn it is. The worker that is kept for the oldest, if one is, is noted: it is not
        to be moved full meanwhile."""
        ids, free = rooms[0].tolist(), rooms[1]
        # One that found no room though there is some has to stay on this host.
        turns = 0 if tokens[0] == _TRIED else self.admitted
        kept = ids.index(self._state.kept) if self._state.kept in ids else None
        kept = kept_for_oldest(arrived, tokens, free, now, self._slo_s, turns, kept)
        self._state.kept = None if kept is None else ids[kept]
        return next_in_turn(arrived, tokens, free, now, self._slo_s, turns, kept)

    def _turn_away(self, since: float) -> None:
        """No worker of a role takes requests. Those that came after ``since`` are told so; those
        that waited before wait until there is one again, unless there will be none."""
        reason = self._missing_role()
        away = [o for o in self._waiting if reason is not None or o.dispatched_at > since]
        for owner in away:
            self._waiting.remove(owner)
            self._refuse(owner, reason or "all workers of a role are starting anew")

    def _refuse(self, owner: Ownership, reason: str) -> None:
        self._state.forget(owner.rid)
        self._end(owner, 503, reason)
