"""Recovery of requests from workers that died, and of requests whose KV did not come through.

One way for all of them, in the controller's process::

    a worker died                      a worker reports a failed request
      │ PeerDied to all the others       │
      │ … their acknowledgements         │
      └──────────────┬───────────────────┘
         the requests it may have owned
                     │ the old attempt is void: Discard where it may still live,
                     │ FenceRequests to the token ledger
                     ▼
         Fenced: the tokens that went towards the client
                     │ none: a new dispatch   some: Resume, prefill recomputes
                     ▼
         the next attempt runs

The acknowledgements matter for requests that were being moved: whatever a survivor has to say
about who owns a request (``Adopted``, ``MigrationResult``, ``RequestFailed``) arrives before.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sglang_ares.srt.disaggregation.refusals import REQUEST, first_refusal
from sglang_ares.srt.managers.cluster_views import READY
from sglang_ares.srt.managers.io_struct import Discard, FenceRequests, PeerDied

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.cluster_views import Ownership
    from sglang_ares.srt.managers.io_struct import EmittedTokens, Fenced, Message

logger = logging.getLogger(__name__)


class RecoveryHost(Protocol):
    """What recovery asks of the controller."""

    def tell(self, worker_id: int, message: Message) -> None:
        """Send to a worker."""
        ...

    def fence(self, request: FenceRequests) -> None:
        """Send to the token ledger."""
        ...

    def redispatch(self, owner: Ownership, emitted: EmittedTokens) -> bool:
        """Send the next attempt to two workers; false while there are none to take it."""
        ...

    def missing_role(self) -> str | None:
        """Why no request can be served, not even later; None if it can."""
        ...

    def end(self, owner: Ownership, status: int | None, reason: str) -> None:
        """Answer the client with an error, or confirm its abort (``status`` None)."""
        ...


@dataclass
class _Death:
    worker_id: int
    waiting_for: set[int]


class Recovery:
    """Requests on their way from one attempt to the next."""

    def __init__(self, host: RecoveryHost, state: ClusterState, max_attempts: int) -> None:
        self._host = host
        self._state = state
        self._max_attempts = max_attempts
        self._deaths: dict[int, _Death] = {}
        # By rid, the requests that each fence was raised for.
        self._fences: dict[int, dict[str, Ownership]] = {}
        # Fenced, but no worker could take them yet.
        self._parked: dict[str, tuple[Ownership, EmittedTokens]] = {}
        self._next_id = 1
        self.recovered = 0

    # --- what happens -----------------------------------------------------------------------

    def worker_died(self, worker_id: int) -> None:
        """The worker's processes are gone, and with them all it could still have done."""
        self._state.note_lost(worker_id)
        for event_id, death in list(self._deaths.items()):
            self._acknowledged(event_id, death, worker_id)
        survivors = {w.worker_id for w in self._state.workers.values() if w.state == READY}
        survivors.discard(worker_id)
        event_id = self._take_id()
        death = self._deaths[event_id] = _Death(worker_id, set(survivors))
        for survivor in survivors:
            self._host.tell(survivor, PeerDied(event_id=event_id, worker_id=worker_id))
        self._conclude_when_acknowledged(event_id, death)

    def on_acknowledged(self, event_id: int, worker_id: int) -> None:
        """A survivor has let go of the dead worker."""
        death = self._deaths.get(event_id)
        if death is not None:
            self._acknowledged(event_id, death, worker_id)

    def on_request_failed(self, name: str, reason: str) -> None:
        """A worker lost this attempt; stale reports are of no interest."""
        owner = self._state.owner_of(name)
        if owner is not None and not owner.recovering:
            self.recover([owner], reason)

    def on_fenced(self, fenced: Fenced) -> None:
        """Nobody but the next attempt can speak now."""
        asked = self._fences.pop(fenced.fence_id, {})
        for emitted in fenced.requests:
            owner = self._state.owners.get(emitted.rid)
            if owner is None or owner is not asked.get(emitted.rid):
                continue  # it has ended, and its rid may be another request's by now
            if emitted.ended:
                self._state.forget(owner.rid)
            else:
                self._parked[owner.rid] = (owner, emitted)
        self.dispatch_parked()

    def on_abort(self, owner: Ownership) -> None:
        """The client of a request that is being recovered has left."""
        owner.aborted = True
        if owner.rid in self._parked:
            self.dispatch_parked()

    def settled(self, worker_id: int) -> bool:
        """Whether every survivor has let go of the dead worker."""
        return all(d.worker_id != worker_id for d in self._deaths.values())

    # --- steps ------------------------------------------------------------------------------

    def recover(self, owners: Iterable[Ownership], reason: str) -> None:
        """Void the current attempts at these requests and begin the next."""
        fenced: dict[str, Ownership] = {}
        void: dict[int, list[str]] = {}
        for owner in owners:
            logger.warning("recovering rid=%s attempt=%d: %s", owner.rid, owner.attempt, reason)
            # A request that moved may still count where it was dispatched to.
            for view in self._state.workers.values():
                view.dispatched.pop(owner.name, None)
            for worker_id in {owner.prefill, owner.decode}:
                void.setdefault(worker_id, []).append(owner.name)
            owner.attempt += 1
            owner.recovering = True
            fenced[owner.rid] = owner
        for worker_id, names in void.items():
            if self._state.workers[worker_id].state == READY:
                self._host.tell(worker_id, Discard(rids=names))
        if fenced:
            fence_id = self._take_id()
            self._fences[fence_id] = fenced
            self._host.fence(
                FenceRequests(
                    fence_id=fence_id,
                    attempts={rid: owner.attempt for rid, owner in fenced.items()},
                    first_attempts={rid: owner.first_attempt for rid, owner in fenced.items()},
                )
            )

    def dispatch_parked(self) -> None:
        """Send on what can be sent on; what never can is answered with an error."""
        for rid, (owner, emitted) in list(self._parked.items()):
            ending = self._why_end(owner, emitted)
            if ending is not None:
                del self._parked[rid]
                self._state.forget(rid)
                self._host.end(owner, *ending)
            elif self._host.redispatch(owner, emitted):
                del self._parked[rid]
                owner.recovering = False
                self.recovered += 1

    def _why_end(self, owner: Ownership, emitted: EmittedTokens) -> tuple[int | None, str] | None:
        if owner.aborted:
            return None, "aborted"
        failures = owner.attempt - owner.first_attempt - owner.handed_back
        if failures > self._max_attempts:
            return 500, f"the request failed {failures} times; see the server's log"
        if emitted.incomplete:
            return 500, (
                "the worker of this request died, and its output so far is not remembered: too "
                "many requests ran at once"
            )
        row = first_refusal(REQUEST, owner.request) if emitted.output_ids else None
        if row is not None:
            return 500, (
                f"the worker of this request died, and requests with {row.what} cannot be "
                f"continued elsewhere: {row.reason}"
            )
        missing = self._host.missing_role()
        return (503, missing) if missing is not None else None

    def _acknowledged(self, event_id: int, death: _Death, worker_id: int) -> None:
        death.waiting_for.discard(worker_id)
        self._conclude_when_acknowledged(event_id, death)

    def _conclude_when_acknowledged(self, event_id: int, death: _Death) -> None:
        if death.waiting_for or self._deaths.pop(event_id, None) is None:
            return
        self._state.take_back_ended(death.worker_id)
        lost = [
            o
            for o in self._state.owners.values()
            if o.decode == death.worker_id and not o.recovering
        ]
        self.recover(lost, f"worker {death.worker_id} died")

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id
