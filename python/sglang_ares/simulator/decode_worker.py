"""A decode worker in closed form.

Between two events its batch is constant: every step adds one token to each of its ``n`` requests,
so that step ``j`` takes ``a + b n + c (T + n j)`` seconds and ``k`` steps a sum with a closed form.
The worker is advanced only when something touches it. Its clock then stands at a step boundary,
the first one not before the time of the event: like a real scheduler it looks up between steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from heapq import heapify, heappop, heappush

from sglang_ares.srt.policy.types import StepTime

# "Never": no event of this worker is due.
IDLE = math.inf


class DecodeWorker:
    """The batch, the memory and the queue of one worker.

    Times are seconds, ``clock`` that of the last settled step boundary and ``steps`` the steps
    done until then. ``running`` maps a request to the step at whose end it has all its tokens.
    ``tokens``: resident ones (prompt and output so far) of the running requests. ``promised``:
    tokens reserved for ``coming`` requests that are being prefilled, transferred or migrated here.
    ``waiting``: requests that found no memory, with the ``waiting_tokens`` they want. ``gaps``:
    the longest gap between two tokens of every request, kept up to date for those that leave.
    """

    __slots__ = (
        "_a",
        "_b",
        "_c",
        "_ends",
        "_gaps",
        "_peak_s",
        "_peak_steps",
        "_requests",
        "_resumed",
        "capacity",
        "clock",
        "coming",
        "due",
        "joined",
        "max_running",
        "promised",
        "reserved",
        "running",
        "steps",
        "tokens",
        "version",
        "waiting",
        "waiting_tokens",
    )

    def __init__(
        self,
        law: StepTime,
        *,
        capacity: int,
        max_running: int,
        reserved: int,
        gaps: list[float],
    ) -> None:
        self._a = law.fixed_ms * 1e-3
        self._b = law.per_request_ms * 1e-3
        self._c = law.per_token_ms * 1e-3
        self.capacity = capacity
        self.max_running = max_running
        self.reserved = reserved
        self.clock = 0.0
        self.steps = 0
        self.tokens = 0
        self.promised = 0
        self.coming = 0
        self.waiting: deque[int] = deque()
        self.waiting_tokens = 0
        self.running: dict[int, int] = {}
        # The step after which a running request came.
        self.joined: dict[int, int] = {}
        # Steps from the settled boundary to the scheduled event; which of the schedules is valid.
        self.due = 0
        self.version = 0
        # Heap of last_step * requests + request; entries of requests that left early stay until
        # they surface.
        self._ends: list[int] = []
        self._requests = len(gaps)
        self._gaps = gaps
        # Who goes on here after a pause, with its seconds, until a step has been done.
        self._resumed: list[tuple[int, float]] = []
        # The longest step since: a stack in which every entry is longer than all later ones.
        self._peak_steps: list[int] = []
        self._peak_s: list[float] = []

    def steps_until(self, time_s: float) -> int:
        """Fewest steps from the settled boundary after which the clock is not before ``time_s``."""
        wait = time_s - self.clock
        n = len(self.running)
        if wait <= 0 or not n:
            return 0
        growth = self._c * n
        first = self._a + self._b * n + self._c * self.tokens
        half = first - growth / 2
        k = math.ceil(2 * wait / (half + math.sqrt(half * half + 2 * growth * wait)))
        # The root is exact but for rounding, by which a boundary may be met or missed.
        while k > 0 and (k - 1) * (first + growth * (k - 2) / 2) >= wait:
            k -= 1
        while k * (first + growth * (k - 1) / 2) < wait:
            k += 1
        return k

    def duration(self, k: int) -> float:
        """Seconds that the next ``k`` steps take with the batch as it is."""
        n = len(self.running)
        first = self._a + self._b * n + self._c * self.tokens
        return k * (first + self._c * n * (k - 1) / 2)

    def settle(self, time_s: float) -> None:
        """Go to the first step boundary at or after ``time_s``, but not beyond the scheduled
        event; the boundary of a worker that does no steps is ``time_s``."""
        if self.running and not self.short_of_memory():
            k = min(self.steps_until(time_s), self.due)
            if k:
                self.advance(k)
        elif time_s > self.clock:
            for request in self.running:
                self._resumed.append((request, time_s - self.clock))
            self.clock = time_s

    def advance(self, k: int) -> None:
        """Do ``k`` steps, at least 1, of the batch as it is."""
        n = len(self.running)
        growth = self._c * n
        first = self._a + self._b * n + self._c * self.tokens
        longest = first + growth * (k - 1)
        self.clock += k * (first + growth * (k - 1) / 2)
        self.steps += k
        self.tokens += n * k
        self.due -= k
        peaks, at = self._peak_s, self._peak_steps
        while peaks and peaks[-1] <= longest:
            peaks.pop()
            at.pop()
        peaks.append(longest)
        at.append(self.steps)
        if self._resumed:
            pauses: dict[int, float] = {}
            for request, pause_s in self._resumed:
                pauses[request] = pauses.get(request, first) + pause_s
                self._gaps[request] = max(self._gaps[request], pauses[request])
            self._resumed.clear()

    def schedule(self) -> float:
        """When the batch changes by itself, and in how many steps (``due``): the next request
        ends, or the last step that fits is done. :data:`IDLE` if it does no steps."""
        n = len(self.running)
        tokens = self.tokens
        free = self.capacity - self.promised - tokens
        if not n or free < n:
            self.due = 0
            return IDLE
        k = self._next_end()[0] - self.steps
        if k > free // n:
            k = free // n
        self.due = k
        first = self._a + self._b * n + self._c * tokens
        return self.clock + k * (first + self._c * n * (k - 1) / 2)

    def _next_end(self) -> tuple[int, int]:
        """The step at whose end the next running request has all its tokens, and that request;
        ends of requests that left are removed on the way."""
        ends, running, size = self._ends, self.running, self._requests
        last, request = divmod(ends[0], size)
        while running.get(request) != last:
            heappop(ends)
            last, request = divmod(ends[0], size)
        return last, request

    def take(self, request: int, resident: int, remaining: int, pause_s: float) -> None:
        """``request`` joins at the settled boundary with ``resident`` tokens, ``remaining`` (at
        least 1) to come, and the last one ``pause_s`` ago."""
        last = self.steps + remaining
        self.running[request] = last
        self.joined[request] = self.steps
        self.tokens += resident
        heappush(self._ends, last * self._requests + request)
        if pause_s > 0:
            self._resumed.append((request, pause_s))

    def leave(self, request: int, resident: int) -> None:
        """``request``, of ``resident`` tokens now, leaves at the settled boundary."""
        del self.running[request]
        self.tokens -= resident
        if len(self._ends) > 4 * len(self.running) + 64:
            size = self._requests
            self._ends = [last * size + r for r, last in self.running.items()]
            heapify(self._ends)
        if self._resumed:
            self._resumed = [(r, pause_s) for r, pause_s in self._resumed if r != request]
        since = bisect_right(self._peak_steps, self.joined.pop(request))
        if since < len(self._peak_s) and self._peak_s[since] > self._gaps[request]:
            self._gaps[request] = self._peak_s[since]

    def ended(self) -> int | None:
        """A running request that has all its tokens at the settled boundary, if there is one."""
        if not self.running or self._ends[0] // self._requests > self.steps:
            return None
        last, request = self._next_end()
        return request if last <= self.steps else None

    def short_of_memory(self) -> bool:
        """Whether the next step does not fit. A request that runs alone then waits for those to
        come, whose memory is spoken for: one of them will be retracted, or it will."""
        return self.capacity - self.promised - self.tokens < len(self.running)

    def fits(self, tokens: int) -> bool:
        """Whether there is memory for ``tokens`` more and for the next step."""
        free = self.capacity - self.promised - self.tokens
        return tokens + len(self.running) <= free

    def has_room(self, tokens: int, steps: int = 0) -> bool:
        """Whether ``tokens`` can be promised to one more request, now or ``steps`` steps later, as
        upstream admits it: with ``reserved`` tokens left for every request that is here or coming,
        and for it."""
        present = len(self.running) + self.coming
        if present >= self.max_running:
            return False
        free = self.capacity - self.promised - self.tokens - steps * len(self.running)
        return tokens + self.reserved * (present + 1) <= free or (not present and tokens <= free)

    def promise(self, tokens: int) -> None:
        """Reserve memory for a request to come."""
        self.promised += tokens
        self.coming += 1

    def release(self, tokens: int) -> None:
        """End of a promise, kept or not."""
        self.promised -= tokens
        self.coming -= 1
