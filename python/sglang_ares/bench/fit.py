"""Laws of step times from measured ones: least squares whose coefficients are not negative."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.types import StepTime


class FitError(ValueError):
    """Too few, or too uniform, measurements for a law."""


class DecodeSample(NamedTuple):
    """Decode steps over ``requests`` requests with ``tokens`` resident tokens took ``ms`` each."""

    requests: float
    tokens: float
    ms: float


class PrefillSample(NamedTuple):
    """``prompts`` prompts of ``length`` tokens, sent at once, had their first tokens within ``ms``
    milliseconds."""

    prompts: int
    length: int
    ms: float


class MoveSample(NamedTuple):
    """A migration of ``tokens`` tokens of KV took ``ms``, from command to end; ``pause_ms``: what
    the moved request waited for a token longer than for others."""

    tokens: int
    ms: float
    pause_ms: float


def non_negative_fit(columns: NDArray[np.float64], values: NDArray[np.float64]) -> list[float]:
    """The ``K`` coefficients, none negative, that give ``values`` ``(N,)`` from ``columns``
    ``(N, K)`` with the least sum of squared relative errors.

    Every choice of non-zero coefficients is solved (K is small); :class:`FitError` if the columns
    do not tell the coefficients apart.
    """
    if len(values) < columns.shape[1] or np.linalg.matrix_rank(columns) < columns.shape[1]:
        raise FitError(
            f"{len(values)} measurements do not tell {columns.shape[1]} coefficients apart; "
            "measure more, and more different, loads"
        )
    weights = 1 / values
    scale = np.abs(columns).max(axis=0)
    weighted = columns / scale * weights[:, None]
    target = np.ones_like(values)
    best, least = np.zeros(columns.shape[1]), np.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in combinations(range(columns.shape[1]), size):
            solved, *_ = np.linalg.lstsq(weighted[:, chosen], target, rcond=None)
            error = float(((weighted[:, chosen] @ solved - target) ** 2).sum())
            if (solved >= 0).all() and error < least:
                least = error
                best = np.zeros(columns.shape[1])
                best[list(chosen)] = solved
    coefficients: list[float] = (best / scale).tolist()
    return coefficients


def fit_decode(samples: Sequence[DecodeSample]) -> StepTime:
    """The law of decode steps."""
    requests, tokens, ms = _columns(samples)
    fixed, each, token = non_negative_fit(
        np.stack([np.ones_like(ms), requests, tokens], axis=1), ms
    )
    return StepTime(fixed_ms=fixed, per_request_ms=each, per_token_ms=token)


def fit_prefill(samples: Sequence[PrefillSample], chunk_tokens: int) -> tuple[PrefillTime, float]:
    """The law of prefill steps, and what a prompt's hand-over takes besides (ms).

    A burst's first prompt is computed alone, the others in steps of ``chunk_tokens``; the last
    prompt's hand-over comes on top. So one step more costs ``fixed_ms`` and no hand-over, by which
    the two are told apart.
    """
    prompts, length, ms = _columns(samples)
    steps = np.array(
        [
            ceil(s.length / chunk_tokens) + ceil((s.prompts - 1) * s.length / chunk_tokens)
            for s in samples
        ],
        np.float64,
    )
    fixed, token, square, hand_over = non_negative_fit(
        np.stack([steps, prompts * length, prompts * length**2, np.ones_like(ms)], axis=1), ms
    )
    law = PrefillTime(fixed_ms=fixed, per_token_ms=token, per_square_ms=square)
    return law, hand_over


def fit_moves(samples: Sequence[MoveSample]) -> tuple[float, float, float]:
    """What any migration takes (ms), tokens of KV copied per second, and the pause (ms)."""
    tokens, ms, pauses = _columns(samples)
    fixed, token = non_negative_fit(np.stack([np.ones_like(ms), tokens], axis=1), ms)
    # A copy too fast to be seen: at least as fast as the largest one measured.
    tokens_per_s = 1e3 / token if token > 0 else 1e3 * float(tokens.max() / ms.min())
    return fixed, tokens_per_s, float(np.median(pauses))


def relative_errors(law: StepTime, samples: Sequence[DecodeSample]) -> NDArray[np.float64]:
    """``(N,)`` predicted over measured, minus 1."""
    requests, tokens, ms = _columns(samples)
    predicted = law.fixed_ms + law.per_request_ms * requests + law.per_token_ms * tokens
    return np.asarray(predicted / ms - 1)


def _columns(samples: Sequence[tuple[float, ...]]) -> NDArray[np.float64]:
    if not samples:
        raise FitError("there are no measurements")
    return np.array(samples, np.float64).T
