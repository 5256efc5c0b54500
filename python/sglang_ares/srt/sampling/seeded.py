"""Draws a token from (seed, position) instead of from a worker's random stream.

Upstream samples by seed only under ``--enable-deterministic-inference``, on a CPU only with
kernels built from source, and its draw depends on what else is in the batch. Here every request
has a seed, and the draw is plain torch on any device: one uniform number per row, hashed from
seed and position, then the inverse of the cumulative distribution over the tokens in order of
probability.
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


def uniform(seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1) per row; ``seed`` and ``positions`` are integers of shape (n,)."""
    state = _mix(seed.to(torch.int64) + _GOLDEN)
    state = _mix(state + (positions.to(torch.int64) + 1) * _GOLDEN)
    return _shift_right(state, 11).to(torch.float64) * _UNIT


def multinomial_with_seed(
    logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Column drawn for each row of ``logprobs``.

    Args:
        logprobs: (n, m) float, not necessarily normalised; ``-inf`` is never drawn.
        seed, positions: (n,) integers.

    Returns:
        (n, 1) int64.
    """
    # Upstream hands over the columns sorted or not, depending on what else is in the batch.
    # Drawing in order of probability makes the result independent of that.
    ordered, column_of = logprobs.to(torch.float64).sort(dim=1, descending=True, stable=True)
    cumulative = ordered.exp().cumsum(dim=1)
    total = cumulative[:, -1:]
    threshold = uniform(seed, positions).unsqueeze(1) * total
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    # Rounding may place the threshold at the very end, where the last columns can be impossible.
    last_possible = (cumulative < total).sum(dim=1, keepdim=True)
    return column_of.gather(1, torch.minimum(drawn, last_possible))


def min_p_before(original: Any, probs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Upstream's top-k/top-p/min-p sampler refuses min-p together with seeds. Min-p keeps a
    prefix of the sorted probabilities, so it can be applied first."""
    names = ("top_ks", "top_ps", "min_ps", "need_min_p_sampling", "sampling_seed", "positions")
    call = dict(zip(names, args, strict=False)) | kwargs
    if call["need_min_p_sampling"] and call["sampling_seed"] is not None:
        least = probs.max(dim=-1, keepdim=True).values * call["min_ps"].view(-1, 1)
        probs = torch.where(probs < least, 0.0, probs)
        call["need_min_p_sampling"] = False
    return original(probs, **call)
