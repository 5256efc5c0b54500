"""The lines to and from workers on other hosts, in place of upstream's ipc sockets.

What upstream would pickle, or decode without bounds, becomes a message of ours; control requests
and their answers are upstream's own types, as JSON, as far as the tables here name them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
import zmq
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    CloseSessionReqInput,
    ConfigureLoggingReq,
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    FreezeGCReq,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    HealthCheckOutput,
    OpenSessionReqInput,
    PauseGenerationReqInput,
    ShutdownReq,
    TokenizedGenerateReqInput,
)

from sglang_ares.srt.disaggregation.request_state import spec_of
from sglang_ares.srt.managers.io_struct import (
    ControlReply,
    ControlRequest,
    Generate,
    Message,
    Outputs,
    encode,
)
from sglang_ares.srt.managers.remote_outputs import pack_batch
from sglang_ares.srt.security.curve import CurveKeys
from sglang_ares.srt.security.dropped import DroppedFrames
from sglang_ares.srt.security.sockets import connected_socket

logger = logging.getLogger(__name__)

# Control requests that workers on other hosts are sent, and what they may answer.
CONTROL_REQUESTS: Final = (
    AbortReq,
    FlushCacheReqInput,
    GetInternalStateReq,
    PauseGenerationReqInput,
    ContinueGenerationReqInput,
    FreezeGCReq,
)
CONTROL_REPLIES: Final = (
    AbortReq,
    FlushCacheReqOutput,
    GetInternalStateReqOutput,
    HealthCheckOutput,
)
# What workers on other hosts need not know of. Their hosts are told that the server ends.
HERE_ONLY: Final = (OpenSessionReqInput, CloseSessionReqInput, ConfigureLoggingReq, ShutdownReq)
# What a worker says to the detokenizer besides tokens; the workers of its own host say it too.
_FOR_THE_DETOKENIZER: Final = (FreezeGCReq, ConfigureLoggingReq)


def _decoder(types: tuple[type, ...]) -> msgspec.json.Decoder[Any]:
    union: Any = types[0]
    for other in types[1:]:
        union = union | other
    return msgspec.json.Decoder(union)


_requests = _decoder(CONTROL_REQUESTS)
_replies = _decoder(CONTROL_REPLIES)


def decode_request(body: bytes) -> Any:
    """The control request in a message; :class:`msgspec.MsgspecError` if it is none."""
    return _requests.decode(body)


def decode_reply(body: bytes) -> Any:
    """The answer in a message; :class:`msgspec.MsgspecError` if it is none."""
    return _replies.decode(body)


class RemoteInput:
    """The controller's line to a worker on another host, used like a ``WorkerInput``."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        self._tell = tell

    def put(self, request: Any) -> None:
        """Send a request. Control requests that cannot travel were refused by the front, or are
        none of this worker's business (sessions, whose requests do not travel either)."""
        if isinstance(request, TokenizedGenerateReqInput):
            self._tell(
                Generate(
                    spec=spec_of(request),
                    bootstrap_host=request.bootstrap_host or "",
                    bootstrap_port=request.bootstrap_port or 0,
                    room=request.bootstrap_room or 0,
                )
            )
        elif isinstance(request, CONTROL_REQUESTS):
            self._tell(ControlRequest(body=msgspec.json.encode(request)))
        elif not isinstance(request, HERE_ONLY):
            logger.error("%s cannot travel to another host", type(request).__name__)

    def close(self) -> None:
        """Nothing to close: the connection is the mailbox's."""


class OutputSender:
    """In place of upstream's line to the detokenizer."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: CurveKeys | None,
        worker_id: int,
    ) -> None:
        self.socket = connected_socket(context, zmq.PUSH, endpoint, keys=keys)
        self._worker_id = worker_id

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Send new tokens."""
        if isinstance(output, BatchTokenIDOutput):
            frame = encode(Outputs(worker_id=self._worker_id, batch=pack_batch(output)))
            self.socket.send(frame, flags=zmq.NOBLOCK)
        elif not isinstance(output, _FOR_THE_DETOKENIZER):
            raise TypeError(f"{type(output).__name__} cannot travel from another host")


class ReplySender:
    """In place of upstream's line to the tokenizer manager; ``report`` sends to the controller."""

    def __init__(
        self, report: Callable[[Message], None], worker_id: int, dropped: DroppedFrames
    ) -> None:
        self._report = report
        self._worker_id = worker_id
        self._dropped = dropped

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Send an answer to a control request, or an abort."""
        if isinstance(output, CONTROL_REPLIES):
            body = msgspec.json.encode(output, enc_hook=_plain)
            self._report(ControlReply(worker_id=self._worker_id, body=body))
        else:
            self._dropped.count(f"{type(output).__name__} cannot travel from another host")


def _plain(value: Any) -> Any:
    """Upstream's server information holds numpy's numbers among others."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot travel from another host")
