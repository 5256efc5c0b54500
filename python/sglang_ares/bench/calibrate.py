"""``python -m sglang_ares.bench calibrate``: a profile from a running server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from tqdm import tqdm

from sglang_ares.bench.fit import (
    DecodeSample,
    FitError,
    MoveSample,
    PrefillSample,
    fit_decode,
    fit_moves,
    fit_prefill,
    relative_errors,
)
from sglang_ares.bench.live import LiveError, LiveServer
from sglang_ares.bench.pauses import longest_gap
from sglang_ares.bench.report import machine, percentile
from sglang_ares.bench.server import ServerFailedError, running_server
from sglang_ares.bench.workload import WorkItem
from sglang_ares.profiles.profile import Profile

# Longer than any measurement: the requests are aborted when it has been taken.
_FOR_EVER = 30_000
_POLL_S = 0.05


class Calibration:
    """Measures a server that serves nobody else. All times are divided by its time dilation."""

    def __init__(self, server: LiveServer, options: argparse.Namespace, bar: tqdm[Any]) -> None:
        self._server = server
        self._options = options
        self._bar = bar
        self._rng = random.Random(options.seed)
        self._sent = 0
        self._dilation = 1.0
        # Of KV that really was sent; 1 until a move has told.
        self._bytes_per_token = 1.0
        # Arrival times (s) of tokens, by rid.
        self._times: dict[str, list[float]] = {}

    async def run(self) -> dict[str, list[Any]]:
        """All samples, by kind."""
        async with self._server.policies_kept() as status:
            self._dilation = status["time_dilation"]
            self._decode_workers = [w["id"] for w in status["workers"] if w["role"] == "decode"]
            await self._server.use_policies("", "none")
            return await self._samples()

    async def _samples(self) -> dict[str, list[Any]]:
        samples: dict[str, list[Any]] = {"prefill": [], "decode": [], "move": []}
        for length in self._options.lengths:
            for prompts in self._options.bursts:
                samples["prefill"].append(await self._prefill(prompts, length))
                self._bar.update()
        for batch in self._options.batches:
            for length in self._options.lengths:
                samples["decode"] += await self._decode(batch, length)
                self._bar.update()
        if len(self._decode_workers) > 1:
            await self._move(self._options.lengths[0])  # the workers meet for the first time
            for length in self._options.lengths:
                samples["move"] += await self._moves(length)
                self._bar.update()
        return samples

    # --- requests ---------------------------------------------------------------------------

    def _item(self, length: int, output_tokens: int) -> WorkItem:
        self._sent += 1
        return WorkItem(
            rid=f"calibrate-{self._options.seed}-{self._sent}",
            arrival_s=0.0,
            input_ids=[self._rng.randrange(64, 128) for _ in range(length)],
            sampling_params={
                "temperature": 0,
                "ignore_eos": True,
                "max_new_tokens": output_tokens,
            },
        )

    async def _listen(self, item: WorkItem) -> None:
        times = self._times[item.rid] = []
        async for chunk in self._server.stream(item):
            times += [time.monotonic()] * len(chunk.token_ids)

    @contextlib.asynccontextmanager
    async def _running(self, count: int, length: int) -> AsyncIterator[list[WorkItem]]:
        """``count`` requests that decode for as long as the block runs."""
        items = [self._item(length, _FOR_EVER) for _ in range(count)]
        tasks = [asyncio.create_task(self._listen(item)) for item in items]
        try:
            while any(len(self._times.get(item.rid, ())) < 3 for item in items):
                for task in tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(_POLL_S)
            yield items
        finally:
            for item in items:
                await self._server.post("/abort_request", {"rid": item.rid})
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- measurements -----------------------------------------------------------------------

    async def _prefill(self, prompts: int, length: int) -> PrefillSample:
        took = []
        for _ in range(self._options.repeats):
            items = [self._item(length, 1) for _ in range(prompts)]
            began = time.monotonic()
            await asyncio.gather(*map(self._listen, items))
            took.append(1e3 * (time.monotonic() - began) / self._dilation)
        return PrefillSample(prompts, length, median(took))

    async def _decode(self, batch: int, length: int) -> list[DecodeSample]:
        """The median over the reports of each decode worker while its batch stays the same."""
        seen: dict[int, list[DecodeSample]] = {w: [] for w in self._decode_workers}
        before: dict[int, int] = {}
        age: dict[int, float] = {}
        async with self._running(batch * len(self._decode_workers), length):
            until = time.monotonic() + self._options.seconds * self._dilation
            while time.monotonic() < until:
                for worker in (await self._server.status())["workers"]:
                    name, running = worker["id"], worker["running"]
                    fresh = worker.get("report_age_s", 1e9) < age.get(name, 1e9)
                    age[name] = worker.get("report_age_s", 1e9)
                    if name not in seen or not fresh:
                        continue
                    if worker["decode_step_ms"] > 0 and running == before.get(name):
                        ms = worker["decode_step_ms"] / self._dilation
                        seen[name].append(DecodeSample(running, worker["kv_tokens"], ms))
                    before[name] = running
                await asyncio.sleep(_POLL_S)
        columns = [list(zip(*rows, strict=True)) for rows in seen.values() if rows]
        return [DecodeSample(*map(median, c)) for c in columns]

    async def _moves(self, length: int) -> list[MoveSample]:
        """One move each of as many requests: a second one would find its prefix cached."""
        moves = [await self._move(length) for _ in range(self._options.repeats)]
        return [move for move in moves if move is not None]

    async def _move(self, length: int) -> MoveSample | None:
        async with self._running(1, length) as (item,):
            live = {r["rid"]: r["worker"] for r in await self._server.requests()}
            target = next(w for w in self._decode_workers if w != live[item.rid])
            times = self._times[item.rid]
            known, sent_at = len(times), time.monotonic()
            answer = await self._server.migrate(item.rid, target)
            await asyncio.sleep(0.2 * self._dilation)
            if answer["outcome"] != "completed":
                self._bar.write(f"a move did not complete: {answer['reason']}")
                return None
            steps = [b - a for a, b in pairwise(times[:known])]
            start, end = longest_gap(times, sent_at, time.monotonic())
            pause_s = max(0.0, end - start - percentile(steps, 50)) / self._dilation
            self._bytes_per_token = answer["kv_bytes"] / max(1, answer["tokens_sent"])
            ms = answer["duration_ms"] / self._dilation
            return MoveSample(answer["tokens_sent"], ms, 1e3 * pause_s)

    async def profile(self, samples: dict[str, list[Any]]) -> Profile:
        """The laws behind ``samples``, and the sizes that the server tells of itself."""
        options = self._options
        status, info = await self._server.status(), await self._server.info()
        worker = next(w for w in status["workers"] if w["role"] == "decode")
        chunk = int(info.get("chunked_prefill_size") or 0)
        chunk = chunk if chunk > 0 else int(info["max_prefill_tokens"])
        prefill, hand_over = fit_prefill(samples["prefill"], chunk)
        fixed, tokens_per_s, pause = (
            fit_moves(samples["move"]) if samples["move"] else (0.0, 1e6, 0.0)
        )
        law = fit_decode(samples["decode"])
        worst = abs(relative_errors(law, samples["decode"])).max()
        bytes_per_token = max(1, round(self._bytes_per_token))
        on = machine()
        return Profile(
            name=options.name or options.out.stem,
            hardware=options.hardware
            or f"{on['cores']} cores, {on['architecture']}, torch {on['torch']}",
            model=options.model or str(info.get("served_model_name") or info["model_path"]),
            source=(
                f"python -m sglang_ares.bench {' '.join(sys.argv[1:])} on "
                f"{datetime.now(UTC):%Y-%m-%d}: "
                f"{len(samples['decode'])} decode loads (law within {100 * worst:.1f} %), "
                f"{len(samples['prefill'])} bursts of prompts, {len(samples['move'])} moves."
            ),
            decode=law,
            prefill=prefill,
            kv_capacity_tokens=worker["kv_capacity"],
            kv_bytes_per_token=bytes_per_token,
            link_bytes_per_s=tokens_per_s * bytes_per_token,
            move_fixed_ms=fixed,
            move_pause_ms=pause,
            transfer_fixed_ms=hand_over,
            max_running=info.get("max_running_requests") or worker["pools"]["request_slots_free"],
            chunked_prefill_tokens=chunk,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags; those it does not know are the server's."""
    parser.add_argument("--out", type=Path, required=True, help="the profile to write (JSON)")
    parser.add_argument(
        "--url", help="a running server that serves nobody else; else one is started"
    )
    parser.add_argument("--name", help="of the profile; default: the file's")
    parser.add_argument("--hardware", help="for the profile; default: this machine")
    parser.add_argument("--model", help="for the profile; default: the server's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32], metavar="N")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 2048], metavar="TOKENS")
    parser.add_argument("--bursts", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--repeats", type=int, default=5, help="bursts and moves of one kind")
    parser.add_argument("--seconds", type=float, default=3.0, help="per batch and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log", type=Path, default=Path("build/calibrate.log"), help="the server's"
    )


async def _calibrate(url: str, options: argparse.Namespace) -> Profile:
    loads = len(options.lengths) * (len(options.batches) + len(options.bursts) + 1)
    with tqdm(total=loads, desc="calibrate", unit="load") as bar:
        async with LiveServer(url) as server:
            calibration = Calibration(server, options, bar)
            return await calibration.profile(await calibration.run())


def main(options: argparse.Namespace, server_flags: list[str]) -> int:
    """Measure and write; the exit status."""
    try:
        if options.url:
            profile = asyncio.run(_calibrate(options.url, options))
        else:
            with running_server(options.log, *server_flags) as url:
                profile = asyncio.run(_calibrate(url, options))
    except (FitError, LiveError, ServerFailedError, OSError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    print(options.out.read_text(), end="")
    return 0
