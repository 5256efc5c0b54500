"""Collects training data: runs prompts on a cluster that records its hidden states."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sglang_ares.bench.embedded import failing_with_the_cluster, start_engine
from sglang_ares.srt.predictor.dataset import DatasetInfo, DatasetWriter, RequestRecord
from sglang_ares.srt.predictor.identity import identify
from sglang_ares.srt.predictor.prompts import prompts
from sglang_ares.srt.predictor.recorder import RecordingReader, request_key

if TYPE_CHECKING:
    from sglang_ares.engine import Engine

SHARD_REQUESTS: Final = 128
WORKER_TIMEOUT_S: Final = 600.0


class Collection:
    """One run of ``collect``; what is complete on disk is not run again."""

    def __init__(
        self,
        folder: Path,
        *,
        model_path: str,
        source: str,
        requests: int,
        seed: int,
        max_new_tokens: int,
        temperature: float,
        at_once: int,
    ) -> None:
        self._model_path = model_path
        self._seed = seed
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._at_once = at_once
        self._prompts = prompts(source, requests, seed)
        self._writer = DatasetWriter(
            folder,
            DatasetInfo(
                model=identify(model_path),
                prompts=source,
                seed=seed,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            ),
        )
        self._rows: dict[bytes, dict[int, Any]] = defaultdict(dict)
        self._ended: list[RequestRecord] = []
        self.tokens = 0

    def run(self, log: Path) -> None:
        """Collect what is missing; the cluster's own output goes to ``log``."""
        missing = [i for i in range(len(self._prompts)) if i not in self._writer.done]
        console = Console()
        if not missing:
            console.print(f"all {len(self._prompts)} requests are there already")
            return
        with tempfile.TemporaryDirectory(prefix="ares-states-") as recordings:
            with console.status("starting the cluster …"):
                engine = start_engine(
                    log,
                    model_path=self._model_path,
                    ares_decode_workers=1,
                    ares_rescheduling="none",
                    # A busy machine may stop a worker for a while; nothing else would be lost.
                    ares_worker_timeout=WORKER_TIMEOUT_S,
                    ares_predictor="off",
                    ares_predictor_record=recordings,
                    incremental_streaming_output=False,
                )
            try:
                with Progress(
                    TextColumn("collecting"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("requests, {task.fields[tokens]:,} tokens"),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                    console=console,
                ) as progress:
                    self._bar = progress.add_task("", total=len(self._prompts), tokens=0)
                    self._progress = progress
                    progress.update(self._bar, completed=len(self._prompts) - len(missing))
                    loop = engine.loop
                    work = loop.create_task(self._collect(engine, missing, Path(recordings)))
                    loop.run_until_complete(failing_with_the_cluster(engine, work))
            finally:
                engine.shutdown()

    async def _collect(self, engine: Engine, missing: list[int], recordings: Path) -> None:
        reader = RecordingReader(recordings)
        gate = asyncio.Semaphore(self._at_once)
        encode = engine.tokenizer_manager.tokenizer.encode

        async def one(number: int) -> None:
            async with gate:
                prompt_ids = encode(self._prompts[number])
                answer = await engine.async_generate(
                    input_ids=prompt_ids,  # an empty text is no prompt, the first token alone is
                    sampling_params={
                        "max_new_tokens": self._max_new_tokens,
                        "temperature": self._temperature,
                        "sampling_seed": (self._seed << 20) + number,
                    },
                    rid=f"collect-{number}",
                )
            self._note(number, prompt_ids, answer["meta_info"])
            if len(self._ended) >= SHARD_REQUESTS:
                self._write_shard(reader)

        try:
            await asyncio.gather(*(one(number) for number in missing))
        finally:
            self._write_shard(reader)

    def _note(self, number: int, prompt_ids: list[int], meta: dict[str, Any]) -> None:
        length = int(meta["completion_tokens"])
        self.tokens += length
        self._progress.update(self._bar, advance=1, tokens=self.tokens)
        self._ended.append(
            RequestRecord(
                request=number,
                prompt=self._prompts[number],
                prompt_ids=prompt_ids,
                length=length,
                censored=meta["finish_reason"]["type"] == "length",
            )
        )

    def _write_shard(self, reader: RecordingReader) -> None:
        for block in reader.new_rows():
            for row in block:
                self._rows[bytes(row["key"])][int(row["generated"])] = row["state"]
        states, rows = [], []
        for record in self._ended:
            seen = self._rows.pop(request_key(f"collect-{record.request}"), {})
            for generated in sorted(seen):
                states.append(seen[generated])
                rows.append((record.request, generated, record.length - generated))
        if states:
            self._writer.add(np.stack(states), rows, self._ended)
        self._ended = []
