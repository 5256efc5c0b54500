"""Long runs against a real cluster: many moves, and random faults under load.

    make soak                                          # 5 minutes of random faults
    make soak ARGS="--moves 1000 --faults none"        # 1,000 random moves, nothing else

Every request is one of a fixed set of kinds whose undisturbed outputs are learned first; every
answer is compared with them token by token, and at the end every worker's memory must balance.
The result is printed, and written as JSON with ``--json``. Exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from integration.fault_world import FaultWorld, kill
from integration.servers import start_server, stop_server

FAULTS = ("SIGKILL decode", "SIGSTOP decode", "SIGKILL prefill", "SIGSTOP prefill", "broken copy")


@dataclass
class Result:
    """What happened."""

    seconds: float = 0.0
    requests: int = 0
    mismatches: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    moves: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    recovered: int = 0
    leaks: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was lost, repeated or leaked."""
        return not (self.mismatches or self.errors or self.leaks) and self.requests > 0


def kinds(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Random requests: prompts, lengths and sampling parameters."""
    bodies = []
    for i in range(count):
        sampling: dict[str, Any] = {
            "max_new_tokens": rng.randrange(150, 900),
            "ignore_eos": True,
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "sampling_seed": 10_000 + i,
        }
        if rng.random() < 0.3:
            sampling["top_p"] = rng.choice([0.8, 0.95])
        if rng.random() < 0.2:
            sampling["frequency_penalty"] = rng.choice([0.2, 0.5])
        if rng.random() < 0.2:
            sampling["repetition_penalty"] = 1.1
        bodies.append({"text": f"walk {rng.randrange(5, 40)}\n", "sampling_params": sampling})
    return bodies


class Soak:
    """One run."""

    def __init__(self, world: FaultWorld, args: argparse.Namespace) -> None:
        self._world = world
        self._args = args
        self._rng = random.Random(args.seed)
        self._kinds = kinds(self._rng, args.kinds)
        self._expected: list[dict[str, Any]] = []
        self._stop = asyncio.Event()
        self.result = Result()

    async def run(self) -> Result:
        """Learn the outputs, then load, moves and faults together."""
        async with self._world.client() as client:
            gate = asyncio.Semaphore(8)

            async def learn(i: int) -> dict[str, Any]:
                async with gate:
                    return await self._ask(client, i, f"learn-{i}")

            bar = tqdm(total=len(self._kinds), desc="learn", unit="req", disable=None)
            learning = [asyncio.create_task(learn(i)) for i in range(len(self._kinds))]
            for task in learning:
                task.add_done_callback(lambda _: bar.update())
            self._expected = list(await asyncio.gather(*learning))
            bar.close()
            started = time.monotonic()
            users = [asyncio.create_task(self._user(client, u)) for u in range(self._args.users)]
            movers = [asyncio.create_task(self._mover(client)) for _ in range(8)]
            breaker = asyncio.create_task(self._breaker(client))
            await self._watch(started)
            self._stop.set()
            await asyncio.gather(breaker, *movers, *users)
            self.result.seconds = round(time.monotonic() - started, 1)
            try:
                await self._world.assert_balanced(client, timeout_s=120)
            except AssertionError as error:
                self.result.leaks.append(str(error)[:2000])
        return self.result

    async def _watch(self, started: float) -> None:
        wanted = self._args.moves
        total = wanted or self._args.duration
        with tqdm(total=total, desc="soak", unit="moves" if wanted else "s", disable=None) as bar:
            while True:
                await asyncio.sleep(1)
                moves = self.result.moves["completed"]
                bar.n = min(total, moves if wanted else round(time.monotonic() - started))
                bar.set_postfix(
                    requests=self.result.requests,
                    moves=moves,
                    faults=self.result.faults.total(),
                    wrong=len(self.result.mismatches) + len(self.result.errors),
                )
                if bar.n >= total:
                    return

    async def _ask(self, client: Any, kind: int, rid: str) -> dict[str, Any]:
        body = {**self._kinds[kind], "rid": rid}
        answer = await client.post("/generate", json=body, timeout=600)
        document: dict[str, Any] = answer.json()
        return document

    async def _user(self, client: Any, number: int) -> None:
        rng = random.Random(f"{self._args.seed}-{number}")
        sent = 0
        while not self._stop.is_set():
            kind, sent = rng.randrange(len(self._kinds)), sent + 1
            rid = f"user{number}-{sent}-{kind}"
            got = await self._ask(client, kind, rid)
            self.result.requests += 1
            expected = self._expected[kind]
            if "output_ids" not in got:
                self.result.errors.append(f"{rid}: {str(got)[:300]}")
            elif (got["output_ids"], got["text"]) != (expected["output_ids"], expected["text"]):
                self.result.mismatches.append(rid)

    async def _mover(self, client: Any) -> None:
        while not self._stop.is_set():
            await asyncio.sleep(self._rng.uniform(0.01, 0.2))
            live = (await client.get("/ares/requests", timeout=60)).json()
            ready = await self._world.wait_for(client, prefill=0, decode=0)
            targets = [w["id"] for w in ready["decode"]]
            if not live or len(targets) < 2:
                continue
            request = self._rng.choice(live)
            others = [t for t in targets if t != request["worker"]]
            move = {"rid": request["rid"], "target": self._rng.choice(others)}
            answer = await client.post("/ares/migrate", json=move, timeout=120)
            self.result.moves[answer.json()["outcome"]] += 1

    async def _breaker(self, client: Any) -> None:
        if self._args.faults == "none":
            return
        while not self._stop.is_set():
            await asyncio.sleep(self._rng.uniform(2, 6))
            ready = await self._world.wait_for(client, prefill=2, decode=2)
            fault = self._rng.choice(FAULTS)
            if fault == "broken copy":
                worker = self._rng.choice(ready["decode"])["id"]
                point = f"source:chunk:{self._rng.choice([1, 2])}"
                body = {"worker": worker, "point": point, "action": "fail"}
                await client.post("/ares/fault", json=body, timeout=60)
            else:
                name, role = fault.split()
                kill(self._rng.choice(ready[role]), signal.Signals[name])
            self.result.faults[fault] += 1


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Counter) else value


def main() -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--duration", type=float, default=300, help="seconds (default 300)")
    parser.add_argument("--moves", type=int, default=0, help="stop after so many moves instead")
    parser.add_argument("--faults", choices=["random", "none"], default="random")
    parser.add_argument("--users", type=int, default=10, help="requests at a time (default 10)")
    parser.add_argument("--kinds", type=int, default=40, help="different requests (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    log = Path(tempfile.mkdtemp(prefix="sglang-ares-soak-")) / "server.log"
    print(f"server log: {log}")
    process, server = start_server(
        log,
        "--ares-prefill-workers=2",
        "--ares-decode-workers=3",
        "--ares-rescheduling=none",
        "--ares-report-interval=0.1",
        "--ares-worker-timeout=3",
        "--ares-max-restarts=1000",
        "--ares-max-attempts=50",
        "--ares-fault-injection",
        "--log-level=info",
    )
    try:
        result = asyncio.run(Soak(FaultWorld(server), args).run())
    finally:
        stop_server(process)
    text = log.read_text()
    result.recovered = text.count("recovering rid=")
    result.leaks += [line for line in text.splitlines() if "integrity check failed" in line]
    landed = re.findall(r"landed on=\d+ pause_ms=([\d.]+) steps=(\d+)", text)
    pauses = sorted(float(ms) for ms, _ in landed)
    document = {
        "command": "python test/soak.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.machine()}, CPU only",
        "passed": result.passed,
        "pause_ms": {f"p{q}": pauses[len(pauses) * q // 100] for q in (50, 99) if pauses},
        "pause_in_steps_of_the_target": dict(sorted(Counter(int(n) for _, n in landed).items())),
        **{name: _plain(value) for name, value in vars(result).items()},
    }
    print(json.dumps(document, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
