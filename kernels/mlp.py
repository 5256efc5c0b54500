"""The length head in one launch: four linear layers with ReLU in between, for a small batch.

The batch is small and the weights are not: the work is to read every weight once. So all
multiprocessors share the first layer (87 % of the weights at d = 3584), then the second, and one
program per block of rows does the rest. A launch holds the programs of all three stages. Those of
a later stage fetch their weights into the L2 cache and then wait, on a counter in memory, for what
they read. They come after the ones they wait for in the grid's order, in which a GPU starts
programs, so what is waited for always runs already; and under ``TRITON_INTERPRET=1``, which runs
one program after the other, it has ended. The last program sets the counters back to zero, so that
a captured graph can replay the launch.
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
    # Plain reads until it is so, as they do not queue up with the signals; then one that acquires.
    while tl.load(counter, volatile=True) < count:
        pass
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _fetch(  # type: ignore[no-untyped-def]
    w, n, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Read the ``n``-th ``BN`` rows of ``w`` for the L2 cache alone. Being volatile, the read is
    made although nobody uses it."""
    column = n * BN + tl.arange(0, BN)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask = (column < N)[None, :] & (k < K)[:, None]
        tl.load(w + column[None, :].to(tl.int64) * K + k[:, None], mask=mask, volatile=True)


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
def _product(  # type: ignore[no-untyped-def]
    x, stride_x, row, row_ok, w, column, column_ok, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``x[row] @ w[column].T`` in float32, ``(BM, BN)``; K elements of both are contiguous."""
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        row_mask, column_mask = row_ok[:, None], column_ok[None, :]
        if K % BK != 0:
            row_mask, column_mask = row_mask & (k < K)[None, :], column_mask & (k < K)[:, None]
        a = tl.load(
            x + row[:, None] * stride_x + k[None, :], row_mask, other=0.0, cache_modifier=CACHE
        )
        b = tl.load(w + column[None, :].to(tl.int64) * K + k[:, None], column_mask, other=0.0)
        total = _dot(a, b, total, WIDE, PRECISION)
    return total


@triton.jit
def _biased_relu(total, b, column, column_ok):  # type: ignore[no-untyped-def]
    total += tl.load(b + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
    return tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _layer(  # type: ignore[no-untyped-def]
    x, stride_x, w, b, y, rows, m, n, K: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``relu(x @ w.T + b)``."""
    row, column = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    row_ok, column_ok = row < rows, column < N
    total = _product(
        x, stride_x, row, row_ok, w, column, column_ok, K, BM, BN, BK, CACHE, WIDE, PRECISION
    )
    total = _biased_relu(total, b, column, column_ok)
    tl.store(y + row[:, None] * N + column[None, :], total, row_ok[:, None] & column_ok[None, :])


@triton.jit
def _last_layers(  # type: ignore[no-untyped-def]
    h2, w3, b3, w4, b4, out, rows, m, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, P3: tl.constexpr, P4: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The third and the fourth layer of one row block."""
    row, column, last = m * BM + tl.arange(0, BM), tl.arange(0, P3), tl.arange(0, P4)
    row_ok, column_ok, last_ok = row < rows, column < N3, last < N4
    h3 = _product(
        h2, N2, row, row_ok, w3, column, column_ok, N2, BM, P3, BK, ".cg", WIDE, PRECISION
    )
    weight = tl.load(
        w4 + last[None, :] * N3 + column[:, None], last_ok[None, :] & column_ok[:, None], other=0.0
    )
    h3 = _biased_relu(h3, b3, column, column_ok)
    result = _dot(h3, weight, tl.zeros((BM, P4), tl.float32), WIDE, PRECISION)
    result += tl.load(b4 + last, mask=last_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * N4 + last[None, :], result, row_ok[:, None] & last_ok[None, :])


@triton.jit(do_not_specialize=["rows", "skipped"])
def _mlp(  # type: ignore[no-untyped-def]
    x, stride_x, w1, b1, w2, b2, w3, b3, w4, b4, h1, h2, out, counters, rows, skipped,
    D: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr,
    BLOCKS: tl.constexpr, BM1: tl.constexpr, BN1: tl.constexpr, BK1: tl.constexpr,
    BM2: tl.constexpr, BN2: tl.constexpr, BK2: tl.constexpr, BK3: tl.constexpr,
    P3: tl.constexpr, P4: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``counters``: of the tiles of the first layer that each block of BM1 rows has, of the second
    that each block of BM2 rows has, and of the row blocks that are through. ``skipped``: programs
    that an earlier launch held."""
    pid = tl.program_id(0) + skipped
    blocks1, blocks2 = tl.cdiv(rows, BM1), tl.cdiv(rows, BM2)
    tiles1: tl.constexpr = (N1 + BN1 - 1) // BN1
    tiles2: tl.constexpr = (N2 + BN2 - 1) // BN2
    second = blocks1 * tiles1
    third = second + blocks2 * tiles2
    if pid < second:
        m, n = pid % blocks1, pid // blocks1
        _layer(x, stride_x, w1, b1, h1, rows, m, n, D, N1, BM1, BN1, BK1, "", WIDE, PRECISION)
        _signal(counters + m)
    elif pid < third:
        m, n = (pid - second) % blocks2, (pid - second) // blocks2
        _fetch(w2, n, N1, N2, BN2, BK2)
        _wait(counters + m * BM2 // BM1, tiles1)
        _layer(h1, N1, w2, b2, h2, rows, m, n, N1, N2, BM2, BN2, BK2, ".cg", WIDE, PRECISION)
        _signal(counters + BLOCKS + m)
    else:
        m = pid - third
        _fetch(w3, 0, N2, N3, P3, BK3)
        _wait(counters + BLOCKS + m, tiles2)
        _last_layers(
            h2, w3, b3, w4, b4, out, rows, m, N2, N3, N4, BM2, BK3, P3, P4, WIDE, PRECISION
        )
        if tl.atomic_add(counters + 2 * BLOCKS, 1) == blocks2 - 1:
            block = tl.arange(0, BLOCKS)
            tl.store(counters + block, 0)
            tl.store(counters + BLOCKS + block, 0)
            tl.store(counters + 2 * BLOCKS, 0)


class Workspace:
    """Scratch memory of one head on one device; launches that share it must be on one stream."""

    def __init__(self, sizes: Sequence[int], device: Any) -> None:
        self.h1 = torch.empty(MAX_ROWS, sizes[1], dtype=torch.float32, device=device)
        self.h2 = torch.empty(MAX_ROWS, sizes[2], dtype=torch.float32, device=device)
        self.counters = torch.zeros(2 * _MAX_BLOCKS + 1, dtype=torch.int32, device=device)


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
    n1, n2, n3, n4 = w1.shape[0], w2.shape[0], w3.shape[0], w4.shape[0]
    for start in range(0, rows, MAX_ROWS):
        part = states[start : start + MAX_ROWS]
        n = part.shape[0]
        t = tiles or tiles_for(d, n, states.dtype, states.device)
        blocks2 = triton.cdiv(n, t.rows2)
        stages = [
            triton.cdiv(n, t.rows1) * triton.cdiv(n1, t.columns1),
            blocks2 * triton.cdiv(n2, t.columns2),
            blocks2,
        ]
        skipped = 0
        for programs in [sum(stages)] if launches == 1 else stages:
            _mlp[(programs,)](
                part, part.stride(0), w1, b1, w2, b2, w3, b3, w4, b4,
                work.h1, work.h2, out[start : start + n], work.counters, n, skipped,
                D=d, N1=n1, N2=n2, N3=n3, N4=n4, BLOCKS=_MAX_BLOCKS,
                BM1=t.rows1, BN1=t.columns1, BK1=t.inner1,
                BM2=t.rows2, BN2=t.columns2, BK2=t.inner2, BK3=t.inner3,
                P3=max(16, triton.next_power_of_2(n3)), P4=max(16, triton.next_power_of_2(n4)),
                WIDE=_INTERPRETED and states.dtype == torch.bfloat16, PRECISION=_PRECISION,
                num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
            skipped += programs
    return out
