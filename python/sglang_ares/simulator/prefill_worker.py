"""A prefill worker: first come, first served, in steps of a limited number of tokens."""

from __future__ import annotations

from collections import deque

from sglang_ares.profiles.profile import PrefillTime


class PrefillWorker:
    """The queue of one worker and the step it is in.

    A step takes tokens from the head of the queue on, as many as ``chunk_tokens``: the rest of a
    prompt waits for the next step, short prompts share one. A request has its first output token
    when the step ends in which its last prompt token was computed.
    """

    __slots__ = ("_chunk_tokens", "_done", "_ending", "_law", "busy", "queue", "queued_tokens")

    def __init__(self, law: PrefillTime, chunk_tokens: int) -> None:
        self._law = law
        self._chunk_tokens = chunk_tokens
        # Requests that are not done, with their tokens.
        self.queue: deque[tuple[int, int]] = deque()
        self.queued_tokens = 0
        self.busy = False
        # Tokens of the queue's head that earlier steps computed; requests that this step ends.
        self._done = 0
        self._ending = 0

    def add(self, request: int, tokens: int) -> None:
        """``request`` wants the KV of ``tokens`` tokens."""
        self.queue.append((request, tokens))
        self.queued_tokens += tokens

    def begin_step(self) -> float:
        """Start the next step; the seconds it takes. The queue must not be empty."""
        law, left = self._law, self._chunk_tokens
        ms = law.fixed_ms
        done, ending = self._done, 0
        for _, tokens in self.queue:
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
        self.queued_tokens -= self._chunk_tokens - left
        self._done = done
        self._ending = ending
        self.busy = True
        return ms * 1e-3

    def end_step(self) -> list[int]:
        """The requests that now have their first token."""
        self.busy = False
        return [self.queue.popleft()[0] for _ in range(self._ending)]
