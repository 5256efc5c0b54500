"""The length head in one launch: four linear layers with ReLU in between, for a small batch.

The batch is small and the weights are not: the work is to read every weight once, and what comes on
top is waiting. So all multiprocessors share the first layer (87 % of the weights at d = 3584), then
the second, and one program per block of rows does the rest. A launch holds the programs of all
three stages. Those of a later stage fetch their weights into the L2 cache and then wait, on a
counter in memory, for what they read. They come after the ones they wait for in the grid's order,
in which a GPU starts programs, so what is waited for always runs already; and under
``TRITON_INTERPRET=1``, which runs one program after the other, it has ended. The last program sets
the counters back to zero, so that a captured graph can replay the launch.

A hidden layer is written without bias and ReLU, which its readers add: so a layer's inputs may be
divided into parts, each done by another program, and its readers sum the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_ares_kernels.tuning import Tiles, tiles_for

# Rows that one launch takes, in blocks of at least 16.
MAX_ROWS = 512
_BLOCKS = MAX_ROWS // 16
# Rows times parts of a hidden layer.
_ROOM = 2 * MAX_ROWS

_INTERPRETED = bool(triton.knobs.runtime.interpret)
# Products of float32: three of TF32 each, whose errors cancel to nearly float32's.
_PRECISION = "ieee" if _INTERPRETED else "tf32x3"


@triton.jit
def _signal(counter):  # type: ignore[no-untyped-def]
    # Every thread's stores come before the one thread's release.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _wait(counter, count):  # type: ignore[no-untyped-def]
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _fetch(  # type: ignore[no-untyped-def]
    w, bias, n, first, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KS: tl.constexpr,
):  # fmt: skip
    """Read ``w[n * BN : (n + 1) * BN, first : first + KS]`` and as much of ``bias`` for the L2
    cache alone. As they are volatile, the reads are made although nobody uses them."""
    column = n * BN + tl.arange(0, BN)
    for start in range(first, first + KS, BK):
        k = start + tl.arange(0, BK)
        tl.load(bias + k, k < K, volatile=True)
        mask = (column < N)[:, None] & (k < K)[None, :]
        tl.load(w + column[:, None].to(tl.int64) * K + k[None, :], mask=mask, volatile=True)


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a @ b + total`` in float32. A float32 ``a`` beside half-precision weights is split into two
    of theirs, or rounding the hidden layers would cost as much as rounding the weights."""
    high = a.to(b.dtype)
    total = _exact_dot(high, b, total, WIDE, PRECISION)
    if a.dtype != b.dtype:
        low = (a - high.to(a.dtype)).to(b.dtype)
        total = _exact_dot(low, b, total, WIDE, PRECISION)
    return total


