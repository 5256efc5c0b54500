"""How control messages reach all tensor-parallel ranks of a worker in the same step.

Only rank 0 has a mailbox. What has arrived there travels to the other ranks in upstream's own
broadcast of requests, together with rank 0's clock and the step time it has measured: a
migration's decisions depend on nothing else that differs between ranks. A step without messages,
in which nothing waits for time to pass, carries nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

logger = logging.getLogger(__name__)


class ControlStep(NamedTuple):
    """One step's share: rank 0's clock (monotonic seconds), the frames of its mailbox, the
    checksum of the migrations it went through, and how long a decode step takes there."""

    now: float
    frames: list[bytes]
    digest: int
    decode_step_s: float


class ControlIntake:
    """What the ranks of a worker agree on in a step.

    ``drain`` empties the mailbox; ``needs_clock`` says whether anything waits for time to pass;
    both are asked on rank 0 only. ``digest``: this rank's checksum, which must be rank 0's.
    ``measured_step_s``: how long a decode step takes by this rank's clock; decisions go by rank
    0's, which is ``decode_step_s`` on every rank.
    """

    def __init__(
        self,
        drain: Callable[[], list[bytes]],
        needs_clock: Callable[[], bool],
        digest: Callable[[], int],
        measured_step_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._drain = drain
        self._needs_clock = needs_clock
        self._digest = digest
        self._measured_step_s = measured_step_s
        self._clock = clock
        self._frames: list[bytes] = []
        self.now = 0.0
        self.decode_step_s = 0.0
        self.in_step = True

    def gather(self) -> ControlStep | None:
        """On rank 0: what to broadcast in this step, if anything."""
        frames = self._drain()
        if not frames and not self._needs_clock():
            return None
        return ControlStep(self._clock(), frames, self._digest(), self._measured_step_s())

    def take_out(self, received: list[Any]) -> list[Any]:
        """On every rank: keep the broadcast's control step; the rest is upstream's."""
        requests = [r for r in received if not isinstance(r, ControlStep)]
        for step in received:
            if isinstance(step, ControlStep):
                self.now = step.now
                self.decode_step_s = step.decode_step_s
                self._frames += step.frames
                self._compare(step.digest)
        return requests

    def _compare(self, digest: int) -> None:
        if self.in_step and digest != self._digest():
            self.in_step = False
            logger.error(
                "integrity check failed: this rank went through other migrations than rank 0"
            )

    def pop_frames(self) -> list[bytes]:
        """The frames that were broadcast and not handled yet, oldest first."""
        frames, self._frames = self._frames, []
        return frames


@dataclasses.dataclass(kw_only=True, frozen=True)
class ControlRequestReceiver(SchedulerRequestReceiver):
    """Upstream's receiver, whose broadcast takes the control step along."""

    intake: ControlIntake

    @classmethod
    def around(
        cls, receiver: SchedulerRequestReceiver, intake: ControlIntake
    ) -> ControlRequestReceiver:
        """A receiver with the parts of upstream's."""
        parts = {f.name: getattr(receiver, f.name) for f in dataclasses.fields(receiver)}
        return cls(**parts, intake=intake)

    def _broadcast_reqs_across_ranks(
        self, recv_reqs: list[Any] | None, local_reqs: list[Any] | None = None
    ) -> list[Any]:
        """Upstream's broadcast; ``recv_reqs`` is None on the ranks that only listen."""
        step = self.intake.gather() if recv_reqs is not None else None
        if step is not None:
            local_reqs = [*(local_reqs or []), step]
        return self.intake.take_out(super()._broadcast_reqs_across_ranks(recv_reqs, local_reqs))
