"""A short-horizon forecast of arrivals: Holt's linear exponential smoothing of both token kinds."""

from __future__ import annotations

import math

import msgspec


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What arrives, per second: prefill work in milliseconds, and tokens that become resident for
    decoding (prompt tokens of new requests); and what stays: ``output_tokens`` is the mean output
    of a finished request, ``prompt_tokens`` the mean prompt of a new one, ``requests_per_s`` how
    many arrive. ``*_trend``: change per second of the two rates. ``resident_trend``: change per
    second of the tokens that are resident for decoding, on all workers together."""

    prefill_ms_per_s: float = 0.0
    prefill_ms_trend: float = 0.0
    requests_per_s: float = 0.0
    requests_trend: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    resident_trend: float = 0.0

    def prefill_work_ms(self, horizon_s: float) -> float:
        """Milliseconds of prefill work that arrive within the horizon; never negative."""
        return _integral(self.prefill_ms_per_s, self.prefill_ms_trend, horizon_s)

    def requests(self, horizon_s: float) -> float:
        """Requests that arrive within the horizon; never negative."""
        return _integral(self.requests_per_s, self.requests_trend, horizon_s)


class ArrivalForecast:
    """Smooths what was counted per interval.

    ``level_s``: time constant of the level; ``trend_s`` of the trend. A trend is damped by half, as
    bursts end.
    """

    def __init__(self, level_s: float = 10.0, trend_s: float = 30.0) -> None:
        self._level_s = level_s
        self._trend_s = trend_s
        self._prefill = _Holt()
        self._requests = _Holt()
        self._prompt_tokens = 0.0
        self._output_tokens = 0.0
        self._resident: float | None = None
        self._resident_trend = 0.0

    def observe(
        self, interval_s: float, requests: int, prompt_tokens: int, prefill_ms: float
    ) -> None:
        """What arrived within the last ``interval_s`` seconds: requests, their prompt tokens, and
        the predicted time of their prefills."""
        if interval_s <= 0:
            raise ValueError(f"interval_s is {interval_s}; it must be above 0.")
        alpha = 1 - math.exp(-interval_s / self._level_s)
        beta = 1 - math.exp(-interval_s / self._trend_s)
        self._prefill.observe(prefill_ms / interval_s, interval_s, alpha, beta)
        self._requests.observe(requests / interval_s, interval_s, alpha, beta)
        if requests:
            mean = prompt_tokens / requests
            weight = alpha if self._prompt_tokens else 1.0
            self._prompt_tokens += weight * (mean - self._prompt_tokens)

    def observe_resident(self, interval_s: float, tokens: float) -> None:
        """So many tokens are resident for decoding, ``interval_s`` seconds after the last time."""
        if self._resident is not None:
            weight = 1 - math.exp(-interval_s / self._level_s)
            change = (tokens - self._resident) / interval_s
            self._resident_trend += weight * (change - self._resident_trend)
        self._resident = tokens

    def finished(self, output_tokens: int) -> None:
        """A request has ended after that many tokens."""
        weight = 0.02 if self._output_tokens else 1.0
        self._output_tokens += weight * (output_tokens - self._output_tokens)

    @property
    def demand(self) -> Demand:
        """The forecast as of now."""
        return Demand(
            prefill_ms_per_s=self._prefill.level,
            prefill_ms_trend=self._prefill.trend / 2,
            requests_per_s=self._requests.level,
            requests_trend=self._requests.trend / 2,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            resident_trend=self._resident_trend,
        )


class _Holt:
    """Level and trend (per second) of a rate."""

    def __init__(self) -> None:
        self.level = 0.0
        self.trend = 0.0
        self._seen = False

    def observe(self, rate: float, interval_s: float, alpha: float, beta: float) -> None:
        if not self._seen:
            self.level, self._seen = rate, True
            return
        before = self.level
        expected = max(0.0, before + self.trend * interval_s)
        self.level = expected + alpha * (rate - expected)
        self.trend += beta * ((self.level - before) / interval_s - self.trend)


def _integral(rate: float, trend: float, horizon_s: float) -> float:
    """Integral of ``max(0, rate + trend * t)`` from 0 to the horizon."""
    if trend < 0 and rate + trend * horizon_s < 0:
        horizon_s = -rate / trend if rate > 0 else 0.0
    return max(0.0, rate * horizon_s + trend * horizon_s**2 / 2)
