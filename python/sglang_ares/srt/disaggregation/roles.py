"""The structures of both roles in one worker, so that a change of role is a relabel.

Upstream builds the queues and the KV manager of one role; its runtime switch tears them down and
builds the other's, which needs a backend that can (Mooncake). Here a worker has both from the
start: the decode side by upstream's own ``init_disaggregation``, and the prefill side over the
same metadata buffers. Nothing is registered with the transfer engine, or with the KV bootstrap
server, a second time; the model, the KV pool and the prefix cache are not touched. That works
with every backend that can migrate.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.prefill import PrefillBootstrapQueue
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.runtime_context import get_context, get_device, get_disagg

from sglang_ares.srt.policy.types import DECODE

if TYPE_CHECKING:
    from sglang_ares.srt.managers.scheduler import AresScheduler

logger = logging.getLogger(__name__)


def add_prefill_side(scheduler: AresScheduler) -> Any:
    """Build upstream's prefill structures next to the decode ones; returns their KV manager,
    which sends: what was prefilled, and what migrates.

    The KV manager registers with this worker's own KV bootstrap server.
    """
    queue = PrefillBootstrapQueue(
        token_to_kv_pool=scheduler.token_to_kv_pool_allocator.get_kvcache(),
        draft_token_to_kv_pool=None,
        req_to_metadata_buffer_idx_allocator=scheduler.req_to_metadata_buffer_idx_allocator,
        metadata_buffers=scheduler.disagg_metadata_buffers,
        gpu_id=get_device().gpu_id,
        bootstrap_port=get_disagg().disaggregation_bootstrap_port,
        gloo_group=scheduler.attn_tp_cpu_group,
        max_total_num_tokens=scheduler.max_total_num_tokens,
        scheduler=scheduler,
        scheduler_stage_metrics=scheduler.scheduler_stage_metrics,
        transfer_backend=scheduler.transfer_backend,
    )
    scheduler.disagg_prefill_bootstrap_queue = queue
    scheduler.disagg_prefill_inflight_queue = []
    scheduler.disagg_prefill_pending_chunk_rids = set()
    scheduler.enable_staging = False
    return queue.kv_manager


def label(scheduler: AresScheduler, role: str) -> None:
    """Make ``role`` the worker's label for all of upstream that reads it from here on.

    The components that upstream builds later read it from the scheduler; those it has built are
    told by :func:`relabel`.
    """
    get_context().override("ares.role", disaggregation_mode=role)
    scheduler.disaggregation_mode = DisaggregationMode(role)


def relabel(scheduler: AresScheduler, role: str) -> None:
    """Change the role of a worker that is idle; the event loop must be entered anew."""
    label(scheduler, role)
    scheduler._sync_disaggregation_mode_to_subcomponents()
    scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
    scheduler.last_batch = None
    scheduler.cur_batch_for_debug = None
    if role == DECODE and not scheduler.server_args.disable_cuda_graph:
        # A worker that was started for prefill has none; captured once, at its first change.
        scheduler.tp_worker.ensure_decode_cuda_graphs()
