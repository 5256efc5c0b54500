"""The embedded engine as the endpoint of a replay."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sglang_ares.bench.replay import Chunk, StreamFn

if TYPE_CHECKING:
    from sglang_ares.bench.workload import WorkItem
    from sglang_ares.engine import Engine

T = TypeVar("T")


class ClusterFailedError(RuntimeError):
    """A process of the cluster died; its output says why."""


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append this process's output to ``path``; processes started meanwhile keep it there."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, log):
            os.close(descriptor)


def start_engine(log: Path, **kwargs: Any) -> Engine:
    """Start a cluster whose processes write to the file ``log``; wait until it serves.

    Args:
        kwargs: of :class:`sglang_ares.Engine`.

    Raises :class:`ClusterFailedError` when a process dies meanwhile. Call it in the main thread.
    """
    with output_to(log):
        from sglang_ares.engine import Engine

        return Engine(
            **{
                "log_level": "error",
                # What an earlier run has measured is not to change this one's decisions.
                "ares_profile_cache": "off",
                "incremental_streaming_output": True,
                "custom_sigquit_handler": _raise_cluster_failed,
                **kwargs,
            }
        )


def _raise_cluster_failed(signum: int, frame: Any) -> None:
    """Upstream's processes send SIGQUIT to their parent when they fail; without a handler of
    one's own the parent kills itself."""
    raise ClusterFailedError("a process of the cluster died while it started")


async def failing_with_the_cluster(engine: Engine, task: asyncio.Task[T]) -> T:
    """The result of ``task``, or :class:`ClusterFailedError` once a process of the cluster dies."""
    died = asyncio.Event()
    # Else the first request would, and would put upstream's handler in place of this one.
    engine.tokenizer_manager.auto_create_handle_loop()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGQUIT, died.set)
    watcher = asyncio.create_task(died.wait())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if died.is_set():
            raise ClusterFailedError("a process of the cluster died")
        return await task
    finally:
        for pending in (watcher, task):
            pending.cancel()
        await asyncio.gather(watcher, task, return_exceptions=True)


def engine_stream(engine: Engine) -> StreamFn:
    """Requests to ``engine``; to be used within ``engine.loop``."""
    incremental = bool(engine.server_args.incremental_streaming_output)

    async def stream(item: WorkItem) -> AsyncIterator[Chunk]:
        answer = await engine.async_generate(
            item.prompt, dict(item.sampling_params), rid=item.rid, stream=True
        )
        received = 0
        async for piece in answer:
            token_ids: list[int] = piece["output_ids"]
            if not incremental:  # each piece repeats what came before it
                token_ids = token_ids[received:]
                received += len(token_ids)
            yield Chunk(token_ids, piece["meta_info"]["finish_reason"])

    return stream
