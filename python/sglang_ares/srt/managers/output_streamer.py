"""What a worker may say to the detokenizer, and what it tells the controller instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

from sglang_ares.srt.managers.attempts import public_rid

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.worker_agent import WorkerAgent

# How upstream's errors begin when a KV transfer failed: not the request's fault.
KV_FAILURES = (
    "Prefill bootstrap failed",
    "Prefill transfer failed",
    "Decode handshake failed",
    "Decode transfer failed",
    "Metadata unexpectedly not ready",
    "Metadata corruption detected",
    "KV checksum mismatch",
)


class AresOutputStreamer(SchedulerOutputStreamer):
    """Keeps from the client what a new attempt can mend.

    Attempts that were declared void say nothing. A request whose KV did not come through is
    reported to the controller, which dispatches it again, unless its client has left anyway.
    """

    agent: ClassVar[WorkerAgent]

    def for_client(self, reqs: Sequence[Req]) -> list[Req]:
        """Those of ``reqs`` that may speak; the others are dealt with."""
        audible = []
        for req in reqs:
            reason = kv_failure(req)
            if self.agent.is_void(req.rid):
                continue
            if reason is None or self.agent.was_aborted(req.rid):
                audible.append(req)
            else:
                self.agent.request_failed(req.rid, reason)
        return audible


def kv_failure(req: Any) -> str | None:
    """The error of a request that failed in transfer, first line only; None if it did not."""
    if not isinstance(req.finished_reason, FINISH_ABORT):
        return None
    message = str(req.finished_reason.message or "")
    return message.splitlines()[0] if message.startswith(KV_FAILURES) else None


class PrefillOutputStreamer(AresOutputStreamer):
    """A prefill worker reports errors only: the decode worker streams the first token too."""

    def stream_output(
        self, reqs: Sequence[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        """Stream the requests that upstream has given up."""
        failed = [r for r in self.for_client(reqs) if isinstance(r.finished_reason, FINISH_ABORT)]
        if failed:
            super().stream_output(failed, return_logprob, skip_req)


class DecodeOutputStreamer(AresOutputStreamer):
    """A decode worker streams new tokens; a request that has just landed has none yet."""

    def stream_output(
        self, reqs: Sequence[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        """Stream the requests that have something to say."""
        news = [r for r in self.for_client(reqs) if r.finished() or has_news(r)]
        if news:
            super().stream_output(news, return_logprob, skip_req)


class TokenizerEcho:
    """Upstream's line to the tokenizer manager, on which a worker confirms aborts of requests
    that had not begun. The client knows its request by the rid it gave, and nothing of attempts."""

    def __init__(self, sender: SenderWrapper, agent: WorkerAgent) -> None:
        self._sender = sender
        self._agent = agent

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Send, unless it is the abort of a void attempt."""
        if isinstance(output, AbortReq) and output.rid:
            if self._agent.is_void(output.rid):
                return
            output.rid = public_rid(output.rid)
        self._sender.send_output(output, recv_obj)


def has_news(req: Any) -> bool:
    """Whether the request has output that was not streamed yet."""
    return len(req.output_ids) > req.send_token_offset
