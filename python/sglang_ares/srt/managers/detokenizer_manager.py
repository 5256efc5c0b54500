"""The detokenizer: upstream's, with each request's tokens put in order first.

Every worker has a connection of its own to the detokenizer, and nothing orders messages across
connections: after a move, tokens of the new worker can overtake the last ones of the old. Each
message says which tokens it carries, so the order is restored here, whatever the timing.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import OrderedDict
from typing import Any, ClassVar

import msgspec
import zmq
from sglang.srt.managers.detokenizer_manager import DETOKENIZER_MAX_STATES, DetokenizerManager
from sglang.srt.managers.io_struct import (
    BatchStrOutput,
    BatchTokenIDOutput,
    sock_recv,
    sock_send,
)

from sglang_ares.srt.managers.batch_items import first_token, select
from sglang_ares.srt.managers.io_struct import (
    Decoder,
    LedgerDropped,
    LedgerInbound,
    OutputsInbound,
    encode,
)
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.managers.remote_outputs import batch_fault, unpack_batch
from sglang_ares.srt.managers.token_ledger import TokenLedger
from sglang_ares.srt.security.control_plane import ControlPlane
from sglang_ares.srt.security.dropped import DroppedFrames
from sglang_ares.srt.security.sockets import BoundSocket

CONTROLLER = "controller"
# Messages of other hosts handled before this host's workers are listened to again.
_OUTPUTS_AT_ONCE = 256
# How often the sockets are looked at that nothing has arrived on: who was refused there sends
# nothing that would wake the loop up.
_LOOK_S = 1.0


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

    def forget_early(self, rid: str) -> None:
        """Drop what waits for an earlier message of this request."""
        self._early.pop(rid, None)

    def admit(self, batch: BatchTokenIDOutput) -> list[BatchTokenIDOutput]:
        """What may be passed on now, in order: usually ``batch`` itself."""
        early = [i for i in range(len(batch.rids or ())) if not self._is_next(batch, i)]
        if early:
            for i in early:
                entry = (first_token(batch, i), next(self._count), select(batch, [i]))
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
        return first_token(batch, i) <= self._passed.get(batch.rids[i], 0)

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


class AresDetokenizerManager(DetokenizerManager):
    """Upstream's detokenizer behind the :class:`TokenLedger` and :class:`InOrder`."""

    control: ClassVar[ControlPlane]

    def init_running_status(self, server_args: Any) -> None:
        """Upstream's state, the order of the streams, and the ledger with its mailbox."""
        super().init_running_status(server_args)
        self._in_order = InOrder()
        self._ledger = TokenLedger()
        self._from_controller = Decoder(LedgerInbound)
        context, keys = zmq.Context(1), self.control.keys
        self._admission = keys and keys.admit(context)
        self._dropped = DroppedFrames("ledger")
        self._mailbox = Mailbox(context, self.control.ledger.bind, keys=keys, dropped=self._dropped)
        self._mailbox.connect(CONTROLLER, self.control.controller.connect)
        self._from_elsewhere = Decoder(OutputsInbound)
        outputs = self.control.outputs
        self._outputs = (
            BoundSocket(context, zmq.PULL, outputs.bind, keys=keys, dropped=self._dropped)
            if outputs is not None
            else None
        )
        self._next_look = 0.0
        self._told_dropped = 0

    def event_loop(self) -> None:
        """Upstream's loop, interrupted for the controller's fences and for what workers on other
        hosts say."""
        poller = zmq.Poller()
        poller.register(self.recv_from_scheduler, zmq.POLLIN)
        poller.register(self._mailbox.socket, zmq.POLLIN)
        if self._outputs is not None:
            poller.register(self._outputs.socket, zmq.POLLIN)
        while True:
            with self.soft_watchdog.disable():
                ready = dict(poller.poll(1e3 * _LOOK_S))
            now = time.monotonic()
            look = now >= self._next_look
            if look or self._mailbox.socket in ready:
                self._answer_controller()
            if self.recv_from_scheduler in ready:
                self._pass_on(sock_recv(self.recv_from_scheduler))
            if self._outputs is not None and (look or self._outputs.socket in ready):
                for (frame,) in self._outputs.receive(parts=1, limit=_OUTPUTS_AT_ONCE):
                    self._admit_from_elsewhere(frame)
            if look:
                self._next_look = now + _LOOK_S
                self._tell_dropped()
            self.soft_watchdog.feed()

    def _pass_on(self, received: Any) -> None:
        output = self._request_dispatcher(received)
        if output is not None:
            sock_send(self.send_to_tokenizer, output)

    def _admit_from_elsewhere(self, frame: bytes) -> None:
        """Tokens of a worker on another host; from here on they are like any others."""
        try:
            message = self._from_elsewhere.decode(frame)
        except msgspec.MsgspecError as error:
            self._dropped.count(str(error))
            return
        fault = batch_fault(message.batch)
        if fault is not None:
            self._dropped.count(f"Outputs of worker {message.worker_id}: {fault}")
            return
        try:
            self._pass_on(unpack_batch(message.batch))
        except Exception as error:
            what = f"Outputs of worker {message.worker_id} could not be handled"
            self._dropped.count(what, error=error)

    def _tell_dropped(self) -> None:
        total = self._dropped.total
        if total != self._told_dropped:
            self._told_dropped = total
            self._mailbox.send(CONTROLLER, encode(LedgerDropped(dropped_frames=total)))

    def _answer_controller(self) -> None:
        for frame in self._mailbox.drain():
            try:
                request = self._from_controller.decode(frame)
            except msgspec.MsgspecError as error:
                self._dropped.count(str(error))
                continue
            for rid in request.attempts:
                self._in_order.forget_early(rid)
            self._mailbox.send(CONTROLLER, encode(self._ledger.fence(request)))

    def handle_batch_token_id_out(self, recv_obj: BatchTokenIDOutput) -> BatchStrOutput | None:
        """Detokenize what is in order; what came early follows the message it waited for."""
        batch = self._ledger.admit(recv_obj)
        if not batch.rids and recv_obj.rids:
            return None
        outputs = []
        for ordered in self._in_order.admit(batch):
            self._ledger.record(ordered)
            self._forget_earlier_texts(ordered)
            outputs.append(super().handle_batch_token_id_out(ordered))
        for output in outputs[:-1]:
            sock_send(self.send_to_tokenizer, output)
        return outputs[-1] if outputs else None

    def _forget_earlier_texts(self, batch: BatchTokenIDOutput) -> None:
        """A first token begins a text. One that the controller, or a worker without a word to
        here, ended with an error is still open, should the rid be used again."""
        for i, rid in enumerate(batch.rids or ()):
            if first_token(batch, i) == 0:
                self.decode_status.pop(rid, None)
