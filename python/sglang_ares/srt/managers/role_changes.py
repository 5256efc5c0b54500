"""Changes of workers' roles, in the controller's process.

A change goes through two states::

    EMPTYING    the worker gets no requests; a decode worker's are moved to the others, a prefill
                worker finishes its own; what has no output after a second is dispatched anew
      │ nothing is left that was sent to it
    SWITCHING   ``ChangeRole`` is on its way; the worker relabels itself once idle
      │ ``RoleChanged``
    (ended)     the others learn its new role; it gets requests of it

While emptying, a change can be given up: the worker then serves on in its old role. A worker that
dies ends its change, and is started anew in the role it had then.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from sglang_ares.srt.managers.cluster_views import READY
from sglang_ares.srt.managers.io_struct import ChangeRole, RoleChanged
from sglang_ares.srt.policy.types import DECODE

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.cluster_views import WorkerView
    from sglang_ares.srt.managers.io_struct import Message

logger = logging.getLogger(__name__)

# Ended changes that the status lists.
_REMEMBERED = 32

# Prompts that are being computed get so long to be done and sent; the queue before a prefill
# worker may be much longer, above all when one more is wanted.
_HAND_BACK_AFTER_S = 1.0

# Why a change was ordered.
OPERATOR = "manual"
PLANNER = "policy"

# How a change ended, and its reason.
Answer = Callable[[int, dict[str, Any]], None]


class ChangeState(Enum):
    """Where a change is."""

    EMPTYING = "emptying"
    SWITCHING = "switching"


class RoleHost(Protocol):
    """What changes of roles ask of the controller."""

    def tell(self, worker_id: int, message: Message) -> None:
        """Send to a worker."""
        ...

    def empty_workers(self) -> None:
        """Move requests away from the workers that are to be emptied."""
        ...

    def hand_back(self, worker_id: int) -> None:
        """Dispatch anew the requests of a worker that have no output yet and may go elsewhere."""
        ...

    def role_changed(self, worker_id: int, role: str) -> None:
        """A worker serves in another role: all that goes by roles must learn it."""
        ...

    def role_change_ended(self, ended: EndedChange) -> None:
        """For the metrics, and for whoever orders changes."""
        ...


@dataclass
class RoleChange:
    """One change. Times are monotonic seconds. ``requests``: what the worker held at its start."""

    change_id: int
    worker_id: int
    old_role: str
    role: str
    cause: str
    why: str
    started_at: float
    requests: int
    state: ChangeState = ChangeState.EMPTYING
    emptied_at: float | None = None
    handed_back: bool = False
    answer: Answer | None = None


@dataclass(frozen=True)
class EndedChange:
    """What the status tells of a change that ended. ``seconds``: order to service in the new
    role, or to the failure; ``emptying_s`` of it went by until nothing was left."""

    worker: int
    old_role: str
    role: str
    cause: str
    why: str
    outcome: str
    reason: str
    requests: int
    seconds: float
    emptying_s: float
    ended_at: float = field(repr=False)


class RoleChanges:
    """Orders and follows changes; at most one a worker. ``fixed``: why no worker can change."""

    def __init__(
        self, host: RoleHost, state: ClusterState, fixed: str | None, timeout_s: float
    ) -> None:
        self._host = host
        self._state = state
        self._fixed = fixed
        self._timeout_s = timeout_s
        self._next_id = 1
        self._changes: dict[int, RoleChange] = {}
        self.ended: deque[EndedChange] = deque(maxlen=_REMEMBERED)

    @property
    def under_way(self) -> bool:
        """Whether any worker is changing its role."""
        return bool(self._changes)

    # --- orders -----------------------------------------------------------------------------

    def order(
        self,
        worker_id: int,
        role: str,
        now: float,
        *,
        cause: str,
        why: str = "",
        answer: Answer | None = None,
    ) -> tuple[int, str] | None:
        """Begin a change; an HTTP status and the reason if it cannot be. ``answer`` is called at
        its end."""
        refusal = self._why_not(worker_id, role)
        if refusal is not None:
            return refusal
        view = self._state.workers[worker_id]
        view.changing_to = role
        change = RoleChange(
            change_id=self._next_id,
            worker_id=worker_id,
            old_role=view.role,
            role=role,
            cause=cause,
            why=why,
            started_at=now,
            requests=self._state.outstanding(view),
            answer=answer,
        )
        self._next_id += 1
        self._changes[worker_id] = change
        logger.info(
            "worker %d is to become a %s worker (%s): %d requests to finish or move",
            worker_id,
            role,
            f"{cause}: {why}" if why else cause,
            change.requests,
        )
        self._host.empty_workers()
        self.tick(now)
        return None

    def _why_not(self, worker_id: int, role: str) -> tuple[int, str] | None:
        view = self._state.workers.get(worker_id)
        if view is None:
            return 404, f"there is no worker {worker_id}"
        if self._fixed is not None:
            return 409, f"roles are fixed with {self._fixed}"
        if view.state != READY:
            return 409, f"worker {worker_id} is {view.state}: {view.reason}"
        if view.changing_to is not None:
            return 409, f"worker {worker_id} is becoming a {view.changing_to} worker already"
        if view.role == role:
            return 409, f"worker {worker_id} is a {role} worker already"
        others = [w for w in self._state.with_role(view.role) if w is not view]
        if not others:
            return 409, f"worker {worker_id} is the last {view.role} worker in use"
        return self._no_room(view, others) if view.role == DECODE else None

    def _no_room(self, view: WorkerView, others: list[WorkerView]) -> tuple[int, str] | None:
        """Whether the other decode workers lack the memory for what this one holds."""
        held = view.load().load_tokens
        ids = {w.worker_id for w in others}
        free = sum(w.free_tokens for w in self._state.loads(DECODE) if w.worker_id in ids)
        if held <= free:
            return None
        return 409, (
            f"the other decode workers have no room: {held} tokens are on worker "
            f"{view.worker_id}, {free} are free elsewhere"
        )

    # --- what happens -----------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Follow every change; never waits."""
        for change in list(self._changes.values()):
            if change.state is ChangeState.EMPTYING:
                self._follow_emptying(change, now)

    def _follow_emptying(self, change: RoleChange, now: float) -> None:
        view = self._state.workers[change.worker_id]
        left = self._state.outstanding(view)
        if not self._state.with_role(view.role):
            self._end(change, now, f"it is the last {view.role} worker in use by now")
        elif not left:
            change.state = ChangeState.SWITCHING
            change.emptied_at = now
            order = ChangeRole(
                change_id=change.change_id,
                worker_id=change.worker_id,
                incarnation=view.incarnation,
                role=change.role,
            )
            self._host.tell(change.worker_id, order)
        elif now - change.started_at > self._timeout_s:
            self._end(
                change,
                now,
                f"{left} requests are still on it after {self._timeout_s:.0f} s "
                "(--ares-role-change-timeout): they cannot move, or the others have no room",
            )
        elif not change.handed_back and now - change.started_at > _HAND_BACK_AFTER_S:
            change.handed_back = True
            self._host.hand_back(change.worker_id)

    def on_changed(self, message: RoleChanged, now: float) -> None:
        """A worker's answer."""
        change = self._changes.get(message.worker_id)
        if change is None or change.change_id != message.change_id:
            return
        if message.role == change.role:
            self._host.role_changed(message.worker_id, message.role)
        self._end(change, now, message.reason)

    def on_worker_lost(self, worker_id: int, reason: str, now: float) -> None:
        """A worker is dead, or hangs."""
        change = self._changes.get(worker_id)
        if change is not None:
            was = change.state.value
            self._end(change, now, f"worker {worker_id} was lost while {was}: it {reason}")

    def _end(self, change: RoleChange, now: float, reason: str) -> None:
        del self._changes[change.worker_id]
        self._state.workers[change.worker_id].changing_to = None
        emptied_at = change.emptied_at if change.emptied_at is not None else now
        ended = EndedChange(
            worker=change.worker_id,
            old_role=change.old_role,
            role=change.role,
            cause=change.cause,
            why=change.why,
            outcome="failed" if reason else "changed",
            reason=reason,
            requests=change.requests,
            seconds=now - change.started_at,
            emptying_s=emptied_at - change.started_at,
            ended_at=now,
        )
        self.ended.append(ended)
        logger.log(
            logging.WARNING if reason else logging.INFO,
            "worker %d %s a %s worker after %.2f s, %.2f of them emptying%s",
            ended.worker,
            "did not become" if reason else "is",
            ended.role,
            ended.seconds,
            ended.emptying_s,
            f": {reason}" if reason else "",
        )
        self._host.role_change_ended(ended)
        if change.answer is not None:
            change.answer(409 if reason else 200, document(ended))

    # --- documents --------------------------------------------------------------------------

    def status(self, now: float) -> dict[str, Any]:
        """Changes under way, and the last ones that ended, newest first."""
        under_way = [
            {
                "worker": c.worker_id,
                "role": c.role,
                "cause": c.cause,
                "why": c.why,
                "state": c.state.value,
                "requests": self._state.outstanding(self._state.workers[c.worker_id]),
                "seconds": now - c.started_at,
            }
            for c in self._changes.values()
        ]
        ended = [{**document(e), "ago_s": now - e.ended_at} for e in reversed(self.ended)]
        return {"fixed": self._fixed, "changing": under_way, "last": ended}


def document(ended: EndedChange) -> dict[str, Any]:
    """What ``POST /ares/role`` answers."""
    return {
        "outcome": ended.outcome,
        "reason": ended.reason,
        "worker": ended.worker,
        "role": ended.role,
        "cause": ended.cause,
        "why": ended.why,
        "requests": ended.requests,
        "seconds": ended.seconds,
        "emptying_s": ended.emptying_s,
    }