@triton.jit
def _exact_dot(  # type: ignore[no-untyped-def]
    a, b, total, WIDE: tl.constexpr, PRECISION: tl.constexpr
):
    # The interpreter multiplies the bits of bfloat16 numbers: there they are made float32 first.
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _relu(x):  # type: ignore[no-untyped-def]
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _bias(b, column, column_ok):  # type: ignore[no-untyped-def]
    return tl.load(b + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _inputs(  # type: ignore[no-untyped-def]
    x, stride_x, bias, rows, row, k, K: tl.constexpr, PARTS: tl.constexpr
):
    """``x[row, k]``, ``(S, BM, k)``; or, of a hidden layer that was written in PARTS, ``relu`` of
    their sum and its bias."""
    mask = (row < rows)[None, :, None] & (k < K)[:, None, :]
    if PARTS == 0:
        return tl.load(x + row[None, :, None] * stride_x + k[:, None, :], mask, other=0.0)
    else:
        h = tl.load(bias + k, k < K, other=0.0).to(tl.float32)[:, None, :]
        for part in tl.static_range(PARTS):
            place = x + (part * rows + row[None, :, None]) * K + k[:, None, :]
            h += tl.load(place, mask, other=0.0, cache_modifier=".cg")
        return _relu(h)


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, stride_x, bias, rows, row, w, column, column_ok, first, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_inputs[row, k] @ w[column, k].T`` in float32, ``(BM, BN)``, for KS k from ``first`` on.
    Each of S warps sums a part of every BK: on tiles so small, one product that waits for another
    takes longer than the reading does."""
    each: tl.constexpr = BK // S
    inner = tl.arange(0, S)[:, None] * each + tl.arange(0, each)[None, :]
    w += column[None, None, :].to(tl.int64) * K
    total = tl.zeros((S, BM, BN), tl.float32)
    for start in tl.range(first, first + KS, BK, num_stages=STAGES):
        k = start + inner
        a = _inputs(x, stride_x, bias, rows, row, k, K, PARTS)
        mask = column_ok[None, None, :] & (k < K)[:, :, None]
        b = tl.load(w + k[:, :, None], mask, other=0.0)
        total = _dot(a, b, total, WIDE, PRECISION)
    return tl.sum(total, 0)


@triton.jit
def _product_of_states(  # type: ignore[no-untyped-def]
    x, stride_x, rows, row, w, column, column_ok, first, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``_product`` of states whose block is large enough that the warps share its rows."""
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(first, first + KS, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        mask = (row < rows)[:, None] & (k < K)[None, :]
        a = tl.load(x + row[:, None] * stride_x + k[None, :], mask, other=0.0)
        mask = column_ok[None, :] & (k < K)[:, None]
        b = tl.load(w + column[None, :].to(tl.int64) * K + k[:, None], mask, other=0.0)
        total = _dot(a, b, total, WIDE, PRECISION)
    return total


@triton.jit
def _layer(  # type: ignore[no-untyped-def]
    x, stride_x, bias, w, y, rows, m, n, part, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``_inputs @ w.T``; of its KS inputs, which are the ``part``-th."""
    row, column = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    row_ok, column_ok = row < rows, column < N
    if S == 1:
        total = _product_of_states(
            x, stride_x, rows, row, w, column, column_ok, part * KS, K, BM, BN, BK, KS, STAGES,
            WIDE, PRECISION,
        )  # fmt: skip
    else:
        total = _product(
            x, stride_x, bias, rows, row, w, column, column_ok, part * KS, K, BM, BN, BK, KS,
            PARTS, S, STAGES, WIDE, PRECISION,
        )  # fmt: skip
    place = y + (part * rows + row[:, None]) * N + column[None, :]
    tl.store(place, total, row_ok[:, None] & column_ok[None, :])


@triton.jit
def _last_layers(  # type: ignore[no-untyped-def]
    h2, b2, w3, b3, w4, b4, out, rows, m, counter, count, K: tl.constexpr, N3: tl.constexpr,
    N4: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr,
    STAGES: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The third and fourth layer of one row block, once ``counter`` says that ``h2`` is there."""
    row, column, last = m * BM + tl.arange(0, BM), tl.arange(0, P3), tl.arange(0, P4)
    row_ok, column_ok, last_ok = row < rows, column < N3, last < N4
    _fetch(w3, b2, 0, 0, K, N3, P3, BK, K)
    weight = tl.load(
        w4 + last[None, :] * N3 + column[:, None], last_ok[None, :] & column_ok[:, None], other=0.0
    )
    bias3, bias4 = _bias(b3, column, column_ok), _bias(b4, last, last_ok)
    _wait(counter, count)
    h3 = _product(
        h2, K, b2, rows, row, w3, column, column_ok, 0, K, BM, P3, BK, K, PARTS, S, STAGES, WIDE,
        PRECISION,
    )  # fmt: skip
    result = _dot(_relu(h3 + bias3), weight, tl.zeros((BM, P4), tl.float32), WIDE, PRECISION)
    result += bias4
    tl.store(out + row[:, None] * N4 + last[None, :], result, row_ok[:, None] & last_ok[None, :])


@triton.jit(do_not_specialize=["rows", "skipped"])
def _mlp(  # type: ignore[no-untyped-def]
    x, stride_x, w1, b1, w2, b2, w3, b3, w4, b4, h1, h2, out, counters, rows, skipped,
    D: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    BM1: tl.constexpr, BN1: tl.constexpr, BK1: tl.constexpr, KS1: tl.constexpr, S1: tl.constexpr,
    BM2: tl.constexpr, BN2: tl.constexpr, BK2: tl.constexpr, KS2: tl.constexpr, BK3: tl.constexpr,
    S: tl.constexpr, ST1: tl.constexpr, ST2: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """``counters``: of the tiles of the first layer that each block of BM1 rows has, of the second
    that each block of BM2 rows has, and of the row blocks that are through. ``skipped``: programs
    that an earlier launch held."""
    PARTS1: tl.constexpr = (D + KS1 - 1) // KS1
    PARTS2: tl.constexpr = (N1 + KS2 - 1) // KS2
    tiles1: tl.constexpr = (N1 + BN1 - 1) // BN1 * PARTS1
    tiles2: tl.constexpr = (N2 + BN2 - 1) // BN2 * PARTS2
    pid = tl.program_id(0) + skipped
    blocks1, blocks2 = tl.cdiv(rows, BM1), tl.cdiv(rows, BM2)
    second = blocks1 * tiles1
    third = second + blocks2 * tiles2
    if pid < second:
        m, tile = pid % blocks1, pid // blocks1
        _layer(
            x, stride_x, b1, w1, h1, rows, m, tile // PARTS1, tile % PARTS1, D, N1, BM1, BN1, BK1,
            KS1, 0, S1, ST1, WIDE, PRECISION,
        )  # fmt: skip
        _signal(counters + m)
    elif pid < third:
        m, tile = (pid - second) % blocks2, (pid - second) // blocks2
        n, part = tile // PARTS2, tile % PARTS2
        _fetch(w2, b1, n, part * KS2, N1, N2, BN2, BK2, KS2)
        _wait(counters + m * BM2 // BM1, tiles1)
        _layer(
            h1, N1, b1, w2, h2, rows, m, n, part, N1, N2, BM2, BN2, BK2, KS2, PARTS1, S, ST2, WIDE,
            PRECISION,
        )  # fmt: skip
        _signal(counters + BLOCKS + m)
    else:
        m = pid - third
        _last_layers(
            h2, b2, w3, b3, w4, b4, out, rows, m, counters + BLOCKS + m, tiles2, N2, N3, N4, BM2,
            BK3, PARTS2, S, ST2, P3, P4, WIDE, PRECISION,
        )  # fmt: skip
        if tl.atomic_add(counters + 2 * BLOCKS, 1) == blocks2 - 1:
            block = tl.arange(0, BLOCKS)
            tl.store(counters + block, 0)
            tl.store(counters + BLOCKS + block, 0)
            tl.store(counters + 2 * BLOCKS, 0)


class Workspace:
    """Scratch memory of one head on one device; launches that share it must be on one stream."""

    def __init__(self, sizes: Sequence[int], device: Any) -> None:
        self.h1 = torch.empty(_ROOM, sizes[1], dtype=torch.float32, device=device)
        self.h2 = torch.empty(_ROOM, sizes[2], dtype=torch.float32, device=device)
        self.counters = torch.zeros(2 * _BLOCKS + 1, dtype=torch.int32, device=device)


_workspaces: dict[int, tuple[Tensor, Workspace]] = {}


def _workspace(layers: Sequence[tuple[Tensor, Tensor]]) -> Workspace:
    """The workspace of a head; it lives as long as the process, as captured graphs refer to it."""
    first = layers[0][0]
    kept = _workspaces.get(id(first))
    if kept is None:
        sizes = [first.shape[1], *(w.shape[0] for w, _ in layers)]
        kept = _workspaces[id(first)] = (first, Workspace(sizes, first.device))
    return kept[1]


def _share(inputs: int, parts: int, at_once: int) -> int:
    """Inputs of one of ``parts`` parts; a multiple of what is read at a time."""
    return int(triton.cdiv(triton.cdiv(inputs, parts), at_once)) * at_once


def constants(sizes: Sequence[int], tiles: Tiles, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel is compiled for: the layers' ``sizes`` and the tiles."""
    d, n1, n2, n3, n4 = sizes
    return {
        "D": d, "N1": n1, "N2": n2, "N3": n3, "N4": n4,
        "BM1": tiles.rows1, "BN1": tiles.columns1, "BK1": tiles.inner1,
        "KS1": _share(d, tiles.parts1, tiles.inner1), "S1": tiles.warps if tiles.slices1 else 1,
        "BM2": tiles.rows2, "BN2": tiles.columns2, "BK2": tiles.inner2,
        "KS2": _share(n1, tiles.parts2, tiles.inner2), "BK3": tiles.inner3, "S": tiles.warps,
        "ST1": tiles.stages1, "ST2": tiles.stages2,
        "P3": max(16, triton.next_power_of_2(n3)), "P4": max(16, triton.next_power_of_2(n4)),
        "WIDE": _INTERPRETED and dtype == torch.bfloat16, "PRECISION": _PRECISION,
        "BLOCKS": _BLOCKS,
    }  # fmt: skip


def _with_room(tiles: Tiles, rows: int) -> Tiles:
    """In so few parts that a hidden layer of ``rows`` rows has room in the workspace."""
    most = _ROOM // rows
    if max(tiles.parts1, tiles.parts2) <= most:
        return tiles
    return replace(tiles, parts1=min(tiles.parts1, most), parts2=min(tiles.parts2, most))


def _programs(rows: int, sizes: Sequence[int], compiled: dict[str, Any]) -> list[int]:
    """Programs of each stage, for a batch of ``rows``."""
    d, n1, n2, *_ = sizes
    parts1, parts2 = triton.cdiv(d, compiled["KS1"]), triton.cdiv(n1, compiled["KS2"])
    blocks2 = triton.cdiv(rows, compiled["BM2"])
    return [
        triton.cdiv(rows, compiled["BM1"]) * triton.cdiv(n1, compiled["BN1"]) * parts1,
        blocks2 * triton.cdiv(n2, compiled["BN2"]) * parts2,
        blocks2,
    ]


def fused_mlp(
    states: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    tiles: Tiles | None = None,
    out: Tensor | None = None,
    launches: int = 1,
) -> Tensor:
    """``(B, d)`` states through the four layers ``(out, in), (out,)`` of a head: ``(B, outputs)``
    float32.

    ``B`` is 1 to 512, more rows take several launches; ``d`` and the hidden widths are multiples of
    16; states and weights are bfloat16, float16 or float32; sums and hidden layers are float32.
    ``tiles``: the tuned ones unless given. ``launches``: 3 to launch the stages one after
    another, which is slower and there to be compared with.
    """
    rows, d = states.shape
    (w1, b1), (w2, b2), (w3, b3), (w4, b4) = layers
    if d % 16 or d != w1.shape[1]:
        raise ValueError(
            f"hidden size {d}: must be a multiple of 16, and the head's ({w1.shape[1]})"
        )
    if out is None:
        out = torch.empty(rows, w4.shape[0], dtype=torch.float32, device=states.device)
    if states.stride(1) != 1:
        states = states.contiguous()
    work = _workspace(layers)
    sizes = [d, *(w.shape[0] for w, _ in layers)]
    for start in range(0, rows, MAX_ROWS):
        part = states[start : start + MAX_ROWS]
        n = part.shape[0]
        t = tiles or tiles_for(d, n, states.dtype, states.device)
        compiled = constants(sizes, _with_room(t, n), states.dtype)
        stages = _programs(n, sizes, compiled)
        skipped = 0
        for programs in [sum(stages)] if launches == 1 else stages:
            _mlp[(programs,)](
                part, part.stride(0), w1, b1, w2, b2, w3, b3, w4, b4,
                work.h1, work.h2, out[start : start + n], work.counters, n, skipped,
                **compiled, num_warps=t.warps,
            )  # fmt: skip
            skipped += programs
    return out
