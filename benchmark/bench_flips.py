"""How long a busy worker takes to change its role, and whether anybody notices.

Two arms, each on a cluster of its own: a decode worker that is to prefill is emptied by live
migration, or its requests finish where they are. Under a steady load of short requests, and some
long ones that are always resident, a worker whose role can spare it is made one of the other role
every few seconds. Every output is compared with an undisturbed run's; at the end every worker must
hold what it held at the start. The time is the controller's, from the decision to the worker's
word that it serves in its new role.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from migration_load import running_server
from sglang_ares.bench.report import machine, percentile, write_json

ARMS = {"migrate": "--ares-role-emptying=migrate", "wait": "--ares-role-emptying=wait"}
SHORT_PROMPTS, LONG_PROMPTS = 64, 8
SHORT_TOKENS = (4, 32)


@dataclass(frozen=True)
class Flip:
    """One change of a role. ``resident``: requests the worker held at its start; ``seconds`` from
    the decision to service in the new role, ``emptying_s`` of it until nothing was left."""

    worker: int
    role: str
    resident: int
    seconds: float
    emptying_s: float


@dataclass
class ArmRun:
    """What one arm did."""

    flips: list[Flip] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    long_requests: int = 0
    mismatches: int = 0
    failed: int = 0
    duration_s: float = 0.0
    migrations: dict[str, Any] = field(default_factory=dict)
    balanced: bool = False


class Load:
    """Requests with known outputs, on one server."""

    def __init__(self, http: httpx.AsyncClient, seed: int, long_tokens: int) -> None:
        rng = random.Random(seed)
        self._http = http
        self._ids = itertools.count()
        short = [(_prompt(rng), rng.randint(*SHORT_TOKENS)) for _ in range(SHORT_PROMPTS)]
        self.short = list(range(SHORT_PROMPTS))
        self.long = list(range(SHORT_PROMPTS, SHORT_PROMPTS + LONG_PROMPTS))
        self._prompts = [*short, *((_prompt(rng), long_tokens) for _ in range(LONG_PROMPTS))]
        self._references: dict[int, Any] = {}

    async def run(self, which: int) -> Any:
        """One request: its output tokens, text and way of ending."""
        prompt, tokens = self._prompts[which]
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        body = {"rid": f"r{next(self._ids)}", "input_ids": prompt, "sampling_params": params}
        answer = await self._http.post("/generate", json=body)
        if answer.status_code != 200:
            return None
        document = answer.json()
        return document["output_ids"], document["text"], document["meta_info"]["finish_reason"]

    async def learn(self) -> None:
        """Run everything once, undisturbed."""
        everything = [*self.short, *self.long]
        outputs = await asyncio.gather(*(self.run(i) for i in everything))
        self._references = dict(zip(everything, outputs, strict=True))

    def judge(self, which: int, output: Any, run: ArmRun) -> None:
        """Count a request and compare its output."""
        run.requests += 1
        run.long_requests += which in self.long
        run.failed += output is None
        run.mismatches += output is not None and output != self._references[which]


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(10, 250) for _ in range(rng.randint(8, 120))]


async def change_roles(
    http: httpx.AsyncClient, options: argparse.Namespace, run: ArmRun, wanted: int, bar: tqdm[Any]
) -> None:
    """Flip until ``wanted`` flips are done."""
    rng = random.Random(options.seed + 1)
    while len(run.flips) < wanted:
        await asyncio.sleep(options.rest)
        workers = (await http.get("/ares/status")).json()["workers"]
        by_role = {
            role: [w["id"] for w in workers if w["role"] == role] for role in ("prefill", "decode")
        }
        spare = [
            (worker, "decode" if role == "prefill" else "prefill")
            for role, ids in by_role.items()
            for worker in ids
            if len(ids) > 1
        ]
        worker, role = rng.choice(spare)
        answer = await http.post("/ares/role", json={"worker": worker, "role": role})
        document = answer.json()
        if document["outcome"] != "changed":
            run.refused[document["reason"]] += 1
            continue
        run.flips.append(
            Flip(worker, role, document["requests"], document["seconds"], document["emptying_s"])
        )
        bar.update()


async def measure(options: argparse.Namespace, url: str, arm: str) -> ArmRun:
    """One arm."""
    run = ArmRun()
    wanted = options.flips if arm == "migrate" else options.wait_flips
    least = options.requests if arm == "migrate" else 0
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=1200) as http:
        load = Load(http, options.seed, options.long_tokens)
        await load.learn()
        done = asyncio.Event()
        started = time.monotonic()

        async def keep(pool: list[int], number: int) -> None:
            rng = random.Random(f"{options.seed}-{pool[0]}-{number}")
            while not done.is_set():
                which = rng.choice(pool)
                load.judge(which, await load.run(which), run)

        clients = [asyncio.create_task(keep(load.short, i)) for i in range(options.at_once)]
        clients += [asyncio.create_task(keep(load.long, i)) for i in range(options.residents)]
        with tqdm(total=wanted, desc=f"flips ({arm})", unit="flip") as bar:
            await change_roles(http, options, run, wanted, bar)
            while run.requests < least:
                bar.set_postfix_str(f"{run.requests} requests")
                await change_roles(http, options, run, len(run.flips) + 1, bar)
        done.set()
        await asyncio.gather(*clients)
        run.duration_s = time.monotonic() - started
        run.balanced, run.migrations = await settle(http)
    return run


async def settle(http: httpx.AsyncClient) -> tuple[bool, dict[str, Any]]:
    """Whether every worker gives back all it held, and what was migrated."""
    deadline = time.monotonic() + 60
    while True:
        status = (await http.get("/ares/status")).json()
        balanced = not status["requests"] and all(
            w["pools"]["idle"]
            and w["pools"]["kv_free"] + w["pools"]["kv_cached"] == w["kv_capacity"]
            and not w["pools"]["kv_locked"]
            for w in status["workers"]
        )
        if balanced or time.monotonic() > deadline:
            return balanced, status["migrations"]
        await asyncio.sleep(0.5)


def summary(run: ArmRun) -> dict[str, Any]:
    """The figures of one arm."""
    by_role = {
        role: [f for f in run.flips if f.role == role and (f.resident or role == "decode")]
        for role in ("prefill", "decode")
    }
    return {
        "requests": run.requests,
        "long_requests": run.long_requests,
        "mismatches": run.mismatches,
        "failed": run.failed,
        "balanced": run.balanced,
        "duration_s": run.duration_s,
        "flips": len(run.flips),
        "refused": dict(run.refused),
        "seconds": {
            f"to {role}": {
                "flips": len(flips),
                "resident_mean": sum(f.resident for f in flips) / len(flips),
                **{f"p{q}": percentile([f.seconds for f in flips], q) for q in (50, 99)},
                "worst": max(f.seconds for f in flips),
            }
            for role, flips in by_role.items()
            if flips
        },
        "migrations": run.migrations,
    }


def main() -> int:
    """Run both arms, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=60, help="flips of the migrating arm")
    parser.add_argument("--requests", type=int, default=3000, help="requests of that arm")
    parser.add_argument("--wait-flips", type=int, default=10, help="flips of the waiting arm")
    parser.add_argument("--at-once", type=int, default=8, help="short requests at a time")
    parser.add_argument("--residents", type=int, default=4, help="long requests at a time")
    parser.add_argument("--long-tokens", type=int, default=1500, help="output of a long request")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds between two flips")
    parser.add_argument("--prefill-workers", type=int, default=2)
    parser.add_argument("--decode-workers", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/flips.json"))
    parser.add_argument("--build", type=Path, default=Path("build"), help="for the servers' logs")
    options = parser.parse_args()
    options.build.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    sound = True
    for arm in options.arms:
        log = options.build / f"flips-{arm}.log"
        flags = (
            f"--ares-prefill-workers={options.prefill_workers}",
            f"--ares-decode-workers={options.decode_workers}",
            "--ares-role-change-timeout=600",
            ARMS[arm],
        )
        with running_server(log, *flags) as url:
            run = asyncio.run(measure(options, url, arm))
        integrity = "integrity check failed" not in log.read_text()
        figures[arm] = {**summary(run), "integrity_checks_passed": integrity}
        raw[arm] = [asdict(f) for f in run.flips]
        sound = sound and integrity and run.balanced and not (run.mismatches or run.failed)
        print(f"{arm}: {figures[arm]}")
        document = {
            "command": " ".join(sys.argv),
            "seed": options.seed,
            "machine": machine(),
            "arms": figures,
            "flips": raw,
        }
        write_json(options.out, document)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
