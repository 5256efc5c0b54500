"""Timing on a GPU: medians over replays of a CUDA graph, with the weights out of the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def head_sizes(d: int) -> tuple[int, ...]:
    """The head's layers for hidden size ``d``, as ``sglang_ares.srt.predictor.head`` has them."""
    first = min(2048, max(128, 64 * round(d * 4 / 7 / 64)))
    return d, first, max(64, -(-first // 64) * 16), max(32, -(-first // 512) * 16), 4


def head_layers(d: int, dtype: torch.dtype, device: Any, seed: int = 0) -> list[Any]:
    """A random head."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            (torch.randn(o, i, generator=generator) * (2 / i) ** 0.5).to(device, dtype),
            (0.1 * torch.randn(o, generator=generator)).to(device, dtype),
        )
        for i, o in pairwise(head_sizes(d))
    ]


def graph_of(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """``work`` captured after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _timed(run: Callable[[], Any], repeats: int, flush: Tensor) -> float:
    times = []
    for _ in range(repeats):
        flush.zero_()  # in service the model's own weights pass through the cache in between
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def seconds(work: Callable[[], Any], *, graph: bool = True, repeats: int = 30) -> float:
    """Median seconds of ``work``, replayed from a graph or launched, with a cold L2 cache."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    run: Callable[[], Any] = graph_of(work).replay if graph else work
    for _ in range(3):
        run()
    return _timed(run, repeats, flush)


def bandwidth() -> float:
    """Bytes per second of a large copy (read and write counted): what this GPU reaches."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    flush = torch.empty(1, dtype=torch.int8, device="cuda")
    return 2 * source.numel() / _timed(lambda: target.copy_(source), 20, flush)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest error over largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def weight_bytes(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    """What must be read at least, besides the states."""
    return sum(t.numel() * t.element_size() for layer in layers for t in layer)
