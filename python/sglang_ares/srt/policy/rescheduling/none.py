"""No rescheduling: requests stay where placement put them."""

from __future__ import annotations

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.types import Move, RescheduleLimits


@RESCHEDULING.register("none")
def no_rescheduling(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
    """Never a move."""
    return ()
