"""What migrations may use up: the source's bandwidth over time, the target's KV memory.

Pure bookkeeping without clocks of its own; both are in units of KV, not of messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class BandwidthBudget:
    """A token bucket over KV pages, shared by all migrations out of one worker.

    ``rate``: pages per second (0: unlimited). Whoever finds the bucket in credit may send one
    chunk of any size, and the next one waits until the debt is paid: so a chunk is delayed but
    never impossible, and the last pages of a request that has stopped go out at once.
    """

    rate: float
    burst: float = 1.0
    _level: float = field(default=0.0, init=False)
    _at: float | None = field(default=None, init=False)

    def ready(self, now: float) -> bool:
        """Whether a chunk may be sent now."""
        return self.rate <= 0 or self._credit(now) > 0

    def spend(self, pages: int, now: float) -> None:
        """Pages were sent, allowed or not."""
        if self.rate > 0:
            self._level = self._credit(now) - pages

    def seconds_for(self, pages: float, growth: float) -> float | None:
        """How long it takes to send ``pages`` while ``growth`` pages a second are added to them;
        None if they grow faster than they can be sent."""
        if self.rate <= 0:
            return 0.0
        return pages / (self.rate - growth) if self.rate > growth else None

    def _credit(self, now: float) -> float:
        """The level at ``now``; it starts full."""
        if self._at is None:
            self._level = self.burst
        else:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level


@dataclass
class InboundMemory:
    """KV tokens that inbound migrations hold reserved, against the most they may hold."""

    most_tokens: int
    _held: dict[int, int] = field(default_factory=dict, init=False)

    @property
    def held_tokens(self) -> int:
        """Reserved now, over all inbound migrations."""
        return sum(self._held.values())

    def admits(self, tokens: int) -> bool:
        """Whether ``tokens`` more may be reserved."""
        return self.held_tokens + tokens <= self.most_tokens

    def hold(self, migration_id: int, tokens: int) -> None:
        """A migration reserved memory."""
        self._held[migration_id] = tokens

    def release(self, migration_id: int) -> None:
        """Its memory is free again, or belongs to a request that decodes here."""
        self._held.pop(migration_id, None)
