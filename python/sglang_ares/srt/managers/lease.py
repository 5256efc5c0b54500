"""The lease of a worker on another host: until when it may live without word from the controller.

The controller cannot end such a worker for certain, so the worker ends by itself. Its host asks
for the lease to be renewed, and counts it from when it *asked*; the controller counts from when
it *answered*, which is later. So when the lease is over for the controller it was over on the
host before, whatever the network did, without the hosts' clocks having to agree::

    host        asks ───── lease_s ─────► ends the worker
                  └─►┐                         │ the worker looks every heartbeat
    controller       answers ───── lease_s + margin ─────► the worker is gone for certain

Both the host's process and the worker itself look at the lease: either may have been stopped.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any


def lease_clock() -> float:
    """Seconds that go on while the machine is suspended, alike in all processes of a host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class LeaseTimes:
    """``lease_s``: how long a lease lasts. ``beat_s``: how often it is renewed, and looked at."""

    lease_s: float
    beat_s: float

    @classmethod
    def of(cls, worker_timeout_s: float) -> LeaseTimes:
        """A worker that is out of reach ends no later than one that hangs."""
        return cls(worker_timeout_s, min(1.0, worker_timeout_s / 5))

    @property
    def expiry_s(self) -> float:
        """After the last answer the controller waits so long until the worker is gone."""
        return self.lease_s + 2 * self.beat_s


def new_lease(context: BaseContext) -> Any:
    """A lease that a process of ``context`` can be handed: a shared double, in
    :func:`lease_clock` seconds."""
    return context.RawValue("d", 0.0)


def is_expired(lease: Any) -> bool:
    """Whether the worker must not live any more; a worker without a lease may."""
    return lease is not None and lease_clock() > lease.value


def end_when_expired(lease: Any) -> None:
    """End this process if its lease is over, without another instruction."""
    if is_expired(lease):
        os.kill(os.getpid(), signal.SIGKILL)
