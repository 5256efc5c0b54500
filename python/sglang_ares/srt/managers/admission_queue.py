"""Requests that wait in the controller for a decode worker with room (``--ares-admission slo``)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang_ares.srt.managers.dispatcher import Sent
from sglang_ares.srt.policy.admission import ADMISSIONS, SLO, WORKER, next_in_turn

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster_state import ClusterState, Ownership

# More tokens than there is room for: who was tried in vain is not tried again at once.
_TRIED = 1 << 62


class AdmissionQueue:
    """In order of arrival; a request leaves it when it is sent to its workers, or ends.

    ``most_room``: tokens of the largest request that a worker has room for, None without workers;
    ``send`` sends a request's first attempt to workers with room; ``missing_role`` says why no
    worker will ever serve; ``end`` answers the client. ``unfit``: why nothing can be admitted by
    SLO here, if so. Times are monotonic seconds.
    """

    def __init__(
        self,
        state: ClusterState,
        ttft_slo_s: float,
        most_room: Callable[[], int | None],
        send: Callable[[Ownership], Sent],
        missing_role: Callable[[], str | None],
        end: Callable[[Ownership, int | None, str], None],
        unfit: str | None = None,
    ) -> None:
        self._state = state
        self._slo_s = ttft_slo_s
        self._most_room = most_room
        self._send = send
        self._missing_role = missing_role
        self._end = end
        self._unfit = unfit
        self._waiting: list[Ownership] = []
        # Of those that waited.
        self.admitted = 0
        self._changed = False
        self._looked_at = -math.inf
        self.admission = WORKER

    def __len__(self) -> int:
        return len(self._waiting)

    def use(self, admission: str) -> str | None:
        """Admit like this from now on, or why that is not possible. Those that wait stay in order,
        and go to a worker with room in any case."""
        if admission not in ADMISSIONS:
            return f"there is no admission {admission!r}; choose one of: {', '.join(ADMISSIONS)}"
        if admission == SLO and self._unfit:
            return self._unfit
        self.admission = admission
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
            # One that waits alone is simply tried.
            most = self._most_room() if len(self._waiting) > 1 else None
            at = (
                next_in_turn(arrived, tokens, most, now, self._slo_s, self.admitted)
                if most is not None
                else 0
            )
            if at is None or tokens[at] == _TRIED:
                return
            owner, waited = self._waiting[at], arrived[at] <= before
            sent = self._send(owner)
            reason = self._missing_role() if sent is Sent.NO_WORKER else None
            if sent is Sent.NO_ROOM or (sent is Sent.NO_WORKER and waited and reason is None):
                # It has to stay on this host, or the workers start anew: it waits on.
                tokens[at] = _TRIED
                continue
            if sent is Sent.NO_WORKER:
                self._state.forget(owner.rid)
                self._end(owner, 503, reason or "all workers of a role are starting anew")
            else:
                self.admitted += waited
            del self._waiting[at], arrived[at], tokens[at]
