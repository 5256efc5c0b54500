"""Requests that go on from tokens which a dead worker had emitted.

The KV is gone; a prefill worker computes it anew from the prompt and the output so far, and sends
it like that of any prompt. Upstream has the receiving half of this for its own retractions
("rebootstrap": a request with output waits for recomputed KV), so such a request passes through
upstream's queues, with its memory budget, its aborts and its retries, like a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_ares.srt.disaggregation.request_state import rewind, tokenized_input, unpack_ids
from sglang_ares.srt.managers.io_struct import Resume

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.scheduler import AresScheduler


@dataclass
class _Waiting:
    """A rebuilt request whose KV is being computed."""

    req: Req
    message: Resume


class ResumedRequests:
    """The resumed requests of a decode worker, from the message until they enter a batch."""

    def __init__(self, scheduler: AresScheduler) -> None:
        self._scheduler = scheduler
        # By transfer: told, but not built yet (its grammar may still compile).
        self._told: dict[int, Resume] = {}
        self._waiting: list[_Waiting] = []
        # Upstream would ask the prefill worker for the KV itself; the controller has done that.
        manager: Any = scheduler.disagg_decode_prealloc_queue.kv_manager
        manager.submit_prefill_recompute = _already_dispatched

    def start(self, message: Resume) -> None:
        """Receive the request as upstream receives any; it comes back through ``take_built``."""
        self._told[message.room] = message
        self._scheduler.handle_generate_request(
            tokenized_input(
                message.spec,
                bootstrap_host=message.bootstrap_host,
                bootstrap_port=message.bootstrap_port,
                bootstrap_room=message.room,
            )
        )

    def take_built(self, req: Req) -> bool:
        """Whether ``req`` is one of ours; it then waits for its KV with its output restored."""
        message = self._told.pop(req.bootstrap_room, None)
        if message is None:
            return False
        queue = self._scheduler.disagg_decode_prealloc_queue
        if req.finished() or req.to_finish is not None:
            # Ended while it was built. To upstream it is new: it is answered, not queued.
            queue.add(req)
            return True
        rewind(req, message.output_ids)
        # So that the request is within its reasoning, or beyond its end, where it was.
        processor = self._scheduler.batch_result_processor
        processor._maybe_update_reasoning_tokens(req, unpack_ids(message.output_ids).tolist())
        self._waiting.append(_Waiting(req, message))
        queue.add(req, is_rebootstrap=True)
        return True

    def note_entering(self, reqs: Sequence[Req]) -> None:
        """A batch is entered by ``reqs``. The counters of those that were resumed are what the
        client was told, not what the second prefill found in its cache."""
        for waiting in self._waiting:
            if any(waiting.req is r for r in reqs):
                waiting.req.cached_tokens = waiting.message.cached_tokens
                waiting.req.reasoning_tokens = waiting.message.reasoning_tokens
        self._waiting = [
            w for w in self._waiting if not w.req.finished() and not any(w.req is r for r in reqs)
        ]


def _already_dispatched(kv_receiver: Any, payload: dict[str, Any]) -> None:
    """In place of upstream's call of the prefill worker's HTTP server, which ours lack."""
