"""The front: upstream's tokenizer manager, told of all workers of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager

from sglang_ares.srt.managers.load_snapshots import cluster_load_reader

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs, ServerArgs


def init_ares_tokenizer_manager(server_args: ServerArgs, port_args: PortArgs) -> tuple[Any, Any]:
    """Upstream's tokenizer and template manager. Control requests (flush, internal state, …) go
    to every worker, so that many answers make up one; ``/v1/loads`` lists every worker."""
    from sglang_ares.engine import ares_args_of

    workers = ares_args_of(server_args).total_workers
    tokenizer_manager, template_manager = init_tokenizer_manager(server_args, port_args)
    tokenizer_manager.update_control_communicator_fan_out(workers)
    # Upstream's name for the number of schedulers that answer weight updates and load queries.
    tokenizer_manager.elastic_worker_count = workers
    tokenizer_manager.load_snapshot_reader = cluster_load_reader(port_args.instance_id, workers)
    return tokenizer_manager, template_manager
