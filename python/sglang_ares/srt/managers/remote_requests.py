"""A worker on another host than the front's: requests come as messages to its mailbox, and what
it says goes out as messages, too. Upstream's ipc sockets exist, and nobody is at their other end.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
from sglang.srt.managers.io_struct import AbortReq

from sglang_ares.srt.disaggregation.checks import generate_fault
from sglang_ares.srt.disaggregation.request_state import tokenized_input
from sglang_ares.srt.managers.io_struct import ControlRequest, Generate
from sglang_ares.srt.managers.migration_host import facts_of
from sglang_ares.srt.managers.remote_io import OutputSender, ReplySender, decode_request
from sglang_ares.srt.security.sockets import LossWatch

if TYPE_CHECKING:
    from sglang_ares.srt.managers.scheduler import AresScheduler


class RemoteRequests:
    """Feeds a scheduler from its mailbox, on every tensor-parallel rank alike."""

    def __init__(self, scheduler: AresScheduler, outputs_endpoint: str) -> None:
        self._scheduler = scheduler
        self._outputs_endpoint = outputs_endpoint
        # Connections that this worker must not survive.
        self.lifelines: list[LossWatch] = []

    @classmethod
    def of(cls, scheduler: AresScheduler) -> RemoteRequests | None:
        """None on the front's own host."""
        endpoint = scheduler.spec.outputs_endpoint
        return cls(scheduler, endpoint) if endpoint is not None else None

    def instead_of(self, channels: Any) -> Any:
        """Upstream's channels, with the lines to the front replaced; only rank 0 has any."""
        spec, agent = self._scheduler.spec, self._scheduler.ares
        if not agent.speaks:
            return channels
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        outputs = OutputSender(context, self._outputs_endpoint, spec.curve_keys, spec.worker_id)
        self.lifelines = [*agent.lifelines, LossWatch(context, outputs.socket)]
        return dataclasses.replace(
            channels,
            send_to_tokenizer=ReplySender(agent.report, spec.worker_id, agent.dropped),
            send_to_detokenizer=outputs,
        )

    def receive(self, message: Generate | ControlRequest) -> None:
        """Hand a request to upstream, as if it had come from the front's socket."""
        if isinstance(message, Generate):
            self._generate(message)
            return
        try:
            request = decode_request(message.body)
        except msgspec.MsgspecError as error:
            self._scheduler.ares.dropped.count(f"ControlRequest: {error}")
        else:
            self._scheduler.process_input_requests([request])

    def _generate(self, message: Generate) -> None:
        scheduler = self._scheduler
        fault = generate_fault(message, facts_of(scheduler))
        if fault is not None:
            # It came from the controller, so a client waits for it.
            scheduler.ares.dropped.count(f"Generate of {message.spec.rid}: {fault}")
            finish = {"type": "abort", "message": fault, "status_code": 400}
            abort = AbortReq(rid=message.spec.rid, finished_reason=finish)
            scheduler.ipc_channels.send_to_tokenizer.send_output(abort)
            scheduler.ares.note_refused(message.spec.rid)
            return
        scheduler.process_input_requests(
            [
                tokenized_input(
                    message.spec,
                    bootstrap_host=message.bootstrap_host,
                    bootstrap_port=message.bootstrap_port,
                    bootstrap_room=message.room,
                )
            ]
        )
