"""What a worker may say to the detokenizer, and what it tells the controller instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.utils import is_health_check_generate_req

from sglang_ares.srt.managers.attempts import public_rid
from sglang_ares.srt.managers.probes import is_probe

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.managers.worker_agent import WorkerAgent
    from sglang_ares.srt.predictor.tracker import PredictionTracker

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


# A request's custom parameter that asks for its predictions, and where they then stand.
ASK_FOR_PREDICTED = "return_predicted_remaining"
PREDICTED = "predicted_remaining"


class AresOutputStreamer(SchedulerOutputStreamer):
    """Keeps from the client what a new attempt can mend.

    Attempts that were declared void say nothing. A request whose KV did not come through is
    reported to the controller, which dispatches it again, unless its client has left anyway.
    Requests with the custom parameter ``return_predicted_remaining`` get ``predicted_remaining`` in
    their ``meta_info``: a list with, for each piece of output sent, the output tokens so far and
    the quantiles of those to come.
    """

    has_additional_customized_info = True

    agent: ClassVar[WorkerAgent]
    predictions: ClassVar[PredictionTracker | None] = None

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

    def should_build_additional_customized_info(self) -> bool:
        """Only where something is predicted."""
        return self.predictions is not None

    def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[Any]]:
        """One list per request; empty for those that did not ask."""
        assert self.predictions is not None
        if not any(asks_for_prediction(r) for r in reqs):
            return {}
        return {PREDICTED: [self._predicted(r) if asks_for_prediction(r) else [] for r in reqs]}

    def _predicted(self, req: Req) -> list[list[float]]:
        assert self.predictions is not None
        remaining = self.predictions.remaining(req)
        return [[len(req.output_ids), *remaining]] if remaining is not None else []

    def stream_output(
        self, reqs: Sequence[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        """Stream the requests that have something to say in the worker's role: while it
        prefills, those that upstream has given up, as the decode worker streams the first token
        too; while it decodes, those with new tokens, which one that has just landed has not."""
        prefills = self.disaggregation_mode is DisaggregationMode.PREFILL
        audible = [
            r
            for r in self.for_client(reqs)
            if (
                isinstance(r.finished_reason, FINISH_ABORT)
                if prefills
                else r.finished() or has_news(r)
            )
        ]
        if not prefills:
            for req in audible:
                if has_come_to_its_end(req):
                    self.agent.note_ended(len(req.output_ids))
        if audible:
            super().stream_output(audible, return_logprob, skip_req)


def kv_failure(req: Any) -> str | None:
    """The error of a request that failed in transfer, first line only; None if it did not."""
    if not isinstance(req.finished_reason, FINISH_ABORT):
        return None
    message = str(req.finished_reason.message or "")
    return message.splitlines()[0] if message.startswith(KV_FAILURES) else None


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


def asks_for_prediction(req: Any) -> bool:
    """Whether the client wants to see what is predicted."""
    custom = req.sampling_params.custom_params
    return custom is not None and bool(custom.get(ASK_FOR_PREDICTED))


def has_come_to_its_end(req: Any) -> bool:
    """Whether a client's request has ended just now, and nobody aborted it."""
    ended = req.finished() and not req.finished_output
    aborted = isinstance(req.finished_reason, FINISH_ABORT)
    ours = is_health_check_generate_req(req) or is_probe(req.rid)
    return ended and not aborted and not ours


def has_news(req: Any) -> bool:
    """Whether the request has output that was not streamed yet."""
    return len(req.output_ids) > req.send_token_offset
