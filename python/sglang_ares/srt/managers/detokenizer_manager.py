"""The detokenizer: upstream's, with each request's tokens put in order first.

Every worker has a connection of its own to the detokenizer, and nothing orders messages across
connections: after a move, tokens of the new worker can overtake the last ones of the old. Each
message says which tokens it carries, so the order is restored here, whatever the timing.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from typing import Any

import msgspec
from sglang.srt.managers.detokenizer_manager import DETOKENIZER_MAX_STATES, DetokenizerManager
from sglang.srt.managers.io_struct import (
    BatchStrOutput,
    BatchTokenIDOutput,
    PickleWrapper,
    sock_send,
    unwrap_from_pickle,
    wrap_as_pickle,
)


class InOrder:
    """Holds back what arrives before its turn."""

    def __init__(self, capacity: int = DETOKENIZER_MAX_STATES) -> None:
        self._capacity = capacity
        # rid -> tokens passed on so far.
        self._passed: OrderedDict[str, int] = OrderedDict()
        # rid -> heap of (first token, tie-break, batch of one) that came too early.
        self._early: OrderedDict[str, list[tuple[int, int, BatchTokenIDOutput]]] = OrderedDict()
        self._count = itertools.count()

    @property
    def held(self) -> int:
        """Messages that wait for an earlier one."""
        return sum(len(waiting) for waiting in self._early.values())

    def admit(self, batch: BatchTokenIDOutput) -> list[BatchTokenIDOutput]:
        """What may be passed on now, in order: usually ``batch`` itself."""
        early = [i for i in range(len(batch.rids or ())) if not self._is_next(batch, i)]
        if early:
            for i in early:
                entry = (_first_token(batch, i), next(self._count), select(batch, [i]))
                heapq.heappush(self._early.setdefault(batch.rids[i], []), entry)
            # What a request waits for may never come: its worker died, or the client left.
            while len(self._early) > self._capacity:
                self._early.popitem(last=False)
            waiting = set(early)
            batch = select(batch, [i for i in range(len(batch.rids)) if i not in waiting])
        admitted = [batch] if batch.rids or not early else []
        for i in range(len(batch.rids or ())):
            self._pass(batch, i)
        for rid in list(batch.rids or ()) if self._early else ():
            admitted += self._release(rid)
        return admitted

    def _is_next(self, batch: BatchTokenIDOutput, i: int) -> bool:
        if batch.beam_search_output is not None and batch.beam_search_output[i] is not None:
            return True
        return _first_token(batch, i) <= self._passed.get(batch.rids[i], 0)

    def _pass(self, batch: BatchTokenIDOutput, i: int) -> None:
        rid = batch.rids[i]
        if batch.finished_reasons[i] is not None:
            self._passed.pop(rid, None)
            self._early.pop(rid, None)
            return
        self._passed[rid] = batch.completion_tokens[i]
        self._passed.move_to_end(rid)
        while len(self._passed) > self._capacity:
            self._early.pop(self._passed.popitem(last=False)[0], None)

    def _release(self, rid: str) -> list[BatchTokenIDOutput]:
        released = []
        while rid in self._early and self._is_next(self._early[rid][0][2], 0):
            _, _, batch = heapq.heappop(self._early[rid])
            if not self._early[rid]:
                del self._early[rid]
            self._pass(batch, 0)
            released.append(batch)
        return released


def _first_token(batch: BatchTokenIDOutput, i: int) -> int:
    """Index of the first output token that item ``i`` carries."""
    carried = len(batch.output_ids[i]) if batch.output_ids is not None else 0
    return int(batch.completion_tokens[i]) - carried


def select(batch: BatchTokenIDOutput, items: list[int]) -> BatchTokenIDOutput:
    """A batch with only these items: every field that has one value per item is cut down."""
    count = len(batch.rids)

    def cut(value: Any) -> Any:
        if isinstance(value, PickleWrapper):
            return wrap_as_pickle(cut(unwrap_from_pickle(value)))
        if isinstance(value, dict):
            return {name: cut(column) for name, column in value.items()}
        if isinstance(value, list) and len(value) == count:
            return [value[i] for i in items]
        return value

    fields = msgspec.structs.asdict(batch)
    return type(batch)(**{name: cut(value) for name, value in fields.items()})


class AresDetokenizerManager(DetokenizerManager):
    """Upstream's detokenizer behind :class:`InOrder`."""

    def init_running_status(self, server_args: Any) -> None:
        """Upstream's state, and the order of the streams."""
        super().init_running_status(server_args)
        self._in_order = InOrder()

    def handle_batch_token_id_out(self, recv_obj: BatchTokenIDOutput) -> BatchStrOutput | None:
        """Detokenize what is in order; what came early follows the message it waited for."""
        outputs = [
            super(AresDetokenizerManager, self).handle_batch_token_id_out(batch)
            for batch in self._in_order.admit(recv_obj)
        ]
        for output in outputs[:-1]:
            sock_send(self.send_to_tokenizer, output)
        return outputs[-1] if outputs else None
