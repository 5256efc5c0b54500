"""The front: upstream's tokenizer manager, told of all workers of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_ares.srt.managers.load_snapshots import cluster_load_reader

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import ActiveRanksOutput
    from sglang.srt.server_args import PortArgs, ServerArgs


class AresTokenizerManager(TokenizerManager):
    """Upstream's tokenizer manager in front of workers that may die and come back."""

    def update_active_ranks(self, ranks: ActiveRanksOutput) -> None:
        """The controller says which workers serve. Control requests (flush, internal state, …)
        go to all of them and are complete with so many answers; one under way when a worker
        dies is not to wait for it."""
        serving = sum(ranks.status)
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
    tokenizer_manager.update_control_communicator_fan_out(workers)
    # Upstream's name for the number of schedulers that answer weight updates and load queries.
    tokenizer_manager.elastic_worker_count = workers
    tokenizer_manager.load_snapshot_reader = cluster_load_reader(port_args.instance_id, workers)
    return tokenizer_manager, template_manager
