"""Everything hooked into upstream by name, in one place; called in ARES worker processes only.

Plain ``sglang`` processes of the same environment are not touched.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_ares.srt.sampling.seeded import draw_filtered, multinomial_with_seed

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
SAMPLING_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
PENALTY_FEED = "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens"

SEEDED_DRAW = "sglang.srt.layers.sampler.multinomial_with_seed"
TORCH_SAMPLER = "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"

# Set on a request by the worker when it enters a batch with output from another worker.
RESUMED_WITH_OUTPUT = "ares_resumed_with_output"


def hook_worker(scheduler_class: type, *, overlap: bool, seeded_sampling: bool) -> None:
    """Register the hooks of a worker process; upstream applies them when it loads plugins."""
    HookRegistry.register(SCHEDULER, scheduler_class, HookType.REPLACE)
    if seeded_sampling:
        HookRegistry.register(SAMPLING_INFO, _seed_every_row, HookType.AFTER)
        HookRegistry.register(TORCH_SAMPLER, draw_filtered, HookType.AROUND)
        HookRegistry.register(SEEDED_DRAW, multinomial_with_seed, HookType.REPLACE)
    if overlap:
        HookRegistry.register(PENALTY_FEED, _feed_one_step_late, HookType.AROUND)


def hook_controller(controller_class: type) -> None:
    """Register and apply the hook of the controller process."""
    HookRegistry.register(CONTROLLER, controller_class, HookType.REPLACE)
    HookRegistry.apply_hooks()


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
