"""Measures tile sizes on the GPU at hand and adds the fastest to ``tuning.json``.

``python -m sglang_ares_kernels.tune [--d 3584 ...] [--dtype bfloat16 ...]``. Kernels are compiled
by several processes first: a minute for a hidden size on 16 cores, some seconds to time them.
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

BATCHES = (16, 32, 64, 128, 512)
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
_WHOLE = 1 << 16  # a split that is none
# Shared memory that a program may use, in bytes.
_SHARED = 200 << 10


def rounds(d: int, rows: int) -> list[dict[str, Sequence[int]]]:
    """What is varied together, one after the other, for a batch of ``rows``."""
    halves = [_WHOLE, *(-(-d // parts // 256) * 256 for parts in (2, 4))] if rows > 16 else [_WHOLE]
    return [
        {
            "warps": (4, 8) if rows > 16 else (4,),
            "columns1": (16,) if rows <= 16 else (16, 32, 64),
            "inner1": (128, 256, 512) if rows <= 16 else (128, 256),
            "split1": halves,
            "stages1": (3, 4, 6) if rows <= 16 else (3, 4),
        },
        {
            "columns2": (16, 32),
            "inner2": (128, 256),
            "split2": (512, 1024, 2048),
            "stages2": (2, 3),
        },
        {"inner3": (128, 256, 512), "stages2": (2, 3)},
    ]


def start(rows: int) -> Tiles:
    """Where the search begins."""
    block = min(64, -(-rows // 16) * 16)
    return Tiles(block, 16, 128, _WHOLE, 16, 16, 128, 1024, 256, 4, 4, 2)


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
    except (triton.runtime.errors.OutOfResources, ValueError):  # too much memory, too many parts
        return False
    if not (error_found := relative_error(out, wanted)) < BOUND[dtype]:
        raise AssertionError(f"{tiles}: relative error {error_found}")
    return True


def fastest(
    d: int, rows: int, dtype: torch.dtype, pool: ProcessPoolExecutor, copies: list[Any]
) -> tuple[Tiles, float]:
    """The fastest tiles that were found, and their seconds within a CUDA graph."""
    states = torch.randn(rows, d, device="cuda", dtype=dtype)
    out = torch.empty(rows, 4, device="cuda")
    best = start(rows), float("inf")
    for choices in tqdm(rounds(d, rows), f"{dtype}, d {d}, batch {rows}", leave=False):
        tried = variants(best[0], choices, dtype.itemsize)
        fits = pool.map(_compile, *zip(*((d, rows, dtype, t) for t in tried), strict=True))
        for tiles in [t for t, ok in zip(tried, fits, strict=True) if ok]:
            work = functools.partial(fused_mlp, states, tiles=tiles, out=out)
            took = seconds(work, copies, repeats=5)
            if took < best[1]:
                best = tiles, took
    return best


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
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for name, d in itertools.product(args.dtype, args.d):
            dtype, entries = getattr(torch, name), []
            copies = cold_copies(head_layers(d, dtype, "cuda"))
            for rows in args.batch:
                tiles, took = fastest(d, rows, dtype, pool, copies)
                us = round(1e6 * took, 2)
                print(name, d, rows, us, tiles)
                entries.append({"d": d, "max_rows": rows, "tiles": asdict(tiles), "us": us})
            new = {(e["d"], e["max_rows"]) for e in entries}
            kept = [e for e in mine.get(name, []) if (e["d"], e["max_rows"]) not in new]
            mine[name] = sorted(kept + entries, key=lambda e: (e["d"], e["max_rows"]))
            TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
