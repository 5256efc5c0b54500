"""What moving a request costs: its own pause, the others' steps, the KV that has to be sent.

Pause: a request of each context length is moved to and fro between two decode workers that decode
others meanwhile; once with live copy and once stopped first, on clusters that take turns
(A B B A …). The prefix cache is off, so that every move sends everything. Steps: the gaps between
tokens of requests that stay on the source, from the command to the moved request's last token
there; after each live copy, for as many steps, while nothing happens, and after a command to move
the request to where it is, which is refused: that is what the command alone costs, which a
controller that moves by itself does not need. Prefix reuse: one move each of requests whose prompts
share a part with prompts that the target has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from migration_load import Client, Stream, running_server
from sglang_ares.bench.pauses import (
    Landing,
    Move,
    PauseSummary,
    as_document,
    gaps_ending_within,
    longest_gap,
    parse_landings,
    plot_pauses,
    step_ratio,
    summarize_pauses,
)
from sglang_ares.bench.report import machine, percentile, write_json

LIVE, STOPPED = "live copy", "stop and copy"
ARM_FLAGS = {LIVE: "--ares-migration-copy=live", STOPPED: "--ares-migration-copy=stopped"}
COMMON_FLAGS = (
    "--max-total-tokens=65536",
    "--ares-migration-memory-share=0.9",
    "--incremental-streaming-output",
)
LANDS_WITHIN_S = 10.0
# What happens while the others' steps are looked at.
NOTHING, COMMAND, COPY = "nothing", "a refused command", "a copy"
BACKGROUND_TOKENS = 64


def token_ids(rng: random.Random, count: int) -> list[int]:
    """A prompt of random bytes, as the demo model has them."""
    return [rng.randrange(10, 250) for _ in range(count)]


class PauseRun:
    """Moves of one cluster, length by length."""

    def __init__(self, arm: str, options: argparse.Namespace, log: Path, bar: tqdm[Any]) -> None:
        self._arm = arm
        self._options = options
        self._log = log
        self._bar = bar
        self.moves: list[Move] = []
        # Gaps (s) between tokens of others on the source, by what happened and by length.
        self.gaps: dict[str, dict[int, list[float]]] = {
            what: defaultdict(list) for what in (NOTHING, COMMAND, COPY)
        }

    async def run(self, url: str, round_number: int) -> None:
        """Move requests of every length."""
        async with Client(url) as client:
            workers = await client.decode_workers()
            for length in self._options.lengths:
                rng = random.Random(f"{self._options.seed}-{round_number}-{length}")
                others = await self._background(client, workers, rng, length)
                rid = f"mover-{self._arm.split()[0]}-{round_number}-{length}"
                mover = client.start(rid, token_ids(rng, length), 12_000)
                await self._move_to_and_fro(client, workers, mover, others, length)
                await client.end(mover, *(s for streams in others.values() for s in streams))

    async def _background(
        self, client: Client, workers: list[int], rng: random.Random, length: int
    ) -> dict[int, list[Stream]]:
        """As many short requests on each worker."""
        others: dict[int, list[Stream]] = {w: [] for w in workers}
        for worker in workers:
            for i in range(self._options.background):
                rid = f"other-{length}-{worker}-{i}-{rng.random()}"
                stream = client.start(rid, token_ids(rng, BACKGROUND_TOKENS), 12_000)
                if await client.where(stream) != worker:
                    await client.move(stream, worker)
                others[worker].append(stream)
        return others

    async def _move_to_and_fro(
        self,
        client: Client,
        workers: list[int],
        mover: Stream,
        others: dict[int, list[Stream]],
        length: int,
    ) -> None:
        here = await client.where(mover)
        answers = []
        for _ in range(self._options.moves):
            await asyncio.sleep(self._options.rest)
            sent_at = asyncio.get_running_loop().time()
            target = next(w for w in workers if w != here)
            answer = await client.move(mover, target)
            ended_at = asyncio.get_running_loop().time()
            await asyncio.sleep(0.1)
            if answer["outcome"] != "completed":
                self._bar.write(f"{mover.rid}: {answer}")
                continue
            stopped_at, _ = longest_gap(mover.times, sent_at, ended_at + 0.1)
            self._note(COPY, length, others[here], sent_at, stopped_at)
            around = gaps_ending_within(mover.times, sent_at - 1, sent_at)
            answers.append((answer, 1e3 * percentile(around, 50)))
            here = target
            if self._arm == LIVE:
                steps = sum(sent_at < t <= stopped_at for t in mover.times)
                await self._without_copy(client, mover, here, others[here], length, steps)
            self._bar.update()
        landings = await self._landings(mover.rid, len(answers))
        for landing, (answer, step_ms) in zip(landings, answers, strict=True):
            self.moves.append(
                Move(
                    arm=self._arm,
                    length=length,
                    pause_ms=landing.pause_ms,
                    steps=landing.steps,
                    duration_ms=answer["duration_ms"],
                    step_ms=step_ms,
                    tokens_sent=answer["tokens_sent"],
                    tokens_saved=answer["tokens_saved"],
                )
            )

    async def _without_copy(
        self,
        client: Client,
        mover: Stream,
        here: int,
        others: list[Stream],
        length: int,
        steps: int,
    ) -> None:
        """Look at the others' steps until ``mover`` has made as many as during its copy (a window
        that ends with a step favours long steps, so all must), twice: as they are, and after a
        command that is refused."""
        for what in (NOTHING, COMMAND):
            await asyncio.sleep(self._options.rest)
            began, made = asyncio.get_running_loop().time(), len(mover.times)
            if what == COMMAND:
                answer = await client.move(mover, here)
                if answer["outcome"] != "refused":
                    raise SystemExit(f"a move to where the request is was not refused: {answer}")
            while len(mover.times) < made + steps:
                await asyncio.sleep(0.1)
            if steps:
                self._note(what, length, others, began, mover.times[made + steps - 1])

    def _note(self, what: str, length: int, others: list[Stream], start: float, end: float) -> None:
        for other in others:
            self.gaps[what][length] += gaps_ending_within(other.times, start, end)

    async def _landings(self, rid: str, count: int) -> list[Landing]:
        """The pauses that the server has logged, once it has: at the first token on the target."""
        deadline = asyncio.get_running_loop().time() + LANDS_WITHIN_S
        while True:
            landings = [x for x in parse_landings(self._log.read_text()) if x.rid == rid]
            if len(landings) >= count or asyncio.get_running_loop().time() > deadline:
                return landings
            await asyncio.sleep(0.1)


def measure_pauses(options: argparse.Namespace, build: Path) -> list[PauseRun]:
    """Both arms in turn."""
    order = [(LIVE, STOPPED) if i % 2 == 0 else (STOPPED, LIVE) for i in range(options.rounds)]
    runs = []
    total = 2 * options.rounds * len(options.lengths) * options.moves
    with tqdm(total=total, desc="moves", unit="move") as bar:
        for number, arms in enumerate(order):
            for arm in arms:
                log = build / f"server-{arm.split()[0]}-{number}.log"
                flags = (*COMMON_FLAGS, ARM_FLAGS[arm], "--ares-decode-radix-cache=off")
                with running_server(log, *flags, *options.server_flags) as url:
                    run = PauseRun(arm, options, log, bar)
                    asyncio.run(run.run(url, number))
                    runs.append(run)
    return runs


async def measure_reuse(options: argparse.Namespace, url: str) -> dict[int, dict[str, float]]:
    """By shared percentage: tokens moved, sent, and saved, means over the moves."""
    result: dict[int, dict[str, float]] = {}
    async with Client(url) as client:
        workers = await client.decode_workers()
        for share in tqdm(options.shares, desc="shared prefixes", unit="share"):
            rng = random.Random(f"{options.seed}-reuse-{share}")
            common = token_ids(rng, options.reuse_length * share // 100)
            rows = []
            # The first request leaves the common part on both workers.
            for i in range(options.reuse_moves + 1):
                own = token_ids(rng, options.reuse_length - len(common))
                stream = client.start(f"reuse-{share}-{i}", common + own, 4_000)
                here = await client.where(stream)
                answer = await client.move(stream, next(w for w in workers if w != here))
                await client.end(stream)
                if answer["outcome"] != "completed":
                    raise SystemExit(f"a move did not complete: {answer}")
                rows.append(answer)
            result[share] = {
                key: sum(r[key] for r in rows[1:]) / len(rows[1:])
                for key in ("tokens", "tokens_sent", "tokens_saved", "kv_bytes", "duration_ms")
            }
    return result


def by_arm_and_length(runs: list[PauseRun]) -> dict[str, dict[int, PauseSummary]]:
    """Summaries over all rounds."""
    moves: dict[str, dict[int, list[Move]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for move in run.moves:
            moves[move.arm][move.length].append(move)
    return {
        arm: {n: summarize_pauses(group) for n, group in sorted(by_length.items())}
        for arm, by_length in moves.items()
    }


def step_ratios(runs: list[PauseRun], lengths: list[int]) -> dict[str, dict[str, Any]]:
    """Others' mean step by context length and over all: during live copies over those while nothing
    happened, and what of it is the command's and what the copy's."""
    live = [run for run in runs if run._arm == LIVE]
    rows: dict[str, dict[str, Any]] = {}
    for name, chosen in [*((str(n), [n]) for n in lengths), ("all", lengths)]:
        gaps = {
            what: [[g for run in live for g in run.gaps[what][n]] for n in chosen]
            for what in (NOTHING, COMMAND, COPY)
        }
        row: dict[str, Any] = {}
        for title, what, base in (
            ("copy and command over nothing", COPY, NOTHING),
            ("command over nothing", COMMAND, NOTHING),
            ("copy and command over command", COPY, COMMAND),
        ):
            ratio = step_ratio(gaps[what], gaps[base])
            row[title] = {
                "ratio": round(ratio.ratio, 3),
                "interval_95": [round(ratio.low, 3), round(ratio.high, 3)],
            }
        row["gaps"] = {what: sum(map(len, found)) for what, found in gaps.items()}
        if len(chosen) == 1:
            row["median_step_ms"] = round(1e3 * percentile(gaps[NOTHING][0], 50), 2)
        rows[name] = row
    return rows


def report(document: dict[str, Any], arms: dict[str, dict[int, PauseSummary]]) -> None:
    """The figures for the terminal."""
    for arm, by_length in arms.items():
        for length, s in by_length.items():
            print(
                f"{arm:14s} {length:6,d} tokens  pause p50 {s.pause_p50_ms:7.1f} ms"
                f"  p99 {s.pause_p99_ms:7.1f} ms  steps {s.steps_p50:.0f} / {s.steps_p99:.0f}"
                f"  (step {s.step_ms:.1f} ms, {s.moves} moves)"
                f"  {'within' if s.within_target else 'beyond'} the target"
            )
    for name, row in document.get("others_steps_during_live_copy", {}).items():
        shown = [
            f"{title} × {found['ratio']} ({found['interval_95'][0]} … {found['interval_95'][1]})"
            for title, found in row.items()
            if isinstance(found, dict) and "ratio" in found
        ]
        print(f"others' steps, {name:>6s}: {'; '.join(shown)}")
    for share, row in document.get("prefix_reuse", {}).items():
        print(
            f"{share:>3}% shared: {row['tokens_sent']:.0f} of {row['tokens']:.0f} tokens sent,"
            f" {row['tokens_saved']:.0f} saved"
        )


def main() -> None:
    """Measure, print, plot, and keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--moves", type=int, default=20, help="Moves per length, arm and round.")
    parser.add_argument("--rounds", type=int, default=2, help="Turns of the two arms.")
    parser.add_argument("--background", type=int, default=2, help="Other requests per worker.")
    parser.add_argument("--rest", type=float, default=0.4, help="Seconds between two moves.")
    parser.add_argument("--shares", type=int, nargs="+", default=[0, 50, 75, 90])
    parser.add_argument("--reuse-length", type=int, default=2000, help="Prompt tokens.")
    parser.add_argument("--reuse-moves", type=int, default=8, help="Moves per shared percentage.")
    parser.add_argument("--skip", choices=("pauses", "reuse"), help="Leave a part out.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("build/migration.json"))
    parser.add_argument("--plot", type=Path, default=Path("build/migration_pause.png"))
    options, options.server_flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    build = options.json.parent
    build.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": machine(),
        "seed": options.seed,
    }
    arms: dict[str, dict[int, PauseSummary]] = {}
    if options.skip != "pauses":
        runs = measure_pauses(options, build)
        arms = by_arm_and_length(runs)
        document["pause"] = as_document(arms)
        document["others_steps_during_live_copy"] = step_ratios(runs, options.lengths)
        document["moves"] = [asdict(move) for run in runs for move in run.moves]
        plot_pauses(options.plot, arms, title="Pause of a moved request")
    if options.skip != "reuse":
        log = build / "server-reuse.log"
        with running_server(log, *COMMON_FLAGS, *options.server_flags) as url:
            document["prefix_reuse"] = asyncio.run(measure_reuse(options, url))
    write_json(options.json, document)
    report(document, arms)


if __name__ == "__main__":
    main()
