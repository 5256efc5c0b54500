"""Sends requests, attempt by attempt, to a prefill and a decode worker each."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import msgspec
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

from sglang_ares.srt.disaggregation.refusals import TRAVEL, first_refusal
from sglang_ares.srt.disaggregation.request_state import recompute_input, spec_of, unpack_ids
from sglang_ares.srt.managers.io_struct import Resume
from sglang_ares.srt.managers.probes import is_probe
from sglang_ares.srt.policy.admission import room
from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.types import DECODE, PREFILL, NewRequest

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    from sglang_ares.srt.managers.cluster import WorkerCluster
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.cluster_views import Ownership
    from sglang_ares.srt.managers.io_struct import EmittedTokens, Message
    from sglang_ares.srt.managers.length_predictions import LengthPredictions
    from sglang_ares.srt.managers.remote_io import RemoteInput
    from sglang_ares.srt.managers.worker_input import WorkerInput
    from sglang_ares.srt.observability.metrics import ControllerMetrics
    from sglang_ares.srt.policy.snapshot import Ints, WorkerTable
    from sglang_ares.srt.policy.types import WorkerLoad


class Sent(enum.Enum):
    """What became of an attempt."""

    SENT = "sent"
    NO_WORKER = "no worker of a role takes requests"
    NOT_AMONG = "none of the decode workers that were named takes it"


class Dispatcher:
    """``inputs``: the workers' request sockets, by worker id; ``tell`` sends control messages.
    ``reserved_tokens``: KV that a decode worker keeps free for each of its requests."""

    def __init__(
        self,
        state: ClusterState,
        cluster: WorkerCluster,
        inputs: list[WorkerInput | RemoteInput],
        placement: str,
        metrics: ControllerMetrics,
        tell: Callable[[int, Message], None],
        predictions: LengthPredictions,
        reserved_tokens: int,
    ) -> None:
        self._state = state
        self._cluster = cluster
        self._inputs = inputs
        self.use(placement)
        self._metrics = metrics
        self._tell = tell
        self._predictions = predictions
        self._reserved = reserved_tokens
        self._sequence = 0

    def use(self, placement: str) -> None:
        """Place with this policy from now on; :class:`KeyError` if there is none of the name."""
        self._policy = PLACEMENT.get(placement)
        self.placement = placement

    def choose(
        self,
        prompt_tokens: int,
        req: TokenizedGenerateReqInput | None = None,
        among: Collection[int] | None = None,
    ) -> tuple[int, int] | Sent:
        """A prefill and a decode worker for a request, or why there are none: of this host if
        ``req`` cannot travel to another, and a decode worker ``among`` these ids, if given."""
        prefill, decode = self._state.loads(PREFILL), self._state.loads(DECODE)
        if req is not None and first_refusal(TRAVEL, req) is not None:
            prefill, decode = self._here(prefill), self._here(decode)
        if not prefill or not decode:
            return Sent.NO_WORKER
        if among is not None:
            decode = [load for load in decode if load.worker_id in among]
            if not decode:
                return Sent.NOT_AMONG
        new = NewRequest(
            prompt_tokens=prompt_tokens,
            sequence=self._sequence,
            remaining=self._predictions.of_new(),
        )
        self._sequence += 1
        table = self._predictions.table
        return self._place(new, table(prefill)), self._place(new, table(decode))

    def rooms(self) -> tuple[Ints, Ints] | None:
        """``(W,)`` ids of the decode workers, and tokens of the largest request that each has room
        for; None if a role has no worker that takes requests."""
        decode = self._state.loads(DECODE)
        if not decode or not self._state.with_role(PREFILL):
            return None
        table = self._predictions.table(decode)
        return table.worker_id, room(table, self._reserved)

    def _here(self, loads: list[WorkerLoad]) -> list[WorkerLoad]:
        """Those of workers on this host."""
        return [load for load in loads if not self._state.workers[load.worker_id].host]

    def _place(self, new: NewRequest, workers: WorkerTable) -> int:
        """The id of the worker that the policy chooses."""
        return int(workers.worker_id[self._policy(new, workers)])

    def send_attempt(
        self,
        owner: Ownership,
        emitted: EmittedTokens | None,
        among: Collection[int] | None = None,
    ) -> Sent:
        """Send the current attempt at a request to two workers, if there are such; to a decode
        worker ``among`` these ids, if given.

        If tokens were emitted, the prefill worker computes the KV of all but the last of them,
        and the decode worker goes on behind that.
        """
        req = owner.request
        output = unpack_ids(emitted.output_ids if emitted is not None else b"")
        prompt_tokens = len(req.input_ids or ()) + len(output)
        chosen = self.choose(prompt_tokens, req, among)
        if isinstance(chosen, Sent):
            return chosen
        owner.prefill, owner.decode = chosen
        source = self._cluster.workers[owner.prefill].spec
        attempt = msgspec.structs.replace(
            req,
            rid=owner.name,
            bootstrap_host=source.bootstrap_host,
            bootstrap_port=source.bootstrap_port,
            bootstrap_room=random.SystemRandom().getrandbits(62),
        )
        if emitted is not None and output:
            self._inputs[owner.prefill].put(recompute_input(attempt, output))
            self._tell(owner.decode, resume_message(attempt, emitted))
        else:
            self._inputs[owner.prefill].put(attempt)
            self._inputs[owner.decode].put(attempt)
        self._state.note_dispatch(owner, prompt_tokens)
        if not is_probe(owner.rid):
            self._metrics.dispatched(owner.prefill, PREFILL)
            self._metrics.dispatched(owner.decode, DECODE)
        return Sent.SENT

    def probe(self, req: TokenizedGenerateReqInput) -> None:
        """A health check: each of two workers answers by itself, without a KV transfer, or
        leaves it to its running requests when it is busy. Nobody owns it."""
        chosen = self.choose(len(req.input_ids or ()))
        if isinstance(chosen, Sent):
            return
        prefill, decode = chosen
        req.bootstrap_host = FAKE_BOOTSTRAP_HOST
        req.bootstrap_room = 0
        self._inputs[prefill].put(req)
        self._inputs[decode].put(req)


def resume_message(attempt: TokenizedGenerateReqInput, emitted: EmittedTokens) -> Resume:
    """What the decode worker of a request with output is sent."""
    return Resume(
        spec=spec_of(attempt),
        output_ids=emitted.output_ids,
        cached_tokens=emitted.cached_tokens,
        reasoning_tokens=emitted.reasoning_tokens,
        bootstrap_host=attempt.bootstrap_host,
        bootstrap_port=attempt.bootstrap_port,
        room=attempt.bootstrap_room,
    )
