"""No rescheduling: requests stay where placement put them."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.types import Move, RescheduleLimits, WorkerLoad


@RESCHEDULING.register("none")
def no_rescheduling(workers: Sequence[WorkerLoad], limits: RescheduleLimits) -> tuple[Move, ...]:
    """Never a move."""
    return ()
