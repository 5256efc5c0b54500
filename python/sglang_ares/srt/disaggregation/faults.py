"""Fault injection: hold a migration in a state, or let its transfer fail, on command.

For rehearsing faults on a cluster of one's own (``--ares-fault-injection``, ``POST /ares/fault``)
and for the fault matrix of the tests: only a migration that stands still in a state can have
something done to it in that state. Killing and stopping is left to ``kill``.

A point is ``side:STATE`` (``source:COPYING``) or ``source:chunk:N`` (the N-th piece of KV, from 1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from sglang_ares.srt.disaggregation.migration import Migration, SourceState, TargetState
from sglang_ares.srt.managers.io_struct import FaultReached, InjectFault, Message

logger = logging.getLogger(__name__)

HOLD = "hold"
FAIL = "fail"
RELEASE = "release"
ACTIONS = (HOLD, FAIL, RELEASE)


def is_point(text: str) -> bool:
    """Whether ``text`` names a point."""
    side, _, rest = text.partition(":")
    if side == "source" and rest.startswith("chunk:"):
        return rest[len("chunk:") :].isdigit()
    states = {"source": SourceState, "target": TargetState}.get(side, ())
    return any(rest == state.value for state in states)


@dataclass
class _Hold:
    until: float
    record: Migration


class FaultInjector:
    """The armed faults of one worker; each strikes once."""

    def __init__(
        self, worker_id: int, report: Callable[[Message], None], clock: Callable[[], float]
    ) -> None:
        self._worker_id = worker_id
        self._report = report
        self._clock = clock
        self._armed: dict[str, InjectFault] = {}
        self._holds: dict[int, _Hold] = {}

    def arm(self, fault: InjectFault) -> None:
        """Let ``fault`` strike when its point is next reached; or end all holds."""
        if fault.action == RELEASE:
            self._armed.clear()
            self._holds.clear()
        else:
            self._armed[fault.point] = fault

    def reached(self, point: str, record: Migration) -> bool:
        """A migration has reached ``point``; whether it fails there."""
        fault = self._armed.pop(point, None)
        if fault is None:
            return False
        logger.warning("injected %s at %s, rid=%s", fault.action, point, record.rid)
        self._report(FaultReached(worker_id=self._worker_id, point=point, rid=record.rid))
        if fault.action == HOLD:
            self._holds[id(record)] = _Hold(self._clock() + fault.seconds, record)
        return fault.action == FAIL

    def holds(self, record: Migration) -> bool:
        """Whether the migration has to stand still."""
        hold = self._holds.get(id(record))
        if hold is None:
            return False
        if self._clock() < hold.until:
            return True
        del self._holds[id(record)]
        return False
