"""The embedded engine as the endpoint of a replay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from sglang_ares.bench.replay import Chunk, StreamFn

if TYPE_CHECKING:
    from sglang_ares.bench.workload import WorkItem
    from sglang_ares.engine import Engine


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
