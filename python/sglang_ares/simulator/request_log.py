"""What a simulation knows of each request, and records of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sglang_ares.bench.workloads.stream import RequestStream

# Why a stay on a worker ended.
FINISHED, MOVED, RETRACTED = "finished", "moved", "retracted"


@dataclass(frozen=True)
class Stay:
    """A request was computed on a worker from ``start_s`` to ``end_s``."""

    request: int
    worker: int
    start_s: float
    end_s: float
    end: str


class RequestLog:
    """Per request, by its place in the stream.

    Plain lists: single elements are read and written, which numpy is slow at. ``output``: tokens
    produced up to its last leave of a decode worker. ``left_s``: when that was, NaN before it ever
    ran. Times are NaN until they are known, ``longest_gap_s`` is 0.
    """

    def __init__(self, stream: RequestStream, *, record_stays: bool) -> None:
        size = len(stream)
        self.arrival_s: list[float] = stream.arrival_s.tolist()
        self.prompt: list[int] = stream.prompt_tokens.tolist()
        self.wanted: list[int] = stream.output_tokens.tolist()
        self.output = [0] * size
        self.prefilled_s = [math.nan] * size
        self.first_token_s = [math.nan] * size
        self.finished_s = [math.nan] * size
        self.left_s = [math.nan] * size
        self.longest_gap_s = [0.0] * size
        self.retractions = [0] * size
        self.moves = [0] * size
        # Where it runs, or ran last; -1: nowhere yet.
        self.worker = [-1] * size
        self.rejected: list[int] = []
        # The last move, or the arrival; numpy, because policies read all of it.
        self.moved_s = stream.arrival_s.copy()
        self.prompt_column = np.ascontiguousarray(stream.prompt_tokens)
        self.wanted_column = np.ascontiguousarray(stream.output_tokens)
        self.unfinished = size
        self.stays: list[Stay] | None = [] if record_stays else None

    def __len__(self) -> int:
        return len(self.prompt)

    def resident(self, request: int) -> int:
        """Tokens of a request that runs nowhere, once it does: its first output token comes with
        its prompt's KV."""
        return self.prompt[request] + (self.output[request] or 1)
