"""Replay a workload: send each request at its time, note every token's, watch the cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_ares.bench.workload import WorkItem


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: its new tokens; the last piece has a finish reason."""

    token_ids: list[int]
    finish_reason: dict[str, Any] | None = None


@dataclass
class RequestResult:
    """What became of one request; times are seconds since the replay started.

    ``longest_gap_s``: longest wait between two pieces of the answer. ``finish_reason`` is
    ``stop``, ``length`` or empty; ``error`` is empty for a request that was answered.
    """

    rid: str
    sent_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    longest_gap_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""

    @property
    def completed(self) -> bool:
        """Whether it was answered to the end."""
        return not self.error

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None without a token."""
        return self.first_token_s - self.sent_s if self.token_ids else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        steps = len(self.token_ids) - 1
        return (self.last_token_s - self.first_token_s) / steps if steps > 0 else None


@dataclass(frozen=True)
class LoadSample:
    """The decode workers at one moment: seconds since the start, KV tokens held by each worker
    (by id), migrations completed since the start."""

    time_s: float
    kv_tokens: dict[int, int]
    migrations: int


@dataclass
class Run:
    """One replay: results in the workload's order, samples in time order."""

    results: list[RequestResult] = field(default_factory=list)
    samples: list[LoadSample] = field(default_factory=list)
    duration_s: float = 0.0

    @property
    def migrations(self) -> int:
        """Migrations completed during the replay."""
        return self.samples[-1].migrations if self.samples else 0

    @property
    def done(self) -> int:
        """Requests that have ended, well or not."""
        return sum(bool(r.finish_reason or r.error) for r in self.results)

    @property
    def tokens(self) -> int:
        """Output tokens received."""
        return sum(len(r.token_ids) for r in self.results)


StreamFn = Callable[[WorkItem], AsyncIterator[Chunk]]
StatusFn = Callable[[], Awaitable[dict[str, Any]]]


async def replay(
    workload: Sequence[WorkItem],
    stream: StreamFn,
    status: StatusFn | None = None,
    *,
    sample_interval_s: float = 0.1,
    timeout_s: float = 600.0,
    on_progress: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Send every item at its time and wait for all answers.

    A request that raises, is aborted or has not ended after ``timeout_s`` seconds gets an
    ``error``; the others go on. An error of ``status`` ends the replay.

    Args:
        stream: sends one request and yields its answer.
        status: the document of ``GET /ares/status``, sampled every ``sample_interval_s`` seconds;
            without it the run has no samples.
        on_progress: called after every sample with the run so far.
    """
    run = Run(results=[RequestResult(rid=item.rid) for item in workload])
    before = await status() if status is not None else None
    start = time.perf_counter()
    requests = [
        asyncio.create_task(_send(item, result, stream, start))
        for item, result in zip(workload, run.results, strict=True)
    ]
    watcher = asyncio.create_task(
        _watch(run, status, before, start, sample_interval_s, on_progress)
    )
    answers = asyncio.create_task(_all(requests))
    try:
        # The watcher only ever ends by an error, which then ends the replay.
        await asyncio.wait({answers, watcher}, timeout=timeout_s, return_when="FIRST_COMPLETED")
        if watcher.done():
            watcher.result()
        run.duration_s = time.perf_counter() - start
        watcher.cancel()
        answers.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        for result in run.results:
            if not result.finish_reason and not result.error:
                result.error = f"no answer within {timeout_s:g} s"
        if status is not None:
            run.samples.append(_sample(await status(), before, time.perf_counter() - start))
        on_progress(run)
        return run
    finally:
        tasks = (answers, watcher, *requests)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks)


async def _send(item: WorkItem, result: RequestResult, stream: StreamFn, start: float) -> None:
    await asyncio.sleep(item.arrival_s - (time.perf_counter() - start))
    result.sent_s = time.perf_counter() - start
    try:
        async for chunk in stream(item):
            if chunk.token_ids:
                now = time.perf_counter() - start
                if result.token_ids:
                    gap = now - result.last_token_s
                    result.longest_gap_s = max(result.longest_gap_s, gap)
                else:
                    result.first_token_s = now
                result.last_token_s = now
                result.token_ids += chunk.token_ids
            if chunk.finish_reason is not None:
                result.finish_reason = str(chunk.finish_reason["type"])
                if result.finish_reason == "abort":
                    result.error = str(chunk.finish_reason.get("message", "aborted"))
    except Exception as error:  # whatever it is, it ends this request and belongs in the report
        result.error = f"{type(error).__name__}: {error}"
    else:
        if not result.finish_reason:
            result.error = "the stream ended without a finish reason"


async def _watch(
    run: Run,
    status: StatusFn | None,
    before: dict[str, Any] | None,
    start: float,
    interval_s: float,
    on_progress: Callable[[Run], None],
) -> None:
    while True:
        if status is not None:
            document = await status()
            run.samples.append(_sample(document, before, time.perf_counter() - start))
        on_progress(run)
        await asyncio.sleep(interval_s)


def _sample(document: dict[str, Any], before: dict[str, Any] | None, time_s: float) -> LoadSample:
    earlier = before["migrations"]["completed"] if before is not None else 0
    return LoadSample(
        time_s=time_s,
        kv_tokens={w["id"]: w["kv_tokens"] for w in document["workers"] if w["role"] == "decode"},
        migrations=document["migrations"]["completed"] - earlier,
    )
