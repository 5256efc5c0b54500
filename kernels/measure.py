"""Timing on a GPU: work within a CUDA graph, with weights that are not in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Copies of a head are used in turn: together so much larger than any L2 cache.
_COLD_BYTES = 200 << 20
# A graph holds at least so many calls, so that what it costs to start it hardly counts.
_CALLS = 20


def head_sizes(d: int) -> tuple[int, ...]:
    """The head's layers for hidden size ``d``, as ``sglang_ares.srt.predictor.head`` has them."""
    first = min(2048, max(128, 64 * round(d * 4 / 7 / 64)))
    return d, first, max(64, -(-first // 64) * 16), max(32, -(-first // 512) * 16), 4


def head_layers(d: int, dtype: torch.dtype, device: Any, seed: int = 0) -> list[Any]:
    """A random head."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        (
            (torch.randn(o, i, generator=generator, device=device) * (2 / i) ** 0.5).to(dtype),
            (0.1 * torch.randn(o, generator=generator, device=device)).to(dtype),
        )
        for i, o in pairwise(head_sizes(d))
    ]


def cold_copies(layers: list[Any]) -> list[list[Any]]:
    """The head and copies of it, so many that none is in the cache when its turn comes again."""
    more = max(2, -(-_COLD_BYTES // weight_bytes(layers))) - 1
    return [layers, *([(w.clone(), b.clone()) for w, b in layers] for _ in range(more))]


def graph_of(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """``work`` captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def seconds(
    work: Callable[..., Any],
    variants: Sequence[Any],
    *,
    graph: bool = True,
    repeats: int = 15,
    calls_at_least: int = _CALLS,
) -> float:
    """Seconds a call of ``work(variant)``, the variants in turn, one after another on the GPU: from
    a CUDA graph that holds all calls, or launched one by one. Median of ``repeats``."""
    rounds = -(-calls_at_least // len(variants))

    def calls() -> None:
        for _ in range(rounds):
            for variant in variants:
                work(variant)

    run: Callable[[], Any] = graph_of(calls).replay if graph else calls
    times = []
    for i in range(-2, repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 0:
            times.append(start.elapsed_time(end) / 1e3 / (rounds * len(variants)))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second that this GPU reads at most, of 1 GiB (a sum, and a copy whose reads and
    writes count; the better one)."""
    source = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    summed = seconds(lambda x: x.sum(), [source], repeats=5)
    copied = seconds(target.copy_, [source], repeats=5)
    return max(size / summed, 2 * size / copied)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest error over largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def weight_bytes(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    """What must be read at least, besides the states."""
    return sum(t.numel() * t.element_size() for layer in layers for t in layer)
