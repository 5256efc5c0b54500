"""The MLP in plain torch: what the kernel must equal, and what runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Layers = Sequence[tuple[Tensor, Tensor]]


def reference_mlp(states: Tensor, layers: Layers, dtype: torch.dtype = torch.float64) -> Tensor:
    """``(B, d)`` through linear layers ``(out, in), (out,)`` with ReLU in between, all computed in
    ``dtype``; the result ``(B, outputs)`` is in ``dtype`` too."""
    x = states.to(dtype)
    for i, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.linear(x, weight.to(dtype), bias.to(dtype))
        if i < len(layers) - 1:
            x = x.relu()
    return x
