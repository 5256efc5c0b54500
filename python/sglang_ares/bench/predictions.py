"""Watches what a cluster predicts for its live requests, to set beside what became of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sglang_ares.bench.replay import Run

RequestsFn = Callable[[], Awaitable[list[dict[str, Any]]]]


class PredictionWatch:
    """Samples the document of ``GET /ares/requests``.

    ``rows``: by rid, output tokens so far and quantiles of those to come; ``moves``: how often a
    request was seen on another worker than before.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[list[float]]] = defaultdict(list)
        self.moves: dict[str, int] = defaultdict(int)
        self._worker: dict[str, int] = {}

    @asynccontextmanager
    async def over(self, requests: RequestsFn, interval_s: float = 0.1) -> AsyncIterator[None]:
        """Sample until the block is left."""
        task = asyncio.create_task(self._sample(requests, interval_s))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _sample(self, requests: RequestsFn, interval_s: float) -> None:
        while True:
            for request in await requests():
                self.note(request)
            await asyncio.sleep(interval_s)

    def note(self, request: dict[str, Any]) -> None:
        """One entry of the document."""
        rid, predicted = request["rid"], request["predicted_remaining"]
        if request["worker"] is None:
            return
        if request["worker"] != self._worker.setdefault(rid, request["worker"]):
            self.moves[rid] += 1
            self._worker[rid] = request["worker"]
        if predicted is None or not request["output_tokens"]:
            return
        rows = self.rows[rid]
        if not rows or request["output_tokens"] > rows[-1][0]:
            rows.append([float(request["output_tokens"]), *map(float, predicted)])

    def trajectories(
        self, run: Run, prompts: dict[str, str], count: int
    ) -> list[tuple[str, int, list[list[float]]]]:
        """A name, the output's length and the rows of ``count`` answered requests: every other one
        of those seen most often."""
        lengths = {r.rid: len(r.token_ids) for r in run.results if r.completed}
        seen = sorted(
            (r for r in lengths if len(self.rows[r]) > 2), key=lambda r: -len(self.rows[r])
        )
        chosen = [*seen[: 2 * count : 2], *seen[1 : 2 * count : 2]][:count]
        return [
            (
                f"“{prompts[rid].strip()}”, {lengths[rid]} tokens"
                + (f", moved {self.moves[rid]}×" if self.moves[rid] else ""),
                lengths[rid],
                self.rows[rid],
            )
            for rid in chosen
        ]
