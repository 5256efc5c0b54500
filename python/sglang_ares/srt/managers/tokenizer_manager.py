"""The front: upstream's tokenizer manager, told how many workers answer control requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs, ServerArgs


def init_ares_tokenizer_manager(server_args: ServerArgs, port_args: PortArgs) -> tuple[Any, Any]:
    """Upstream's tokenizer and template manager. Control requests (flush, internal state, …) go
    to every worker of the cluster, so that many answers make up one."""
    from sglang_ares.engine import ares_args_of

    tokenizer_manager, template_manager = init_tokenizer_manager(server_args, port_args)
    tokenizer_manager.update_control_communicator_fan_out(
        ares_args_of(server_args).total_workers
    )
    return tokenizer_manager, template_manager
