"""Everything hooked into upstream by name, in one place; called in ARES worker processes only.

Plain ``sglang`` processes of the same environment are not touched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_ares.srt.sampling.seeded import draw_filtered, multinomial_with_seed

if TYPE_CHECKING:
    from sglang_ares.srt.predictor.runtime import ForwardProbe

logger = logging.getLogger(__name__)

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
SAMPLING_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
PRUNED_STATES = "sglang.srt.layers.logits_processor.LogitsProcessor._get_pruned_states"
LOGITS = "sglang.srt.layers.logits_processor.LogitsProcessor.forward"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
PENALTY_FEED = "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens"

KV_PEER = "sglang.srt.disaggregation.nixl.conn.NixlKVManager._add_remote_peer"

SEEDED_DRAW = "sglang.srt.layers.sampler.multinomial_with_seed"
TORCH_SAMPLER = "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"

FORWARD = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"

# Set on a request by the worker when it enters a batch with output from another worker.
RESUMED_WITH_OUTPUT = "ares_resumed_with_output"


def hook_worker(
    scheduler_class: type,
    *,
    overlap: bool,
    seeded_sampling: bool,
    forward: Callable[..., Any] | None = None,
) -> None:
    """Register the hooks of a worker process; upstream applies them when it loads plugins.
    ``forward``: what runs in place of the model, if anything does."""
    HookRegistry.register(SCHEDULER, scheduler_class, HookType.REPLACE)
    HookRegistry.register(KV_PEER, _outlive_unreachable_peer, HookType.AROUND)
    if seeded_sampling:
        HookRegistry.register(SAMPLING_INFO, _seed_every_row, HookType.AFTER)
        HookRegistry.register(TORCH_SAMPLER, draw_filtered, HookType.AROUND)
        HookRegistry.register(SEEDED_DRAW, multinomial_with_seed, HookType.REPLACE)
    if forward is not None:
        HookRegistry.register(FORWARD, forward, HookType.REPLACE)
    if overlap:
        HookRegistry.register(PENALTY_FEED, _feed_one_step_late, HookType.AROUND)


def hook_forward(probe: ForwardProbe) -> None:
    """Register the hooks by which the length predictor runs within a worker's forward."""
    HookRegistry.register(PRUNED_STATES, probe.after_pruning, HookType.AFTER)
    HookRegistry.register(LOGITS, probe.after_logits, HookType.AFTER)
    HookRegistry.register(SAMPLE, probe.after_sampling, HookType.AFTER)


def hook_controller(controller_class: type) -> None:
    """Register and apply the hook of the controller process."""
    HookRegistry.register(CONTROLLER, controller_class, HookType.REPLACE)
    HookRegistry.apply_hooks()


def _outlive_unreachable_peer(original: Any, manager: Any, peer: Any) -> None:
    """Upstream's thread that listens to KV receivers ends with the first one that the transfer
    engine cannot connect to, and with it all transfers. Here only those to that receiver fail."""
    try:
        original(manager, peer)
    except Exception:
        manager.decode_kv_args_table.pop(peer.agent_name, None)
        logger.exception(
            "the transfer engine cannot connect to the KV receiver at %s; transfers to it fail. "
            "On hosts with several networks name the common one (UCX_NET_DEVICES)",
            peer.endpoint,
        )


def _seed_every_row(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Sample by (seed, position) instead of from a worker's random stream.

    The controller gives every request a seed, the client's or a random one; a sampled request
    then continues on another worker exactly as it would have here.
    """
    batch = next(a for a in (*args, *kwargs.values()) if hasattr(a, "reqs"))
    if result.sampling_seed is None:
        seeds = [r.sampling_params.sampling_seed for r in batch.reqs]
        if all(seed is not None for seed in seeds):
            result.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
    return result


def _feed_one_step_late(original: Any, batch: Any) -> Any:
    """Under overlap scheduling upstream feeds penalties one token late; a resumed request,
    whose newest token is known, must not be fed a token early in its first step."""
    flagged = [r for r in batch.reqs if getattr(r, RESUMED_WITH_OUTPUT, False)]
    # The first output token comes from the prefill worker and is known in the first step too.
    resumed = [r for r in flagged if len(r.output_ids) > 1]
    newest = [r.output_ids.pop() for r in resumed]
    try:
        return original(batch)
    finally:
        for req, token in zip(resumed, newest, strict=True):
            req.output_ids.append(token)
        for req in flagged:
            setattr(req, RESUMED_WITH_OUTPUT, False)
