"""Request streams as columns: when requests arrive, how long their prompts and outputs are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


class WorkloadError(ValueError):
    """A workload that cannot be used; names the file, the line and the field."""


@dataclass(frozen=True, eq=False)
class RequestStream:
    """``N`` requests, by arrival.

    ``arrival_s``: float64 ``(N,)``, seconds from the start, ascending. ``prompt_tokens``,
    ``output_tokens``: int64 ``(N,)``, at least 1. ``prefix_blocks``: per request the ids of its
    prompt's blocks of ``block_tokens`` tokens, equal ids meaning an equal prefix; None where a
    workload knows nothing of prefixes. ``origin``: what it is and where from, for reports.
    """

    name: str
    origin: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    block_tokens: int = 512

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Mean requests per second, first to last arrival; 0 for fewer than two requests."""
        span = float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) > 1 else 0.0
        return (len(self) - 1) / span if span > 0 else 0.0

    def scaled(self, factor: float) -> RequestStream:
        """The same requests with every timestamp multiplied by ``factor``: the rate divided by it
        (how arXiv 2505.11916 varies the rate of a trace)."""
        if not factor > 0:
            raise ValueError(f"factor is {factor}; timestamps are scaled by a factor above 0")
        return replace(self, arrival_s=self.arrival_s * factor)

    def between(self, start_s: float, end_s: float) -> RequestStream:
        """The requests that arrive from ``start_s`` to before ``end_s``, in time from then on."""
        first, last = np.searchsorted(self.arrival_s, [start_s, end_s])
        blocks = self.prefix_blocks
        return replace(
            self,
            arrival_s=self.arrival_s[first:last] - start_s,
            prompt_tokens=self.prompt_tokens[first:last],
            output_tokens=self.output_tokens[first:last],
            prefix_blocks=blocks[first:last] if blocks is not None else None,
        )
