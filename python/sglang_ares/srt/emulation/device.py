"""The accelerator of an emulated worker: it is busy for as long as a profile says."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from sglang_ares.profiles.profile import Profile


class EmulatedDevice:
    """Sleeps out the step times of ``profile``, each ``dilation`` times as long.

    Steps follow each other without a gap as long as the worker has work: what the scheduler does
    between two of them is part of the next step, as under overlap scheduling on a GPU. A step that
    the scheduler reaches only after it should have ended is counted in ``late_steps``: the host is
    too slow for these step times, and ``dilation`` too small.
    """

    def __init__(
        self,
        profile: Profile,
        dilation: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._profile = profile
        self._dilation = dilation
        self._clock = clock
        self._sleep = sleep
        # When the last step ended; None after a rest.
        self._free_at: float | None = None
        self.late_steps = 0

    def decode(self, requests: int, tokens: int) -> None:
        """A decode step over ``requests`` requests with ``tokens`` resident tokens."""
        self._work(self._profile.decode.ms(requests, tokens))

    def prefill(self, chunks: Iterable[tuple[int, int]]) -> None:
        """A prefill step. Each request's chunk is (tokens it reaches to, tokens before it)."""
        law = self._profile.prefill
        self._work(law.fixed_ms + sum(law.ms(end, start) - law.fixed_ms for start, end in chunks))

    def rest(self) -> None:
        """There is nothing to do; the next step begins when it is asked for."""
        self._free_at = None

    def _work(self, milliseconds: float) -> None:
        now = self._clock()
        begin = now if self._free_at is None else self._free_at
        self._free_at = begin + self._dilation * milliseconds / 1e3
        if self._free_at > now:
            self._sleep(self._free_at - now)
        else:
            self.late_steps += 1
            self._free_at = now
