"""The head: a small MLP from the last hidden state of a request to its remaining length.

The paper's (arXiv 2510.13668) is d → 2048 → 512 → 64 → 1 for d = 3584, trained with L1 on the raw
count; ``kind`` ``"l1"`` is that. ``"quantile"`` gives quantiles at ``LEVELS`` instead, in
``log1p`` space: the first one, then the logarithms' gaps to the next, made positive, so that
they ascend by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_ares.srt.policy.types import LEVELS, Remaining

Kind: TypeAlias = Literal["quantile", "l1"]
Floats: TypeAlias = NDArray[np.float64]

# A prediction is below e**20 tokens: about 5e8.
_MAX_LOG: Final = 20.0
# The unit of the L1 head's output, in tokens; keeps its last layer's weights of ordinary size.
L1_UNIT: Final = 100.0


def widths(hidden_size: int) -> tuple[int, int, int]:
    """Widths of the hidden layers: the paper's for 3584, in proportion for others, with minimums.

    >>> widths(3584), widths(128)
    ((2048, 512, 64), (128, 64, 32))
    """
    first = min(2048, max(128, 64 * round(hidden_size * 4 / 7 / 64)))
    return first, max(64, -(-first // 64) * 16), max(32, -(-first // 512) * 16)


def layer_sizes(hidden_size: int, kind: Kind) -> tuple[int, ...]:
    """Sizes from the input to the output."""
    return (hidden_size, *widths(hidden_size), len(LEVELS) if kind == "quantile" else 1)


@dataclass
class LengthHead:
    """Weights ``(out, in)`` and biases ``(out,)`` of four linear layers with ReLU in between.

    ``shift``: added to the quantiles' logarithms, from calibration.
    """

    kind: Kind
    layers: list[tuple[Tensor, Tensor]]
    shift: tuple[float, ...] = (0.0,) * len(LEVELS)

    @property
    def hidden_size(self) -> int:
        """d of the model it reads."""
        return int(self.layers[0][0].shape[1])

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return sum(w.numel() + b.numel() for w, b in self.layers)

    def __call__(self, states: Tensor) -> Tensor:
        """``(B, d)`` states to ``(B, outputs)`` raw outputs in float32; see :meth:`remaining`.

        On CUDA one fused kernel; it is captured with the rest of the forward.
        """
        if states.is_cuda:
            from sglang_ares_kernels import fused_mlp

            return fused_mlp(states, self.layers)
        *hidden, (last, last_bias) = self._columns
        x = states.to(last.dtype)
        for columns, bias in hidden:
            x = torch.addmm(bias, x, columns).relu_()
        return torch.addmm(last_bias, x, last).float()

    @cached_property
    def _columns(self) -> list[tuple[Tensor, Tensor]]:
        """The weights transposed; kept, as a call has no more than some twenty microseconds."""
        return [(weight.t(), bias) for weight, bias in self.layers]

    def to(self, device: Any, dtype: torch.dtype) -> LengthHead:
        """A copy on a device, in a dtype."""
        moved = [(w.to(device, dtype), b.to(device, dtype)) for w, b in self.layers]
        return LengthHead(self.kind, moved, self.shift)

    def remaining(self, raw: NDArray[Any]) -> Floats:
        """Raw outputs ``(..., outputs)`` to ascending quantiles ``(..., len(LEVELS))``, tokens."""
        return decode(self.kind, raw, self.shift)

    def read(self, row: Sequence[float]) -> Remaining:
        """:meth:`remaining` of one row; plain numbers, as it is asked for in a worker's loop."""
        if self.kind == "l1":
            tokens = max(row[0] * L1_UNIT, 0.0)
            return tokens, tokens, tokens, tokens
        log, least = row[0], 0.0
        values = []
        for i, shift in enumerate(self.shift):
            if i:
                log += max(row[i], 0.0) + math.log1p(math.exp(-abs(row[i])))
            least = max(least, log + shift)
            values.append(math.expm1(min(least, _MAX_LOG)))
        a, b, c, d = values
        return a, b, c, d


def decode(kind: Kind, raw: NDArray[Any], shift: Sequence[float] = (0.0,) * len(LEVELS)) -> Floats:
    """See :meth:`LengthHead.remaining`. Not finite where the input is not."""
    wide = np.asarray(raw, np.float64)
    if kind == "l1":
        return np.repeat(np.maximum(wide * L1_UNIT, 0.0), len(LEVELS), axis=-1)
    logs = np.concatenate([wide[..., :1], np.logaddexp(0.0, wide[..., 1:])], axis=-1)
    logs = np.maximum.accumulate(np.cumsum(logs, axis=-1) + np.asarray(shift), axis=-1)
    # Not clip: it would turn NaN into a number on some platforms.
    return np.expm1(np.minimum(np.maximum(logs, 0.0), _MAX_LOG))


def new_head(hidden_size: int, kind: Kind, generator: torch.Generator) -> LengthHead:
    """An untrained head, float32, on the CPU."""
    sizes = layer_sizes(hidden_size, kind)
    layers = []
    for inputs, outputs in pairwise(sizes):
        weight = torch.randn(outputs, inputs, generator=generator) * (2 / inputs) ** 0.5
        layers.append((weight, torch.zeros(outputs)))
    return LengthHead(kind, layers)
