"""The oracle: what is possible if lengths are known and moves cost nothing. Simulation only.

The simulator puts the true remaining lengths into every quantile and carries the moves out at
once.
"""

from __future__ import annotations

import msgspec

from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.rescheduling.ares import ares
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.types import Move, MoveCost, RescheduleLimits

# Most moves per worker and round.
_MOVES_PER_WORKER = 4


@RESCHEDULING.register("oracle", simulated_only=True)
def oracle(cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]:
    """As many moves as bring any gain; of ``limits`` only the SLO and the headroom count."""
    free = msgspec.structs.replace(
        limits,
        max_moves=_MOVES_PER_WORKER * len(cluster.workers),
        threshold=0.0,
        min_gap_tokens=0,
        cooldown_s=0.0,
        cost=MoveCost(fixed_s=0.0, pause_s=0.0),
    )
    return ares(cluster, free)
