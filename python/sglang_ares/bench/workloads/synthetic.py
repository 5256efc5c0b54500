"""Built-in workloads: no download, everything drawn from a seed."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError

CAP_TOKENS = 32768

# Output lengths of ShareGPT prompts on DeepSeek-R1-Distill-Qwen-7B with a cap of 32K, as arXiv
# 2510.13668 states them: 29.2 % under 1K tokens and 17.3 % over 30K. What lies between is ours:
# log-uniform pieces that join these two; the shares over 30K are half at the cap, half below.
_REASONING = (
    # share, from tokens, to tokens
    (0.292, 100, 1_000),
    (0.300, 1_000, 4_000),
    (0.150, 4_000, 12_000),
    (0.085, 12_000, 30_000),
    (0.0865, 30_001, 32_767),
    (0.0865, CAP_TOKENS, CAP_TOKENS),
)


def arrivals(
    rng: np.random.Generator, *, rate: float, duration_s: float, cv: float = 1.0
) -> NDArray[np.float64]:
    """Arrival times in ``[0, duration_s)``: Gamma gaps with mean ``1 / rate`` and coefficient of
    variation ``cv``; 1 is a Poisson process."""
    for name, value in (("rate", rate), ("duration", duration_s), ("cv", cv)):
        if not (value > 0 and math.isfinite(value)):
            raise WorkloadError(f"{name} is {value}; it must be a finite number above 0")
    shape = 1 / cv**2
    times = np.empty(0)
    while not len(times) or times[-1] < duration_s:
        gaps = rng.gamma(shape, 1 / (rate * shape), size=int(rate * duration_s * 1.1) + 64)
        times = np.concatenate([times, (times[-1] if len(times) else 0.0) + np.cumsum(gaps)])
    return times[times < duration_s]


def lognormal_lengths(
    rng: np.random.Generator, size: int, *, mean: float, cv: float, cap: int = CAP_TOKENS
) -> NDArray[np.int64]:
    """``size`` lengths whose logarithm is normal, of the given mean and coefficient of variation,
    rounded, at least 1 and at most ``cap``.

    The cut at ``cap`` lowers both: with mean 2,000 and cv 3 to about 1,800 and 2.
    """
    if not (mean >= 1 and cv >= 0):
        raise WorkloadError(
            f"mean is {mean} and cv is {cv}; mean must be at least 1, cv at least 0"
        )
    sigma2 = math.log1p(cv**2)
    drawn = rng.lognormal(math.log(mean) - sigma2 / 2, math.sqrt(sigma2), size)
    return np.clip(np.rint(drawn), 1, cap).astype(np.int64)


def reasoning(
    *, rate: float, duration_s: float, seed: int, arrival_cv: float = 1.0
) -> RequestStream:
    """Short prompts, outputs of anything up to 32K tokens with many at both ends."""
    rng = np.random.default_rng(seed)
    times = arrivals(rng, rate=rate, duration_s=duration_s, cv=arrival_cv)
    shares = np.array([piece[0] for piece in _REASONING])
    low, high = (np.log([piece[i] for piece in _REASONING]) for i in (1, 2))
    piece = rng.choice(len(_REASONING), size=len(times), p=shares / shares.sum())
    drawn = np.exp(rng.uniform(low[piece], high[piece]))
    return RequestStream(
        name="reasoning",
        origin=(
            "built-in mix after arXiv 2510.13668: 29.2 % of outputs under 1K tokens, 17.3 % over "
            "30K, cap 32K; what lies between, prompts and arrivals are assumed"
        ),
        arrival_s=times,
        prompt_tokens=lognormal_lengths(rng, len(times), mean=250, cv=1.0, cap=4096),
        output_tokens=np.rint(drawn).astype(np.int64),
    )


def lognormal(
    *,
    rate: float,
    duration_s: float,
    seed: int,
    output_mean: float = 2000.0,
    output_cv: float = 1.5,
    prompt_mean: float = 500.0,
    prompt_cv: float = 1.0,
    arrival_cv: float = 1.0,
    cap: int = CAP_TOKENS,
) -> RequestStream:
    """Log-normal prompts and outputs; what the gain is surveyed on."""
    rng = np.random.default_rng(seed)
    times = arrivals(rng, rate=rate, duration_s=duration_s, cv=arrival_cv)
    return RequestStream(
        name="lognormal",
        origin=f"log-normal outputs, mean {output_mean:g}, cv {output_cv:g}, cap {cap}",
        arrival_s=times,
        prompt_tokens=lognormal_lengths(rng, len(times), mean=prompt_mean, cv=prompt_cv, cap=cap),
        output_tokens=lognormal_lengths(rng, len(times), mean=output_mean, cv=output_cv, cap=cap),
    )


def swing(
    *, rate: float, duration_s: float, seed: int, period_s: float = 360.0, arrival_cv: float = 1.0
) -> RequestStream:
    """Half of each period prompts are long and outputs short, the other half the reverse."""
    rng = np.random.default_rng(seed)
    times = arrivals(rng, rate=rate, duration_s=duration_s, cv=arrival_cv)
    prefill_heavy = times % period_s < period_s / 2

    def lengths(
        heavy_mean: float, light_mean: float, heavy: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        long = lognormal_lengths(rng, len(times), mean=heavy_mean, cv=1.0)
        short = lognormal_lengths(rng, len(times), mean=light_mean, cv=1.0)
        return np.where(heavy, long, short)

    return RequestStream(
        name="swing",
        origin=(
            f"built-in: every {period_s / 2:g} s from prompts of 6,000 and outputs of 150 tokens "
            "to prompts of 400 and outputs of 1,500 (means), and back"
        ),
        arrival_s=times,
        prompt_tokens=lengths(6000, 400, prefill_heavy),
        output_tokens=lengths(1500, 150, ~prefill_heavy),
    )
