"""What a worker may say to the detokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class PrefillOutputStreamer(SchedulerOutputStreamer):
    """A prefill worker reports errors only: the decode worker streams the first token too."""

    def stream_output(
        self, reqs: Sequence[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        """Stream the requests that upstream has given up."""
        failed = [r for r in reqs if isinstance(r.finished_reason, FINISH_ABORT)]
        if failed:
            super().stream_output(failed, return_logprob, skip_req)


class DecodeOutputStreamer(SchedulerOutputStreamer):
    """A decode worker streams new tokens; a request that has just landed has none yet."""

    def stream_output(
        self, reqs: Sequence[Req], return_logprob: bool, skip_req: Req | None = None
    ) -> None:
        """Stream the requests that have something to say."""
        news = [r for r in reqs if r.finished() or has_news(r)]
        if news:
            super().stream_output(news, return_logprob, skip_req)


def has_news(req: Any) -> bool:
    """Whether the request has output that was not streamed yet."""
    return len(req.output_ids) > req.send_token_offset
