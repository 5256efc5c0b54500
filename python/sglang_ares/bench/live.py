"""A request stream against a running server, over HTTP: exact lengths, times of every request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any
from zlib import crc32

import aiohttp
import numpy as np

from sglang_ares.bench.replay import Chunk, LoadSample, Run, replay
from sglang_ares.bench.workload import WorkItem
from sglang_ares.bench.workloads import RequestStream

# Prompt tokens are drawn from here: tokens of every model, none of them special in common ones.
_TOKENS = (64, 128)


class LiveError(RuntimeError):
    """The server did not do as asked; the text is its answer."""


class LiveServer:
    """A server at ``url``, ours or (without ``/ares``) upstream's; use it as a context manager.

    ``stream_interval``: output tokens per piece of a streamed answer; more of them cost the server
    and this client less, and make token gaps coarser.
    """

    def __init__(self, url: str, *, stream_interval: int = 1) -> None:
        self.url = url.rstrip("/")
        self._stream_interval = stream_interval
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> LiveServer:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=1 << 20,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def status(self) -> dict[str, Any]:
        """The document of ``GET /ares/status``."""
        async with self._session.get(f"{self.url}/ares/status") as answer:
            return await self._document(answer)

    async def requests(self) -> list[dict[str, Any]]:
        """The live requests of ``GET /ares/requests``."""
        async with self._session.get(f"{self.url}/ares/requests") as answer:
            listing: list[dict[str, Any]] = await answer.json()
            return listing

    async def info(self) -> dict[str, Any]:
        """Upstream's ``GET /server_info``: the server's arguments."""
        async with self._session.get(f"{self.url}/server_info") as answer:
            return await self._document(answer)

    async def migrate(self, rid: str, target: int) -> dict[str, Any]:
        """Move a request; the outcome, whatever it is."""
        body = {"rid": rid, "target": target}
        async with self._session.post(f"{self.url}/ares/migrate", json=body) as answer:
            outcome: dict[str, Any] = await answer.json()
            return outcome

    async def use_policies(self, placement: str, rescheduling: str, admission: str = "") -> None:
        """Change the policies of the cluster; an empty name changes nothing."""
        body = {"placement": placement, "admission": admission, "rescheduling": rescheduling}
        await self.post("/ares/policy", body)

    @asynccontextmanager
    async def policies_kept(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the status; policies that are changed inside are put back in the end."""
        before = await self.status()
        try:
            yield before
        finally:
            await self.use_policies(
                before["placement"], before["rescheduling"], before["admission"]
            )

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The document that a POST is answered with; :class:`LiveError` unless with 200."""
        async with self._session.post(self.url + path, json=body) as answer:
            return await self._document(answer)

    async def _document(self, answer: aiohttp.ClientResponse) -> dict[str, Any]:
        text = await answer.text()
        if answer.status != 200:
            raise LiveError(f"{answer.url} answers {answer.status}: {text[:500]}")
        document: dict[str, Any] = json.loads(text) if text else {}
        return document

    async def stream(self, item: WorkItem) -> AsyncIterator[Chunk]:
        """One request; the pieces of its answer."""
        prompt = {"input_ids": item.input_ids} if item.input_ids else {"text": item.prompt}
        body = {
            **prompt,
            "rid": item.rid,
            "stream": True,
            "sampling_params": {
                **item.sampling_params,
                "stream_interval": self._stream_interval,
            },
        }
        received = 0
        async with self._session.post(f"{self.url}/generate", json=body) as answer:
            if answer.status != 200:
                raise LiveError(f"{answer.status}: {(await answer.text())[:500]}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    raise LiveError(str(piece["error"])[:500])
                ids: list[int] = piece["output_ids"]
                total: int = piece["meta_info"]["completion_tokens"]
                # Pieces repeat what came before, or, by --incremental-streaming-output, do not.
                new = ids[len(ids) - (total - received) :]
                received = total
                yield Chunk(new, piece["meta_info"]["finish_reason"])


def work_items(stream: RequestStream, *, seed: int, name: str = "") -> list[WorkItem]:
    """The requests of ``stream``: random prompts of their lengths (equal where their prefix blocks
    are), answers of exactly their lengths. Under another ``name`` the prompts are others, so that
    no prefix cache knows them from an earlier replay."""
    name = name or stream.name
    source = (seed, crc32(name.encode()))
    lengths = stream.prompt_tokens
    return [
        WorkItem(
            rid=f"{name}-{seed}-{i}",
            arrival_s=float(stream.arrival_s[i]),
            input_ids=_prompt(stream, i, int(lengths[i]), source),
            sampling_params={
                "temperature": 0,
                "ignore_eos": True,
                "max_new_tokens": int(stream.output_tokens[i]),
            },
        )
        for i in range(len(stream))
    ]


def _prompt(stream: RequestStream, index: int, length: int, source: tuple[int, ...]) -> list[int]:
    if stream.prefix_blocks is None:
        return _draw((*source, index), length)
    blocks = stream.prefix_blocks[index]
    shared = [t for b in blocks for t in _draw((*source, 1 << 32, b), stream.block_tokens)]
    return (shared + _draw((*source, index), max(0, length - len(shared))))[:length]


def _draw(seeds: tuple[int, ...], count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seeds).integers(*_TOKENS, size=count).tolist()
    return tokens


async def replay_live(
    server: LiveServer,
    items: list[WorkItem],
    *,
    dilation: float = 1.0,
    sample_interval_s: float = 0.5,
    timeout_s: float = 600.0,
    ours: bool = True,
    on_progress: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Replay ``items`` on a server whose time is ``dilation`` times as slow; all times, given and
    returned, are its own: those of the wall are ``dilation`` times as long.

    ``ours``: the server answers ``/ares/status``, which is sampled.
    """
    later = [replace(item, arrival_s=item.arrival_s * dilation) for item in items]
    run = await replay(
        later,
        server.stream,
        server.status if ours else None,
        sample_interval_s=sample_interval_s * dilation,
        timeout_s=timeout_s * dilation,
        on_progress=on_progress,
    )
    # Requests that were given up would otherwise go on into the next replay.
    given_up = [r.rid for r in run.results if r.error]
    await asyncio.gather(*(server.post("/abort_request", {"rid": rid}) for rid in given_up))
    return contracted(run, dilation)


def contracted(run: Run, dilation: float) -> Run:
    """``run`` with every time divided by ``dilation``."""
    return Run(
        results=[
            replace(
                r,
                sent_s=r.sent_s / dilation,
                first_token_s=r.first_token_s / dilation,
                last_token_s=r.last_token_s / dilation,
                longest_gap_s=r.longest_gap_s / dilation,
            )
            for r in run.results
        ],
        samples=[LoadSample(s.time_s / dilation, s.kv_tokens, s.migrations) for s in run.samples],
        duration_s=run.duration_s / dilation,
    )
