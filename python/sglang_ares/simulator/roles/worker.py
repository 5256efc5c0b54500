"""A worker that can prefill and decode.

Without prompts it is the decode worker in closed form. With prompts it goes step by step: each
step computes a chunk from the head of its queue. While requests decode there too, the step does
one token of each and fills its budget with the chunk, which lengthens the step (Arrow's local
scheduler; the colocated arm).
"""

from __future__ import annotations

from collections import deque

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.simulator.decode_worker import DecodeWorker
from sglang_ares.srt.policy.types import StepTime

# A step that decodes has at least this share of its budget for the chunk.
_LEAST_CHUNK = 0.25


class ElasticWorker(DecodeWorker):
    """``queue``: prompts that are not computed, with their tokens; memory is promised to the first
    ``allocated`` of them. ``queued_tokens``, ``queued_ms``: what they have still to be computed,
    and the time that takes. ``held``: tokens promised to ``prompts`` prompts, until their KV has
    left.
    ``computed``: requests whose prompt the settled steps have completed, for whoever settles."""

    __slots__ = (
        "_chunk",
        "_chunk_s",
        "_done",
        "_ending",
        "_fixed_a",
        "_left_done",
        "_mixed",
        "_prefill",
        "allocated",
        "chunked",
        "computed",
        "decoding",
        "held",
        "prompts",
        "queue",
        "queued_ms",
        "queued_tokens",
    )

    def __init__(
        self,
        law: StepTime,
        prefill: PrefillTime,
        *,
        chunk_tokens: int,
        mixed_tokens: int,
        capacity: int,
        max_running: int,
        reserved: int,
        gaps: list[float],
    ) -> None:
        super().__init__(
            law, capacity=capacity, max_running=max_running, reserved=reserved, gaps=gaps
        )
        self._prefill = prefill
        self._chunk = chunk_tokens
        self._mixed = mixed_tokens
        self._fixed_a = self._a
        self.queue: deque[tuple[int, int]] = deque()
        self.allocated = 0
        self.queued_tokens = 0
        self.queued_ms = 0.0
        self.held = 0
        self.prompts = 0
        self.computed: list[int] = []
        # Whether the next step has a chunk, and whether it decodes as well.
        self.chunked = False
        self.decoding = False
        self._chunk_s = 0.0
        # Tokens of the queue's head that are computed, and will be after the step; prompts it ends.
        self._done = self._left_done = 0
        self._ending = 0

    def add(self, request: int, tokens: int) -> None:
        """``request`` wants the KV of ``tokens`` tokens."""
        self.queue.append((request, tokens))
        self.queued_tokens += tokens
        self.queued_ms += self._prefill.ms(tokens)

    def hand_back(self) -> list[int]:
        """Give up the prompts that are not begun; who they are of. The worker is settled."""
        first = 1 if self._done else 0
        gone = list(self.queue)[first:]
        for index, (_, tokens) in enumerate(gone, start=first):
            self.queued_tokens -= tokens
            self.queued_ms -= self._prefill.ms(tokens)
            if index < self.allocated:
                self.let_go(tokens)
        for _ in gone:
            self.queue.pop()
        self.allocated = min(self.allocated, first)
        return [request for request, _ in gone]

    def hold(self, tokens: int) -> None:
        """Promise memory to a prompt."""
        self.promise(tokens)
        self.held += tokens
        self.prompts += 1

    def let_go(self, tokens: int) -> None:
        """A prompt's KV has left, or will not come."""
        self.release(tokens)
        self.held -= tokens
        self.prompts -= 1

    def keep(self, tokens: int) -> None:
        """A prompt's KV stays: what was promised to it becomes a request's that is to join, with
        room for its last token."""
        self.held -= tokens
        self.prompts -= 1
        self.promised += 1

    def plan_step(self) -> None:
        """Choose the next step's chunk; the worker is settled."""
        self._a = self._fixed_a
        self.chunked = False
        if not self.queue:
            return
        law = self._prefill
        # A lone request without memory for its next token waits; prompts do not.
        decoding = bool(self.running) and not self.short_of_memory()
        most = self._chunk
        if decoding:
            most = int(max(_LEAST_CHUNK * self._mixed, self._mixed - len(self.running), 1))
        left, ms = most, 0.0 if decoding else law.fixed_ms
        done, ending = self._done, 0
        for index, (_, tokens) in enumerate(self.queue):
            if index == self.allocated:
                if not self.has_room(tokens):
                    break
                self.hold(tokens)
                self.allocated += 1
            n = min(tokens - done, left)
            ms += law.per_token_ms * n + law.per_square_ms * n * (2 * done + n)
            left -= n
            done += n
            if done < tokens:
                break
            ending += 1
            done = 0
            if not left:
                break
        if left == most:
            return
        self.chunked, self.decoding = True, decoding
        self._chunk_s = ms * 1e-3
        self._left_done, self._ending = done, ending
        if decoding:
            self._a = self._fixed_a + self._chunk_s

    def step_s(self) -> float:
        """How long the step takes that the worker is in; 0 if none decodes."""
        return self.duration(1) if self.running else 0.0

    def settle(self, time_s: float) -> None:
        if self.chunked and not self.decoding:
            if time_s > self.clock:
                self.advance(1)
        else:
            super().settle(time_s)

    def advance(self, k: int) -> None:
        if not self.chunked:
            super().advance(k)
            return
        if self.decoding:
            super().advance(1)
        else:
            self.clock += self._chunk_s
            self.due = 0
            for request in self.running:
                self._resumed.append((request, self._chunk_s))
        self._end_chunk()

    def _end_chunk(self) -> None:
        law = self._prefill
        self.chunked = False
        self._a = self._fixed_a
        before, self._done = self._done, self._left_done
        for _ in range(self._ending):
            request, tokens = self.queue.popleft()
            self.computed.append(request)
            self.queued_tokens -= tokens - before
            self.queued_ms -= law.ms(tokens, before) if before else law.ms(tokens)
            before = 0
        self.allocated -= self._ending
        self._ending = 0
        more = self._done - before
        if more:
            self.queued_tokens -= more
            self.queued_ms -= law.ms(self._done, before) - law.fixed_ms
        if not self.queue:
            self.queued_ms = 0.0

    def schedule(self) -> float:
        if not self.chunked:
            return super().schedule()
        self.due = 1
        if not self.decoding:
            return self.clock + self._chunk_s
        self._next_end()
        return self.clock + self.duration(1)
