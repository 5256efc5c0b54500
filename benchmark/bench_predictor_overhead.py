"""Throughput with the length predictor on and off: interleaved rounds in one run.

``python benchmark/bench_predictor_overhead.py [--rounds 5 --requests 32 --tokens 200 --out DIR]``
starts two clusters on this machine, one predicting and one not, and gives them the same greedy
requests in turns, never both at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test"))

from integration.servers import start_server, stop_server
from sglang_ares.bench.report import machine


async def round_of(url: str, requests: int, tokens: int, name: str) -> float:
    """Output tokens per second of one round."""

    async def one(client: httpx.AsyncClient, number: int) -> int:
        body = {
            "rid": f"{name}-{number}",
            "text": f"walk {10 + number % 30}\n",
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        }
        answer = (await client.post("/generate", json=body, timeout=600)).json()
        return int(answer["meta_info"]["completion_tokens"])

    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:
        start = time.perf_counter()
        done = await asyncio.gather(*(one(client, i) for i in range(requests)))
        return sum(done) / (time.perf_counter() - start)


def main() -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build"))
    args = parser.parse_args()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    speeds: dict[str, list[float]] = {"auto": [], "off": []}
    servers: dict[str, Any] = {}
    try:
        for mode in speeds:
            with console.status(f"starting a cluster with --ares-predictor {mode} …"):
                servers[mode] = start_server(
                    args.out / f"predictor-{mode}.log",
                    f"--ares-predictor={mode}",
                    "--ares-rescheduling=none",
                )
        for number in track(range(-1, args.rounds), "rounds"):
            order = list(speeds) if number % 2 else list(speeds)[::-1]
            for mode in order:
                url = servers[mode][1].url
                speed = asyncio.run(round_of(url, args.requests, args.tokens, f"{mode}{number}"))
                if number >= 0:  # the first round connects the workers
                    speeds[mode].append(speed)
    finally:
        for process, _ in servers.values():
            stop_server(process)
    ratios = [on / off for on, off in zip(speeds["auto"], speeds["off"], strict=True)]
    report = {
        "machine": machine(),
        "command": " ".join(["python", *sys.argv]),
        "tokens_per_s": speeds,
        "ratio_of_medians": statistics.median(speeds["auto"]) / statistics.median(speeds["off"]),
        "median_of_ratios": statistics.median(ratios),
    }
    path = args.out / "predictor_overhead.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    console.print(
        f"throughput with the predictor over without: {report['ratio_of_medians']:.3f} "
        f"(medians), {report['median_of_ratios']:.3f} (median of the rounds' ratios)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
