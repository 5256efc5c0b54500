"""Measures tile sizes on the GPU at hand and adds the fastest to ``tuning.json``.

``python -m sglang_ares_kernels.tune [--d 3584 ...] [--dtype bfloat16 ...]``. Kernels are compiled
by several processes first: 20 s for a hidden size on 16 cores and an H100, the timing included.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any

import torch
import triton
from tqdm import tqdm

from sglang_ares_kernels.measure import cold_copies, head_layers, relative_error, seconds
from sglang_ares_kernels.mlp import fused_mlp
from sglang_ares_kernels.reference import reference_mlp
from sglang_ares_kernels.tuning import TABLE, Tiles

BATCHES = (16, 32, 64, 256)
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Shared memory that a program may use, in bytes.
_SHARED = 200 << 10


def rounds(rows: int) -> list[dict[str, Sequence[Any]]]:
    """What is varied together, one after the other, for a batch of ``rows``."""
    if rows <= 16:
        first: dict[str, Sequence[Any]] = {"inner1": (128, 256, 512), "stages1": (3, 4, 6)}
        second: dict[str, Sequence[Any]] = {"columns2": (16, 32), "parts2": (2, 4)}
    else:
        first = {
            "slices1": (False, True) if rows <= 32 else (False,),
            "columns1": (16, 32, 64) if rows <= 32 else (32, 64, 128),
            "parts1": (2, 4) if rows <= 128 else (1, 2),
            "stages1": (3, 6),
        }
        second = {"columns2": (32, 64), "parts2": (2, 4) if rows <= 128 else (1, 2)}
    third = {"inner3": (128, 256), "stages2": (2, 3)}
    return [first, second, third, {"inner1": (64, 128, 256), "warps": (4, 8)}]


def start(rows: int) -> Tiles:
    """Where the search begins."""
    if rows <= 16:
        return Tiles(16, 16, 256, 1, True, 16, 16, 128, 2, 256, 4, 6, 3)
    block = min(64, -(-rows // 16) * 16)
    if rows > 128:
        return Tiles(block, 64, 64, 1, False, 16, 32, 128, 1, 128, 4, 4, 2)
    return Tiles(block, 64, 128, 4, False, 16, 32, 128, 2, 256, 4, 4, 3)


def variants(tiles: Tiles, choices: dict[str, Sequence[int]], size: int) -> list[Tiles]:
    """``tiles`` and all combinations of the choices; ``size``: bytes of a number."""
    some = (
        replace(tiles, **dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    )
    fit = (
        t
        for t in some
        if t.inner1 >= 16 * t.warps
        and (t.rows1 + t.columns1) * t.inner1 * size * (t.stages1 - 1) <= _SHARED
    )
    return [*dict.fromkeys([tiles, *fit])]


def _compile(d: int, rows: int, dtype: torch.dtype, tiles: Tiles) -> bool:
    """Compile and run once; into the cache on disk. False for tiles that do not fit."""
    layers = head_layers(d, dtype, "cuda")
    states = torch.randn(rows, d, device="cuda", dtype=dtype)
    wanted = reference_mlp(states, layers)
    out = torch.full((rows, wanted.shape[1]), float("nan"), device="cuda")
    try:
        fused_mlp(states, layers, tiles, out)
    except triton.runtime.errors.OutOfResources:
        return False
    if not (error_found := relative_error(out, wanted)) < BOUND[dtype]:
        raise AssertionError(f"{tiles}: relative error {error_found}")
    return True


class Case:
    """A hidden size, dtype and batch, and the fastest tiles for it so far."""

    def __init__(self, d: int, rows: int, dtype: torch.dtype) -> None:
        self.d, self.rows, self.dtype = d, rows, dtype
        self.best = start(rows)
        self.seconds = float("inf")
        self.rounds = rounds(rows)

    def tried_in(self, number: int) -> list[Tiles]:
        """The tiles of a round."""
        return variants(self.best, self.rounds[number], self.dtype.itemsize)

    def time(self, tried: list[Tiles], copies: list[Any]) -> None:
        """Keep the fastest, within a CUDA graph."""
        states = torch.randn(self.rows, self.d, device="cuda", dtype=self.dtype)
        out = torch.empty(self.rows, 4, device="cuda")
        for tiles in tried:
            work = functools.partial(fused_mlp, states, tiles=tiles, out=out)
            took = seconds(work, copies, repeats=5)
            if took < self.seconds:
                self.best, self.seconds = tiles, took


def search(cases: list[Case], pool: ProcessPoolExecutor) -> None:
    """Find the fastest tiles of every case: in each round all of their variants are compiled."""
    for number in range(max(len(case.rounds) for case in cases)):
        tried = [(case, tiles) for case in cases for tiles in case.tried_in(number)]
        jobs = ((c.d, c.rows, c.dtype, tiles) for c, tiles in tried)
        ready = pool.map(_compile, *zip(*jobs, strict=True))
        fits = list(tqdm(ready, f"round {number + 1}: compile", len(tried), mininterval=5))
        for d, dtype in dict.fromkeys((case.d, case.dtype) for case in cases):
            copies = cold_copies(head_layers(d, dtype, "cuda"))
            for case in (c for c in cases if (c.d, c.dtype) == (d, dtype)):
                own = [t for (c, t), ok in zip(tried, fits, strict=True) if ok and c is case]
                case.time(own, copies)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[2048, 3584, 4096, 5120, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    table: dict[str, Any] = json.loads(TABLE.read_text())
    mine = table.setdefault(torch.cuda.get_device_name(), {})
    cases = [
        Case(d, rows, getattr(torch, name))
        for name, d, rows in itertools.product(args.dtype, args.d, args.batch)
    ]
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        search(cases, pool)
    for case in cases:
        entry = {
            "d": case.d,
            "max_rows": case.rows,
            "tiles": asdict(case.best),
            "us": round(1e6 * case.seconds, 2),
        }
        name = str(case.dtype).removeprefix("torch.")
        others = [e for e in mine.get(name, []) if (e["d"], e["max_rows"]) != (case.d, case.rows)]
        mine[name] = sorted([*others, entry], key=lambda e: (e["d"], e["max_rows"]))
        print(name, *entry.values())
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
