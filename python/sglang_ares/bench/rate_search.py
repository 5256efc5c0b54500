"""The highest rate that still meets a target, by bisection, one probe at a time: so that the probes
of several systems can take turns."""

from __future__ import annotations

from dataclasses import dataclass, field

# Below this share of the first rate a search gives up: no rate meets the target.
_LEAST = 1 / 64


@dataclass
class RateSearch:
    """Searches for the highest rate at which the attainment is at least ``target``.

    The bracket is widened by doubling and halving from ``start`` on, then halved (in ratio) until
    it is narrower than ``precision``. Attainment is taken to fall with the rate. After
    ``most_probes`` probes the best rate so far stands.
    """

    target: float
    start: float
    precision: float = 0.05
    most_probes: int = 12
    probes: int = field(default=0, init=False)
    _tried: dict[float, bool] = field(default_factory=dict, init=False)

    @property
    def bad(self) -> float:
        """The lowest rate that missed the target; 0 if none has."""
        return min((rate for rate, met in self._tried.items() if not met), default=0.0)

    @property
    def good(self) -> float:
        """The highest rate that met the target below any that missed it; 0 if none has."""
        bad = self.bad
        met = [rate for rate, met in self._tried.items() if met and (not bad or rate < bad)]
        return max(met, default=0.0)

    @property
    def done(self) -> bool:
        """Whether ``good`` is the answer."""
        if self.probes >= self.most_probes:
            return True
        if self.good and self.bad:
            return self.bad <= self.good * (1 + self.precision)
        return bool(self.bad) and self.bad <= self.start * _LEAST

    @property
    def next_rate(self) -> float:
        """The rate to probe next."""
        if self.good and self.bad:
            return float((self.good * self.bad) ** 0.5)
        if self.good:
            return 2 * self.good
        return self.bad / 2 if self.bad else self.start

    def note(self, rate: float, attainment: float, *, own: bool = True) -> None:
        """A probe's result; ``own``: this search had asked for it."""
        self.probes += own
        self._tried[rate] = attainment >= self.target
