"""Tile sizes of the kernel, by device, dtype, hidden size and batch: data in ``tuning.json``.

``python -m sglang_ares_kernels.tune`` measures and writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

TABLE: Final = Path(__file__).with_name("tuning.json")
# Whose tiles other devices use until they have been tuned, if they have as much shared memory; else
# tiles that were not measured, which need less than 99 KiB.
DEFAULT_DEVICE: Final = "NVIDIA H100 80GB HBM3"
SMALL: Final = "small"
_LARGE_SHARED_BYTES: Final = 227 << 10


@dataclass(frozen=True)
class Tiles:
    """For the first and the second layer: rows of a block (at least 16), output columns of a tile,
    inputs read at a time, and parts of the inputs, one program each. ``slices1``: in the first
    layer each warp takes a slice of the inputs, as in the others, not of the rows. For the third
    layer, whose blocks have ``rows2`` rows, ``inner3`` inputs are read at a time. Then warps, and
    pipeline stages of the first layer and of the later ones.

    ``rows1`` is a multiple of ``rows2``; inputs read at a time are at least 16 for each warp.
    """

    rows1: int
    columns1: int
    inner1: int
    parts1: int
    slices1: bool
    rows2: int
    columns2: int
    inner2: int
    parts2: int
    inner3: int
    warps: int
    stages1: int
    stages2: int


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


@cache
def _find(device: str, default: str, dtype: str, d: int, rows: int) -> Tiles:
    table = _table()
    # Numbers of the same size have the same tiles.
    same_size = ("float32",) if dtype == "float32" else (dtype, "bfloat16")
    entries = next(
        table[name][kind]
        for name in (device, default)
        for kind in same_size
        if kind in table.get(name, {})
    )
    # The nearest hidden size measured, then the smallest batch that is not below this one, if any.
    nearest = min({e["d"] for e in entries}, key=lambda size: abs(size - d))
    fitting = [e for e in entries if e["d"] == nearest]
    entry = min(fitting, key=lambda e: (e["max_rows"] < rows, abs(e["max_rows"] - rows)))
    return Tiles(**entry["tiles"])


def tiles_for(d: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tiles for ``rows`` rows (1 to 512) of hidden size ``d``."""
    name = default = DEFAULT_DEVICE
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        if properties.shared_memory_per_block_optin < _LARGE_SHARED_BYTES:
            default = SMALL
    return _find(name, default, str(dtype).removeprefix("torch."), d, rows)
