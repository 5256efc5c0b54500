"""Measures tile sizes on the GPU at hand and adds the fastest to ``tuning.json``.

``python -m sglang_ares_kernels.tune [--d 3584 ...] [--dtype bfloat16 ...]``. Kernels are compiled
by several processes first: a minute for a hidden size on 16 cores, some seconds to time them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from sglang_ares_kernels.measure import cold_copies, head_layers, relative_error, seconds
from sglang_ares_kernels.mlp import fused_mlp
from sglang_ares_kernels.reference import reference_mlp
from sglang_ares_kernels.tuning import TABLE, Tiles, tiles_for

BATCHES = (16, 32, 64, 128, 512)
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Shared memory of a multiprocessor that a program may use, in bytes.
_SHARED = 200 << 10


def candidates(rows: int, size: int) -> list[Tiles]:
    """Tiles worth a try for a batch; ``size``: bytes of a number."""
    rows1 = [min(rows, 16)] if rows <= 16 else [min(rows, 32), min(rows, 64)]
    rows1 = rows1 if rows < 128 else [64, 128]
    columns1 = (16,) if rows <= 16 else (16, 32) if rows < 128 else (32, 64)
    found = {
        Tiles(m, c, k, min(m, r2), c2, k2, k3, w, s)
        for m, c, k, (r2, c2, k2), k3, w, s in itertools.product(
            rows1,
            columns1,
            (64, 128, 256, 512),
            ((16, 16, 256), (16, 32, 128), (32, 32, 128)),
            (64, 128),
            (4, 8),
            (3, 4, 6),
        )
        if max((m + c) * k, (min(m, r2) + c2) * k2, (min(m, r2) + 64) * k3) * size * (s - 1)
        <= _SHARED
    }
    return sorted(found, key=str)


def _compile(d: int, rows: int, dtype: torch.dtype, tiles: Tiles) -> bool:
    """Compile and run once; into the cache on disk. False for tiles that do not fit."""
    layers = head_layers(d, dtype, "cuda")
    states = torch.randn(rows, d, device="cuda", dtype=dtype)
    wanted = reference_mlp(states, layers)
    out = torch.full((rows, wanted.shape[1]), float("nan"), device="cuda")
    try:
        fused_mlp(states, layers, tiles, out)
    except Exception as error:  # what does not fit into a multiprocessor fails to compile
        if "OutOfResources" not in type(error).__name__:
            raise
        return False
    if not (error_found := relative_error(out, wanted)) < BOUND[dtype]:
        raise AssertionError(f"{tiles}: relative error {error_found}")
    return True


def tune(
    d: int,
    batches: Sequence[int],
    dtype: torch.dtype,
    pool: ProcessPoolExecutor,
    tries: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The fastest of ``tries`` tiles for each batch, the present ones among them."""
    choose, tried = random.Random(seed), []
    for rows in batches:
        known = candidates(rows, dtype.itemsize)
        some = choose.sample(known, min(tries, len(known)))
        present = tiles_for(d, rows, dtype, torch.device("cuda"))
        tried += [(rows, tiles) for tiles in {present: None, **dict.fromkeys(some)}]
    ready = pool.map(
        _compile, *zip(*((d, rows, dtype, tiles) for rows, tiles in tried), strict=True)
    )
    fits = list(tqdm(ready, f"d {d}, {dtype}: compile", len(tried), leave=False))
    copies = cold_copies(head_layers(d, dtype, "cuda"))
    best: dict[int, tuple[float, Tiles]] = {}
    for (rows, tiles), ok in tqdm([*zip(tried, fits, strict=True)], "time", leave=False):
        if not ok:
            continue
        states = torch.randn(rows, d, device="cuda", dtype=dtype)
        out = torch.empty(rows, 4, device="cuda")
        work = lambda layers, *a: fused_mlp(states, layers, tiles, out)  # noqa: B023, E731
        took = seconds(work, copies, repeats=5)
        if rows not in best or took < best[rows][0]:
            best[rows] = took, tiles
    return [
        {"d": d, "max_rows": rows, "tiles": asdict(tiles), "us": round(1e6 * took, 2)}
        for rows, (took, tiles) in sorted(best.items())
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[2048, 3584, 4096, 5120, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--tries", type=int, default=1000, help="candidates tried for each batch")
    parser.add_argument("--seed", type=int, default=0, help="seed of that choice")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    table: dict[str, Any] = json.loads(TABLE.read_text())
    mine = table.setdefault(torch.cuda.get_device_name(), {})
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        for name, d in itertools.product(args.dtype, args.d):
            entries = tune(d, args.batch, getattr(torch, name), pool, args.tries, args.seed)
            new = {(e["d"], e["max_rows"]) for e in entries}
            kept = [e for e in mine.get(name, []) if (e["d"], e["max_rows"]) not in new]
            mine[name] = sorted(kept + entries, key=lambda e: (e["d"], e["max_rows"]))
            TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
