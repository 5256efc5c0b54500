"""Collects training data on a cluster that records its hidden states."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sglang_ares.bench.embedded import failing_with_the_cluster, start_engine
from sglang_ares.srt.predictor.collection import Collection
from sglang_ares.srt.predictor.dataset import RequestRecord
from sglang_ares.srt.predictor.recorder import RecordingReader, request_key

if TYPE_CHECKING:
    from sglang_ares.engine import Engine

SHARD_REQUESTS: Final = 128
WORKER_TIMEOUT_S: Final = 600.0


class ClusterCollection(Collection):
    """Runs the prompts through an engine; any model."""

    def run(self, log: Path) -> None:
        """Collect what is missing; the cluster's own output goes to ``log``."""
        self._rows: dict[bytes, dict[int, Any]] = defaultdict(dict)
        self._ended: list[RequestRecord] = []
        if not self.missing:
            self.console.print(f"all {len(self.prompts)} requests are there already")
            return
        with tempfile.TemporaryDirectory(prefix="ares-states-") as recordings:
            with self.console.status("starting the cluster …"):
                engine = start_engine(
                    log,
                    model_path=self.model_path,
                    ares_decode_workers=1,
                    ares_rescheduling="none",
                    # A busy machine may stop a worker for a while; nothing else would be lost.
                    ares_worker_timeout=WORKER_TIMEOUT_S,
                    ares_predictor="off",
                    ares_predictor_record=recordings,
                    incremental_streaming_output=False,
                )
            try:
                with self.progress():
                    work = engine.loop.create_task(self._collect(engine, Path(recordings)))
                    engine.loop.run_until_complete(failing_with_the_cluster(engine, work))
            finally:
                engine.shutdown()

    async def _collect(self, engine: Engine, recordings: Path) -> None:
        reader = RecordingReader(recordings)
        gate = asyncio.Semaphore(self.at_once)
        encode = engine.tokenizer_manager.tokenizer.encode

        async def one(number: int) -> None:
            async with gate:
                prompt_ids = encode(self.prompts[number])
                answer = await engine.async_generate(
                    input_ids=prompt_ids,  # an empty text is no prompt, the first token alone is
                    sampling_params={
                        "max_new_tokens": self.max_new_tokens,
                        "temperature": self.temperature,
                        "sampling_seed": self.sampling_seed(number),
                    },
                    rid=f"collect-{number}",
                )
            meta = answer["meta_info"]
            cut_off = meta["finish_reason"]["type"] == "length"
            length = int(meta["completion_tokens"])
            self._ended.append(self.record(number, prompt_ids, length, cut_off))
            if len(self._ended) >= SHARD_REQUESTS:
                self._write_shard(reader)

        try:
            await asyncio.gather(*(one(number) for number in self.missing))
        finally:
            self._write_shard(reader)

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
            self.writer.add(np.stack(states), rows, self._ended)
        self._ended = []
