"""The length head in one launch: four linear layers with ReLU in between, for a small batch.

The batch is small and the weights are not: the work is to read every weight once. So all
multiprocessors share the first layer (87 % of the weights at d = 3584), then the second, and one
program per block of rows does the rest. A launch holds the programs of all three stages. Those of
a later stage wait, on a counter in memory, for the tiles they read. They come after the ones they
wait for in the grid's order, in which a GPU starts programs, so what is waited for always runs
already; and under ``TRITON_INTERPRET=1``, which runs one program after the other, it has ended.
The last program of a row block sets the block's counters back to zero, so that a captured graph
can replay the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sglang_ares_kernels.tuning import Tiles, tiles_for

# Row blocks a launch can have: 512 rows of at least 16 each.
MAX_ROWS = 512
_MAX_BLOCKS = MAX_ROWS // 16

# The interpreter multiplies the bits of bfloat16 numbers: there they are made float32 first.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


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
def _dot(a, b, total, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``a @ b + total`` in float32. A float32 ``a`` beside half-precision weights is split into two
    of theirs, or rounding the hidden layers would cost as much as rounding the weights."""
    high = a.to(b.dtype)
    total = _exact_dot(high, b, total, WIDE)
    if a.dtype != b.dtype:
        total = _exact_dot((a - high.to(a.dtype)).to(b.dtype), b, total, WIDE)
    return total


@triton.jit
def _exact_dot(a, b, total, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, stride_x, row, row_ok, w, column, column_ok, K, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, CACHE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``x[row] @ w[column].T`` in float32, ``(BM, BN)``; K elements of both are contiguous."""
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < K
        a = tl.load(
            x + row[:, None] * stride_x + k[None, :],
            mask=row_ok[:, None] & k_ok[None, :],
            other=0.0,
            cache_modifier=CACHE,
        )
        b = tl.load(
            w + column[None, :].to(tl.int64) * K + k[:, None],
            mask=column_ok[None, :] & k_ok[:, None],
            other=0.0,
        )
        total = _dot(a, b, total, WIDE)
    return total


@triton.jit
def _layer(  # type: ignore[no-untyped-def]
    x, stride_x, w, b, y, rows, m, n, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    CACHE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of ``relu(x @ w.T + b)``."""
    row, column = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    row_ok, column_ok = row < rows, column < N
    total = _product(x, stride_x, row, row_ok, w, column, column_ok, K, BM, BN, BK, CACHE, WIDE)
    total += tl.load(b + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + row[:, None] * N + column[None, :], total, row_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["rows"])
def _mlp(  # type: ignore[no-untyped-def]
    x, stride_x, w1, b1, w2, b2, w3, b3, w4, b4, h1, h2, out, counters, rows,
    D: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    BLOCKS: tl.constexpr, BM: tl.constexpr, BN1: tl.constexpr, BK1: tl.constexpr,
    BN2: tl.constexpr, BK2: tl.constexpr, BK3: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(rows, BM)
    tiles1: tl.constexpr = (N1 + BN1 - 1) // BN1
    tiles2: tl.constexpr = (N2 + BN2 - 1) // BN2
    second, third = blocks * tiles1, blocks * (tiles1 + tiles2)
    if pid < second:
        m, n = pid % blocks, pid // blocks
        _layer(x, stride_x, w1, b1, h1, rows, m, n, D, N1, BM, BN1, BK1, "", WIDE)
        _signal(counters + m)
    elif pid < third:
        m, n = (pid - second) % blocks, (pid - second) // blocks
        _wait(counters + m, tiles1)
        _layer(h1, N1, w2, b2, h2, rows, m, n, N1, N2, BM, BN2, BK2, ".cg", WIDE)
        _signal(counters + BLOCKS + m)
    else:
        m = pid - third
        _wait(counters + BLOCKS + m, tiles2)
        row, column = m * BM + tl.arange(0, BM), tl.arange(0, P3)
        row_ok, column_ok = row < rows, column < N3
        h3 = _product(h2, N2, row, row_ok, w3, column, column_ok, N2, BM, P3, BK3, ".cg", WIDE)
        h3 += tl.load(b3 + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        h3 = tl.maximum(h3, 0.0, propagate_nan=tl.PropagateNan.ALL)
        last = tl.arange(0, P4)
        weight = tl.load(
            w4 + last[None, :] * N3 + column[:, None],
            mask=(last < N4)[None, :] & column_ok[:, None],
            other=0.0,
        )
        result = _dot(h3, weight, tl.zeros((BM, P4), tl.float32), WIDE)
        result += tl.load(b4 + last, mask=last < N4, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out + row[:, None] * N4 + last[None, :], result, row_ok[:, None] & (last < N4)[None, :]
        )
        tl.store(counters + m, 0)
        tl.store(counters + BLOCKS + m, 0)


class Workspace:
    """Scratch memory of one head on one device; launches that share it must be on one stream."""

    def __init__(self, sizes: Sequence[int], device: Any) -> None:
        self.h1 = torch.empty(MAX_ROWS, sizes[1], dtype=torch.float32, device=device)
        self.h2 = torch.empty(MAX_ROWS, sizes[2], dtype=torch.float32, device=device)
        self.counters = torch.zeros(2 * _MAX_BLOCKS, dtype=torch.int32, device=device)


_workspaces: dict[int, tuple[Tensor, Workspace]] = {}


def _workspace(layers: Sequence[tuple[Tensor, Tensor]]) -> Workspace:
    """The workspace of a head; it lives as long as the process, as captured graphs refer to it."""
    first = layers[0][0]
    kept = _workspaces.get(id(first))
    if kept is None:
        sizes = [first.shape[1], *(w.shape[0] for w, _ in layers)]
        kept = _workspaces[id(first)] = (first, Workspace(sizes, first.device))
    return kept[1]


def fused_mlp(
    states: Tensor,
    layers: Sequence[tuple[Tensor, Tensor]],
    tiles: Tiles | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(B, d)`` states through the four layers ``(out, in), (out,)`` of a head: ``(B, outputs)``
    float32.

    ``B`` is 1 to 512, more rows take several launches; ``d`` and the hidden widths are multiples of
    16; states and weights are bfloat16, float16 or float32; sums are float32. ``tiles``: the tuned
    ones unless given.
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
    for start in range(0, rows, MAX_ROWS):
        part = states[start : start + MAX_ROWS]
        n = part.shape[0]
        t = tiles or tiles_for(d, n, states.dtype, states.device)
        n1, n2, n3, n4 = w1.shape[0], w2.shape[0], w3.shape[0], w4.shape[0]
        blocks = triton.cdiv(n, t.rows)
        grid = (blocks * (triton.cdiv(n1, t.columns1) + triton.cdiv(n2, t.columns2) + 1),)
        _mlp[grid](
            part, part.stride(0), w1, b1, w2, b2, w3, b3, w4, b4,
            work.h1, work.h2, out[start : start + n], work.counters, n,
            D=d, N1=n1, N2=n2, N3=n3, N4=n4, BLOCKS=_MAX_BLOCKS,
            BM=t.rows, BN1=t.columns1, BK1=t.inner1, BN2=t.columns2, BK2=t.inner2, BK3=t.inner3,
            P3=max(16, triton.next_power_of_2(n3)), P4=max(16, triton.next_power_of_2(n4)),
            WIDE=_INTERPRETED and states.dtype == torch.bfloat16,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out
