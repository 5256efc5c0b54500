"""What a load costs the requests that feel it: milliseconds of their decode steps.

A step of a worker with ``n`` requests and ``t`` resident tokens takes ``s = a + b n + c t`` ms, and
all ``n`` requests feel it. Slow steps count more than in proportion, because it is the slowest
requests that miss their target; and what does not fit into memory stalls the requests that hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_ares.srt.policy.snapshot import Floats, Ints

# Standard deviations of its resident tokens that a worker should have room for, and the share of
# its KV that should stay free.
_SIGMAS = 1.0
_FLOOR = 0.05
# A request that lacks memory (retracted, computed anew, waiting) costs as much as this many
# running ones.
_STALL = 20.0
# From this share of the time per output token that was promised on, each further ms counts this
# many times.
_SLO_MARGIN = 0.9
_SLO_WEIGHT = 4.0


@dataclass(frozen=True, eq=False)
class LoadCost:
    """``laws``, shape ``(W, 3)``: step-time laws. ``capacity``, shape ``(W,)``: KV tokens.
    ``mean_step_ms``: what a step takes on average now. ``slo_ms``: the time per output token
    that was promised (0: none).

    In the methods, ``workers`` are rows of these, in a shape that broadcasts against the loads'.
    """

    laws: Floats
    capacity: Floats
    mean_step_ms: float
    slo_ms: float

    def overflow(self, workers: Ints, resident: Floats, uncertainty: Floats) -> Floats:
        """Tokens that may not fit: ``workers`` expect ``resident`` tokens with variance
        ``uncertainty``."""
        room = (1 - _FLOOR) * self.capacity[workers]
        likely = resident + _SIGMAS * np.sqrt(np.maximum(uncertainty, 0.0))
        return np.maximum(0.0, likely - room)

    def pressure(
        self, workers: Ints, requests: Floats, resident: Floats, uncertainty: Floats
    ) -> Floats:
        """Milliseconds of a step that depend on the load, overflow weighing like many tokens."""
        per_request, per_token = self.laws[workers, 1], self.laws[workers, 2]
        over = self.overflow(workers, resident, uncertainty)
        return np.asarray(per_request * requests + per_token * (resident + _STALL * over))

    def __call__(
        self, workers: Ints, requests: Floats, resident: Floats, uncertainty: Floats
    ) -> Floats:
        """Cost of one decode step (ms, summed over requests)."""
        fixed, per_request, per_token = (self.laws[workers, i] for i in range(3))
        requests, resident = np.maximum(requests, 0.0), np.maximum(resident, 0.0)
        step = fixed + per_request * requests + per_token * resident
        # A step of s ms costs each request s * s / mean.
        felt = step * step / self.mean_step_ms
        if self.slo_ms > 0:
            felt += _SLO_WEIGHT * np.maximum(0.0, step - _SLO_MARGIN * self.slo_ms)
        over = self.overflow(workers, resident, uncertainty)
        if over.any():
            felt += _STALL * np.minimum(1.0, over / np.maximum(resident, 1.0)) * step
        return np.asarray(requests * felt)
