"""The front: upstream's tokenizer manager, told of all workers of the cluster."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from fastapi import BackgroundTasks, HTTPException
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    TokenizedGenerateReqInput,
    UpdateWeightFromDiskReqInput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_ares.srt.managers.load_snapshots import cluster_load_reader
from sglang_ares.srt.managers.remote_io import CONTROL_REQUESTS, HERE_ONLY
from sglang_ares.srt.managers.served_requests import count_ended
from sglang_ares.srt.observability.metrics import SloMetrics
from sglang_ares.srt.observability.slo import SloAttainment
from sglang_ares.srt.policy.elastic.instances import Slo
from sglang_ares.srt.security.bounds import MAX_CLIENT_RID_CHARS

if TYPE_CHECKING:
    from fastapi import Request
    from sglang.srt.managers.io_struct import (
        AbortReq,
        ActiveRanksOutput,
        EmbeddingReqInput,
        GenerateReqInput,
        UpdateWeightFromDiskReqOutput,
    )
    from sglang.srt.server_args import PortArgs, ServerArgs

    from sglang_ares.ares_args import AresArgs

# Requests are placed where they can run; some control requests concern workers of this host only.
SENT_ANYWAY = (
    TokenizedGenerateReqInput,
    BatchTokenizedGenerateReqInput,
    *CONTROL_REQUESTS,
    *HERE_ONLY,
)

# Seconds between two updates of the shares in ``/metrics``.
_SLO_SHOWN_EVERY_S = 1.0


class AresTokenizerManager(TokenizerManager):
    """Upstream's tokenizer manager in front of workers that may die and come back, and of workers
    on other hosts."""

    # Workers of this host, which come first; whether others serve too.
    workers_here = 0
    _elsewhere = False
    # How many workers serve, and how many of them have still to be heard of new weights.
    serving = 0
    _updates_due = 0
    # Set where something is promised, and where metrics are on.
    attainment: SloAttainment | None = None
    slo_metrics: SloMetrics | None = None
    _slo_shown: asyncio.Task[None] | None = None

    # --- SLO attainment ---------------------------------------------------------------------

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        """Upstream's, after which the requests that have ended are counted."""
        ended = []
        if self.attainment is not None:
            reasons = zip(recv_obj.rids, recv_obj.finished_reasons, strict=True)
            ended = [
                (self.rid_to_state.get(rid), reason, i)
                for i, (rid, reason) in enumerate(reasons)
                if reason is not None
            ]
        await super()._handle_batch_output(recv_obj)
        now = time.monotonic()
        for state, reason, i in ended:
            if state is not None and self.attainment is not None:
                count_ended(self.attainment, state, reason, recv_obj.completion_tokens[i], now)

    def _handle_abort_req(self, recv_obj: AbortReq) -> None:
        """Upstream's; an error from the controller is a broken promise."""
        state = self.rid_to_state.get(recv_obj.rid)
        super()._handle_abort_req(recv_obj)
        if self.attainment is not None and state is not None:
            reason = recv_obj.finished_reason or {"type": "abort"}
            count_ended(self.attainment, state, reason, 0, time.monotonic())

    def create_abort_task(self, obj: GenerateReqInput) -> BackgroundTasks:
        """Two seconds after a stream has ended or its client has gone, what still runs of it is
        aborted, as upstream does; but not another request that bears its name by then."""

        async def abort_what_still_runs() -> None:
            await asyncio.sleep(2)
            for i, rid in enumerate([obj.rid] if obj.is_single else obj.rid):
                state = self.rid_to_state.get(rid)
                if state is not None and state.obj is (obj if obj.is_single else obj[i]):
                    self.abort_request(rid)

        tasks = BackgroundTasks()
        tasks.add_task(abort_what_still_runs)
        return tasks

    def auto_create_handle_loop(self) -> None:
        """Upstream's tasks, and one that keeps the shares in ``/metrics`` up to date."""
        super().auto_create_handle_loop()
        if self.slo_metrics is not None and self._slo_shown is None:
            self._slo_shown = self.event_loop.create_task(self._show_slo())

    async def _show_slo(self) -> None:
        while self.attainment is not None and self.slo_metrics is not None:
            self.slo_metrics.show(self.attainment, time.monotonic())
            await asyncio.sleep(_SLO_SHOWN_EVERY_S)

    # --- requests ---------------------------------------------------------------------------

    def _init_req_state(
        self, obj: GenerateReqInput | EmbeddingReqInput, request: Request | None = None
    ) -> None:
        """Upstream's; a rid that no message of ours could carry is refused. Here, because an error
        from the controller would not end a request whose rid looks like a health check's."""
        rids = [obj.rid] if isinstance(obj.rid, str) else obj.rid
        if any(len(rid) > MAX_CLIENT_RID_CHARS for rid in rids):
            raise ValueError(f"the rid is longer than {MAX_CLIENT_RID_CHARS} characters")
        super()._init_req_state(obj, request)
        # With n > 1 every sample gets a rid of its own later. Those drawn for them before bear no
        # request that could end, and the server would wait for them when it is told to.
        for rid in rids[getattr(obj, "batch_size", len(rids)) :]:
            del self.rid_to_state[rid]

    # --- workers ----------------------------------------------------------------------------

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """Upstream's; what cannot travel to all workers is refused."""
        self._refuse_what_cannot_travel(obj)
        if isinstance(obj, UpdateWeightFromDiskReqInput):
            self._updates_due = self.serving
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
        self.serving = serving = sum(ranks.status)
        self._elsewhere = any(ranks.status[self.workers_here :])
        self.update_control_communicator_fan_out(serving)
        for communicator in vars(self).values():
            if isinstance(communicator, FanOutCommunicator):
                _expect_at_most(communicator, serving)
        self._updates_due = min(self._updates_due, serving)
        self._end_weight_update()

    def _handle_update_weights_from_disk_req_output(
        self, recv_obj: UpdateWeightFromDiskReqOutput
    ) -> None:
        """Upstream waits for as many answers as there were workers at the start; for ever, and
        with the model locked, where one has been lost since."""
        self.model_update_tmp.append(recv_obj)
        self._end_weight_update()

    def _end_weight_update(self) -> None:
        result, answers = self.model_update_result, self.model_update_tmp
        if result is not None and not result.done() and 0 < self._updates_due <= len(answers):
            result.set_result(answers)


