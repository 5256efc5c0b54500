"""What migrations take, learned from those that were made."""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np

from sglang_ares.srt.policy.types import MoveCost

# Migrations remembered; how many are needed before they count; and by how much the largest of
# them must exceed the smallest to tell copying from the rest.
_KEPT = 64
_LEAST = 8
_LEAST_RANGE = 2.0


class MoveCostFit:
    """Learns :class:`MoveCost`; ``start`` holds until enough migrations were seen."""

    def __init__(self, start: MoveCost) -> None:
        self._start = start
        self._moves: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self._pauses: deque[float] = deque(maxlen=_KEPT)

    def observe_move(self, tokens_sent: int, seconds: float) -> None:
        """A migration that sent the KV of so many tokens took so long."""
        self._moves.append((tokens_sent, seconds))

    def observe_pause(self, seconds: float) -> None:
        """A moved request produced nothing for so long (clocks of two hosts: not below 0)."""
        self._pauses.append(max(0.0, seconds))

    @property
    def cost(self) -> MoveCost:
        """Medians, so that a migration that hung does not count."""
        cost = self._start
        if len(self._pauses) >= _LEAST:
            cost = msgspec.structs.replace(cost, pause_s=float(np.median(self._pauses)))
        if len(self._moves) < _LEAST:
            return cost
        tokens, seconds = np.array(self._moves, np.float64).T
        per_token = 1 / cost.tokens_per_s if cost.tokens_per_s > 0 else 0.0
        if tokens.max() >= _LEAST_RANGE * max(1.0, tokens.min()):
            # From the middle of the small ones to the middle of the large ones. Where copying is
            # lost in the noise, what was reckoned at the start stays: larger requests may come.
            small = tokens <= np.median(tokens)
            if (~small).any():
                run = np.median(tokens[~small]) - np.median(tokens[small])
                rise = np.median(seconds[~small]) - np.median(seconds[small])
                per_token = float(rise / run) if rise > 0 else per_token
        fixed = max(0.0, float(np.median(seconds - per_token * tokens)))
        return msgspec.structs.replace(
            cost, fixed_s=fixed, tokens_per_s=1 / per_token if per_token > 0 else 0.0
        )
