"""Draws a token from (seed, position) instead of from a worker's random stream.

Upstream samples by seed only under ``--enable-deterministic-inference``, on a CPU only with
kernels built from source, and its draw depends on what else is in the batch. Here every request
has a seed, and the draw is plain torch on any device: the token with the largest log-probability
plus Gumbel noise, where the noise is hashed from seed, position and token id. Rounding, which
differs between batches, can then change the token only where two sums are nearly equal.
"""

from __future__ import annotations

from typing import Any

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_UNIT = 2.0**-53


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64, which wraps as uint64 does."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seed: torch.Tensor, positions: torch.Tensor, columns: int) -> torch.Tensor:
    """(n, columns) float64 in (0, 1); ``seed`` and ``positions`` are integers of shape (n,)."""
    state = _mix(seed.to(torch.int64) + _GOLDEN)
    state = _mix(state + (positions.to(torch.int64) + 1) * _GOLDEN)
    column = torch.arange(1, columns + 1, dtype=torch.int64, device=seed.device) * _GOLDEN
    bits = _shift_right(_mix(state.unsqueeze(1) + column.unsqueeze(0)), 11)
    return (bits.to(torch.float64) + 0.5) * _UNIT


def multinomial_with_seed(
    logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Column drawn for each row of ``logprobs``; a column stands for the same token in any batch.

    Args:
        logprobs: (n, m) float, not necessarily normalised; ``-inf`` is never drawn.
        seed, positions: (n,) integers.

    Returns:
        (n, 1) int64.
    """
    noise = -torch.log(-torch.log(uniform(seed, positions, logprobs.shape[1])))
    return (logprobs.to(torch.float64) + noise).argmax(dim=1, keepdim=True)


def draw_filtered(original: Any, probs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Top-k, top-p and min-p in the order of the vocabulary.

    Upstream draws from sorted columns, whose order depends on rounding, and refuses min-p together
    with seeds. Without seeds, or when the filtered set itself is wanted (such requests do not
    move), upstream's sampler runs.
    """
    names = ("top_ks", "top_ps", "min_ps", "need_min_p_sampling", "sampling_seed", "positions")
    call = dict(zip(names, args, strict=False)) | kwargs
    if call["sampling_seed"] is None:
        return original(probs, **call)
    if call.get("return_filtered_probs"):
        if call["need_min_p_sampling"]:
            least = probs.max(dim=-1, keepdim=True).values * call["min_ps"].view(-1, 1)
            probs = torch.where(probs < least, 0.0, probs)
            call["need_min_p_sampling"] = False
        return original(probs, **call)
    ordered, token_of = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    rank = torch.arange(probs.shape[-1], device=probs.device).view(1, -1)
    dropped = (rank >= call["top_ks"].view(-1, 1)) | (before > call["top_ps"].view(-1, 1))
    if call["need_min_p_sampling"]:
        dropped |= ordered < ordered[:, :1] * call["min_ps"].view(-1, 1)
    filtered = torch.zeros_like(probs).scatter(1, token_of, ordered.masked_fill(dropped, 0.0))
    drawn = multinomial_with_seed(filtered.log(), call["sampling_seed"], call["positions"])
    return drawn.view(-1).to(torch.int32)