def _expect_at_most(communicator: Any, answers: int) -> None:
    if communicator._result_event is None or communicator._result_fan_out is None:
        return
    communicator._result_fan_out = min(communicator._result_fan_out, answers)
    if len(communicator._result_values) >= communicator._result_fan_out:
        communicator._result_event.set()


def init_ares_tokenizer_manager(server_args: ServerArgs, port_args: PortArgs) -> tuple[Any, Any]:
    """Upstream's template manager and our tokenizer manager; ``/v1/loads`` lists every worker."""
    from sglang_ares.engine import ares_args_of

    ares_args = ares_args_of(server_args)
    workers = ares_args.total_workers
    tokenizer_manager, template_manager = init_tokenizer_manager(
        server_args, port_args, AresTokenizerManager
    )
    tokenizer_manager.workers_here = tokenizer_manager.serving = workers
    tokenizer_manager.update_control_communicator_fan_out(workers)
    # Upstream's name for the number of schedulers that answer weight updates and load queries.
    tokenizer_manager.elastic_worker_count = workers
    tokenizer_manager.load_snapshot_reader = cluster_load_reader(port_args.instance_id, workers)
    tokenizer_manager.attainment = attainment_of(ares_args)
    if tokenizer_manager.attainment is not None:
        tokenizer_manager.slo_metrics = SloMetrics.create(server_args)
    return tokenizer_manager, template_manager


def attainment_of(ares_args: AresArgs) -> SloAttainment | None:
    """The count of promises kept, if any are made."""
    slo = Slo(ttft_ms=ares_args.ttft_slo_ms, tpot_ms=ares_args.tpot_slo_ms)
    if not (slo.ttft_ms or slo.tpot_ms):
        return None
    return SloAttainment(slo, ares_args.time_dilation)
