"""The token ledger: what of every request has gone towards the client, and who may still speak.

It stands where all workers' outputs meet, in the detokenizer's process, in front of everything
the client sees. To recover a request from a dead worker the controller raises a fence here: from
that moment only the new attempt is let through, and the answer says which tokens went out before.
Both happen between two messages, so no token is lost or repeated, whoever wakes up later.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import BatchTokenIDOutput

from sglang_ares.srt.disaggregation.request_state import pack_ids
from sglang_ares.srt.managers.attempts import split_rid
from sglang_ares.srt.managers.batch_items import first_token, select
from sglang_ares.srt.managers.io_struct import EmittedTokens, Fenced, FenceRequests

# Requests remembered at most: so many live ones, and so many ended ones that a fence may ask for.
_CAPACITY = 1 << 16


@dataclass
class _Entry:
    attempt: int = 0
    output_ids: array[int] = field(default_factory=lambda: array("q"))
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    # Its beginning is forgotten: nobody can continue it.
    incomplete: bool = False


class TokenLedger:
    """Knows requests by the client's rid; attempts speak under their internal names."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        # Live requests, the one that has been silent for longest first: what nobody will ever
        # hear the end of goes before any that still streams.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        # Ended ones: the attempt that came to the end.
        self._ended: OrderedDict[str, int] = OrderedDict()
        # Requests that were fenced, and the first attempt that may speak; others: attempt 0.
        # (A rid that is used again goes on counting, without a fence.)
        self._attempts: OrderedDict[str, int] = OrderedDict()
        # Who spoke last.
        self._speakers: OrderedDict[str, int] = OrderedDict()
        self.fenced_off = 0

    def admit(self, batch: BatchTokenIDOutput) -> BatchTokenIDOutput:
        """``batch`` under the client's rids, without what void attempts say."""
        named = [split_rid(name) for name in batch.rids or ()]
        valid = [
            i for i, (rid, attempt) in enumerate(named) if attempt >= self._attempts.get(rid, 0)
        ]
        if len(valid) < len(named):
            self.fenced_off += len(named) - len(valid)
            batch = select(batch, valid)
        if batch.rids:
            batch.rids = [named[i][0] for i in valid]
        for i in valid:
            rid, attempt = named[i]
            self._speakers[rid] = attempt
            self._speakers.move_to_end(rid)
        _forget_oldest(self._speakers, self._capacity)
        return batch

    def record(self, batch: BatchTokenIDOutput) -> None:
        """Note what goes out now: ``batch`` is admitted and in order."""
        for i, rid in enumerate(batch.rids or ()):
            attempt, start = self._speakers.get(rid, 0), first_token(batch, i)
            if batch.finished_reasons[i] is not None:
                self._entries.pop(rid, None)
                self._attempts.pop(rid, None)
                self._ended[rid] = attempt
                self._ended.move_to_end(rid)
                continue
            entry = self._entries.get(rid)
            if entry is None and start > 0 and rid in self._ended:
                continue  # a void attempt's last words
            if entry is None or start == 0:
                self._ended.pop(rid, None)
                entry = self._entries[rid] = _Entry(incomplete=start > 0)
            self._entries.move_to_end(rid)
            entry.attempt = attempt
            if batch.output_ids is not None:
                entry.output_ids.extend(batch.output_ids[i])
            entry.cached_tokens = batch.cached_tokens[i]
            entry.reasoning_tokens = batch.reasoning_tokens[i]
        _forget_oldest(self._entries, self._capacity)
        _forget_oldest(self._ended, self._capacity)

    def fence(self, request: FenceRequests) -> Fenced:
        """Let no earlier attempts speak from here on; what they had said."""
        emitted = []
        for rid, attempt in request.attempts.items():
            self._attempts[rid] = attempt
            self._attempts.move_to_end(rid)
            first = request.first_attempts.get(rid, 0)
            entry = self._entries.get(rid, _Entry())
            if entry.attempt < first:
                entry = _Entry()
            emitted.append(
                EmittedTokens(
                    rid=rid,
                    ended=self._ended.get(rid, -1) >= first,
                    incomplete=entry.incomplete,
                    output_ids=pack_ids(entry.output_ids),
                    cached_tokens=entry.cached_tokens,
                    reasoning_tokens=entry.reasoning_tokens,
                )
            )
        _forget_oldest(self._attempts, self._capacity)
        return Fenced(fence_id=request.fence_id, requests=emitted)


def _forget_oldest(table: OrderedDict[str, Any], capacity: int) -> None:
    while len(table) > capacity:
        table.popitem(last=False)
