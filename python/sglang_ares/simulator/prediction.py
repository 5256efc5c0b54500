"""What policies are told of remaining lengths: nothing, what finished requests teach, the truth, or
the truth with an error."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Protocol

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from sglang_ares.profiles.json_errors import described
from sglang_ares.srt.policy.length_prior import LengthPrior
from sglang_ares.srt.policy.snapshot import Floats, Ints
from sglang_ares.srt.policy.types import LEVELS, Remaining

# Names of the kinds; see :func:`predictor_of`.
PREDICTIONS = ("none", "prior", "noisy", "true")

_NotNegative = Annotated[float, Meta(ge=0)]
_Positive = Annotated[float, Meta(gt=0)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class ErrorModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicted over true remaining length is log-normal around 1.

    After ``g`` output tokens the logarithm has the standard deviation ``sigma_end + (sigma_start
    - sigma_end) * exp(-g / decay_tokens)``. Of its variance ``persistence`` stays the same over a
    request's life; the rest is drawn anew, smoothly, every ``correlation_tokens``.

    The defaults are set by hand to the errors that arXiv 2510.13668 reports for outputs of 30K to
    32K tokens: a mean absolute error of 18,256 tokens at the end of the prompt and of 2,929 after
    8K tokens.
    """

    sigma_start: _NotNegative = 0.68
    sigma_end: _NotNegative = 0.15
    decay_tokens: _Positive = 2500.0
    persistence: _Share = 0.5
    correlation_tokens: _Positive = 500.0
    source: str = "arXiv 2510.13668, section on prediction accuracy; shape assumed"


def load_error_model(path: str | Path) -> ErrorModel:
    """An error model from a JSON file; :class:`ValueError` names the file, line and field."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"error model {path}: cannot be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(text, type=ErrorModel)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"error model {path}, {described(error, text)}") from None


class Predictor(Protocol):
    """Quantiles of remaining lengths, at :data:`LEVELS`."""

    def remaining(self, requests: Ints, output_tokens: Ints, remaining: Ints) -> Floats:
        """``(R, len(LEVELS))`` for running requests with ``output_tokens`` so far and, in truth,
        ``remaining`` to come; all ``(R,)``."""
        ...

    def at_arrival(self, output_tokens: int) -> Remaining | None:
        """For a request on arrival that will, in truth, produce ``output_tokens``."""
        ...

    def observe(self, output_tokens: int) -> None:
        """A request has ended with ``output_tokens``."""
        ...


class NoPrediction:
    """Nothing is known."""

    def remaining(self, requests: Ints, output_tokens: Ints, remaining: Ints) -> Floats:
        return np.full((len(requests), len(LEVELS)), np.nan)

    def at_arrival(self, output_tokens: int) -> Remaining | None:
        return None

    def observe(self, output_tokens: int) -> None:
        pass


class Truth(NoPrediction):
    """The true remaining length, as every quantile."""

    def remaining(self, requests: Ints, output_tokens: Ints, remaining: Ints) -> Floats:
        return np.repeat(remaining.astype(np.float64)[:, None], len(LEVELS), axis=1)

    def at_arrival(self, output_tokens: int) -> Remaining | None:
        true = float(output_tokens)
        return (true, true, true, true)


class Prior(NoPrediction):
    """What finished requests teach, as the controller learns it."""

    # Requests that may finish before new ones are told something else: the curve moves slowly.
    _REFRESH = 32

    def __init__(self) -> None:
        self._prior = LengthPrior()
        self._at_arrival: Remaining | None = None

    def remaining(self, requests: Ints, output_tokens: Ints, remaining: Ints) -> Floats:
        return self._prior.remaining(output_tokens)

    def at_arrival(self, output_tokens: int) -> Remaining | None:
        return self._at_arrival

    def observe(self, output_tokens: int) -> None:
        self._prior.observe(output_tokens)
        if self._prior.seen % self._REFRESH == 0:
            self._at_arrival = self._prior.remaining_of_new()


_Words = NDArray[np.uint64]


@cache
def _normal_numbers() -> Floats:
    """Standard normal draws by the low 16 bits of a hash: quicker than a transform."""
    size, normal = 1 << 16, NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / size) for i in range(size)])


class Noisy(Prior):
    """The truth with the error of an :class:`ErrorModel`; quantiles as wide as that error.

    The error of a request at a moment depends on the seed, the request and its output so far
    only. On arrival there is only the prior: a hidden state exists once the prompt is computed.
    """

    def __init__(self, model: ErrorModel, scale: float, seed: int) -> None:
        super().__init__()
        self._model = model
        self._scale = scale
        self._key = np.random.default_rng(seed).integers(1, 2**63, dtype=np.uint64)
        self._normal = _normal_numbers()
        self._widths = np.array([NormalDist().inv_cdf(level) for level in LEVELS])

    def remaining(self, requests: Ints, output_tokens: Ints, remaining: Ints) -> Floats:
        model = self._model
        sigma = self._scale * (
            model.sigma_end
            + (model.sigma_start - model.sigma_end) * np.exp(-output_tokens / model.decay_tokens)
        )
        position = output_tokens / model.correlation_tokens
        block = position.astype(np.uint64)
        turn = (position - block) * (np.pi / 2)
        key = requests.astype(np.uint64)
        drawn = np.cos(turn) * self._draw(key, block + np.uint64(1)) + np.sin(turn) * self._draw(
            key, block + np.uint64(2)
        )
        lasting = self._draw(key, np.zeros_like(block))
        z = np.sqrt(model.persistence) * lasting + np.sqrt(1 - model.persistence) * drawn
        exponent: Floats = (z[:, None] + self._widths) * sigma[:, None]
        predicted: Floats = remaining[:, None].astype(np.float64) * np.exp(exponent)
        return predicted

    def _draw(self, request: _Words, index: _Words) -> Floats:
        """A standard normal number for each pair (splitmix64's finaliser as the hash)."""
        x = request * np.uint64(0x9E3779B97F4A7C15) + index * np.uint64(0xD1B54A32D192ED03)
        x = x + self._key
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        drawn: Floats = self._normal[(x ^ (x >> np.uint64(31))) & np.uint64(0xFFFF)]
        return drawn


def predictor_of(kind: str, *, error: ErrorModel, scale: float, seed: int) -> Predictor:
    """The predictor called ``kind``, one of :data:`PREDICTIONS`."""
    if kind == "noisy":
        return Noisy(error, scale, seed)
    return {"none": NoPrediction, "prior": Prior, "true": Truth}[kind]()
