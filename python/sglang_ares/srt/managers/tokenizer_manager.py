"""The front: upstream's tokenizer manager, told of all workers of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_ares.srt.managers.load_snapshots import cluster_load_reader
from sglang_ares.srt.managers.remote_io import CONTROL_REQUESTS, HERE_ONLY

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import ActiveRanksOutput
    from sglang.srt.server_args import PortArgs, ServerArgs

# Requests are placed where they can run; some control requests concern workers of this host only.
SENT_ANYWAY = (
    TokenizedGenerateReqInput,
    BatchTokenizedGenerateReqInput,
    *CONTROL_REQUESTS,
    *HERE_ONLY,
)


class AresTokenizerManager(TokenizerManager):
    """Upstream's tokenizer manager in front of workers that may die and come back, and of workers
    on other hosts."""

    # Workers of this host, which come first; whether others serve too.
    workers_here = 0
    _elsewhere = False

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """Upstream's; what cannot travel to all workers is refused."""
        self._refuse_what_cannot_travel(obj)
        super()._dispatch_to_scheduler(obj)

    async def _async_dispatch_to_scheduler(self, obj: Any) -> None:
        """Upstream's; what cannot travel to all workers is refused."""
        self._refuse_what_cannot_travel(obj)
        await super()._async_dispatch_to_scheduler(obj)

    def _refuse_what_cannot_travel(self, obj: Any) -> None:
        if self._elsewhere and not isinstance(obj, SENT_ANYWAY):
            raise HTTPException(
                501,
                f"{type(obj).__name__} cannot be sent to workers on other hosts; it would reach "
                "a part of the cluster only. Let those workers leave first.",
            )

    def update_request_meta_info(
        self,
        meta_info: dict[str, Any],
        state: Any,
        customized_info: dict[str, Any],
        index: int,
        finish_reason: dict[str, Any] | None,
    ) -> None:
        """Upstream's, for requests that have such information; those beside them get no empty
        lists."""
        own = {k: v for k, v in customized_info.items() if v[index]}
        seen = {k: v for k, v in customized_info.items() if k in state.customized_info_accumulated}
        super().update_request_meta_info(meta_info, state, seen | own, index, finish_reason)

    def update_active_ranks(self, ranks: ActiveRanksOutput) -> None:
        """The controller says which workers serve. Control requests (flush, internal state, …)
        go to all of them and are complete with so many answers; one under way when a worker
        dies is not to wait for it."""
        serving = sum(ranks.status)
        self._elsewhere = any(ranks.status[self.workers_here :])
        self.update_control_communicator_fan_out(serving)
        for communicator in vars(self).values():
            if isinstance(communicator, FanOutCommunicator):
                _expect_at_most(communicator, serving)


def _expect_at_most(communicator: Any, answers: int) -> None:
    if communicator._result_event is None or communicator._result_fan_out is None:
        return
    communicator._result_fan_out = min(communicator._result_fan_out, answers)
    if len(communicator._result_values) >= communicator._result_fan_out:
        communicator._result_event.set()


def init_ares_tokenizer_manager(server_args: ServerArgs, port_args: PortArgs) -> tuple[Any, Any]:
    """Upstream's template manager and our tokenizer manager; ``/v1/loads`` lists every worker."""
    from sglang_ares.engine import ares_args_of

    workers = ares_args_of(server_args).total_workers
    tokenizer_manager, template_manager = init_tokenizer_manager(
        server_args, port_args, AresTokenizerManager
    )
    tokenizer_manager.workers_here = workers
    tokenizer_manager.update_control_communicator_fan_out(workers)
    # Upstream's name for the number of schedulers that answer weight updates and load queries.
    tokenizer_manager.elastic_worker_count = workers
    tokenizer_manager.load_snapshot_reader = cluster_load_reader(port_args.instance_id, workers)
    return tokenizer_manager, template_manager
