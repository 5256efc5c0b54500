"""Measures tile sizes on the GPU at hand and adds the fastest to ``tuning.json``.

``python -m sglang_ares_kernels.tune [--d 3584 ...] [--dtype bfloat16 ...]``; some minutes a size.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from sglang_ares_kernels.measure import head_layers, seconds
from sglang_ares_kernels.mlp import fused_mlp
from sglang_ares_kernels.reference import reference_mlp
from sglang_ares_kernels.tuning import TABLE, Tiles

BATCHES = (16, 32, 64, 128, 512)
BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def candidates(rows: int) -> list[Tiles]:
    """Tiles worth a try for a batch."""
    blocks = sorted({16, min(64, max(16, rows))})
    choices = itertools.product(
        blocks, (16, 32, 64), (64, 128, 256), (16, 32), (64, 128, 256), (4, 8), (3, 4, 5)
    )
    return [Tiles(m, c1, k1, c2, k2, 64, w, s) for m, c1, k1, c2, k2, w, s in choices]


def fastest(d: int, rows: int, dtype: torch.dtype) -> tuple[Tiles, float]:
    """The fastest tiles that are right, and their seconds within a CUDA graph."""
    layers = head_layers(d, dtype, "cuda")
    states = torch.randn(rows, d, device="cuda", dtype=dtype)
    wanted = reference_mlp(states, layers)
    best: tuple[Tiles, float] | None = None
    for tiles in tqdm(candidates(rows), desc=f"d {d}, batch {rows}, {dtype}", leave=False):
        out = torch.full((rows, wanted.shape[1]), float("nan"), device="cuda")
        try:
            fused_mlp(states, layers, tiles, out)
        except Exception as error:  # what does not fit into a multiprocessor fails to compile
            if "OutOfResources" not in type(error).__name__:
                raise
            continue
        error_found = float((out.double() - wanted).abs().max() / wanted.abs().max())
        if not error_found < BOUND[dtype]:
            raise AssertionError(f"{tiles}: relative error {error_found}")
        took = seconds(lambda tiles=tiles, out=out: fused_mlp(states, layers, tiles, out))
        if best is None or took < best[1]:
            best = tiles, took
    assert best is not None
    return best


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[2048, 3584, 4096, 5120, 8192])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on")
    table: dict[str, Any] = json.loads(TABLE.read_text())
    mine = table.setdefault(torch.cuda.get_device_name(), {})
    for name, d in itertools.product(args.dtype, args.d):
        entries = [e for e in mine.get(name, []) if e["d"] != d]
        for rows in BATCHES:
            tiles, took = fastest(d, rows, getattr(torch, name))
            entries.append(
                {"d": d, "max_rows": rows, "tiles": asdict(tiles), "us": round(1e6 * took, 2)}
            )
        mine[name] = entries
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
