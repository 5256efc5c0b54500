"""Sends requests, attempt by attempt, to a prefill and a decode worker each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.io_struct import sock_send

from sglang_ares.srt.disaggregation.request_state import recompute_input, spec_of, unpack_ids
from sglang_ares.srt.managers.io_struct import Resume
from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.types import DECODE, PREFILL, NewRequest

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    from sglang_ares.srt.managers.cluster import WorkerCluster
    from sglang_ares.srt.managers.cluster_state import ClusterState, Ownership
    from sglang_ares.srt.managers.io_struct import EmittedTokens, Message
    from sglang_ares.srt.managers.worker_input import WorkerInput
    from sglang_ares.srt.observability.metrics import ControllerMetrics


class Dispatcher:
    """``inputs``: the workers' request sockets, by worker id; ``tell`` sends control messages."""

    def __init__(
        self,
        state: ClusterState,
        cluster: WorkerCluster,
        inputs: list[WorkerInput],
        placement: str,
        metrics: ControllerMetrics,
        tell: Callable[[int, Message], None],
    ) -> None:
        self._state = state
        self._cluster = cluster
        self._inputs = inputs
        self._policy = PLACEMENT.get(placement)
        self._metrics = metrics
        self._tell = tell
        self._sequence = 0

    def choose(self, prompt_tokens: int) -> tuple[int, int] | None:
        """A prefill and a decode worker for a request, if there are such workers."""
        prefill, decode = self._state.loads(PREFILL), self._state.loads(DECODE)
        if not prefill or not decode:
            return None
        new = NewRequest(prompt_tokens=prompt_tokens, sequence=self._sequence)
        self._sequence += 1
        return self._policy(new, prefill), self._policy(new, decode)

    def send_attempt(self, owner: Ownership, emitted: EmittedTokens | None) -> bool:
        """Send the current attempt at a request to two workers; false if there are none.

        If tokens were emitted, the prefill worker computes the KV of all but the last of them,
        and the decode worker goes on behind that.
        """
        req = owner.request
        output = unpack_ids(emitted.output_ids if emitted is not None else b"")
        prompt_tokens = len(req.input_ids or ()) + len(output)
        chosen = self.choose(prompt_tokens)
        if chosen is None:
            return False
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
            sock_send(self._inputs[owner.prefill], recompute_input(attempt, output))
            self._tell(owner.decode, resume_message(attempt, emitted))
        else:
            sock_send(self._inputs[owner.prefill], attempt)
            sock_send(self._inputs[owner.decode], attempt)
        self._state.note_dispatch(owner, prompt_tokens)
        self._metrics.dispatched(owner.prefill, PREFILL)
        self._metrics.dispatched(owner.decode, DECODE)
        return True

    def probe(self, req: TokenizedGenerateReqInput) -> None:
        """A health check: each of two workers answers by itself, without a KV transfer, or
        leaves it to its running requests when it is busy. Nobody owns it."""
        chosen = self.choose(len(req.input_ids or ()))
        if chosen is None:
            return
        prefill, decode = chosen
        req.bootstrap_host = FAKE_BOOTSTRAP_HOST
        req.bootstrap_room = 0
        sock_send(self._inputs[prefill], req)
        sock_send(self._inputs[decode], req)


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
