"""A worker's own part of a change of role: wait until it is idle, relabel, start over."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from sglang.srt.disaggregation.role_switch import PdRoleSwitchRestart

from sglang_ares.srt.disaggregation.roles import relabel
from sglang_ares.srt.managers.io_struct import ChangeRole, RoleChanged

if TYPE_CHECKING:
    from sglang_ares.srt.managers.scheduler import AresScheduler

logger = logging.getLogger(__name__)


class RoleSwitch:
    """Carries out the controller's :class:`ChangeRole`, in the same step on all ranks.

    The controller sends it once nothing is left to do here; what it cannot see (buffers that a
    transfer still holds, an aborted request's last step) may keep the worker busy for up to
    ``patience_s`` more.
    """

    def __init__(self, scheduler: AresScheduler, patience_s: float) -> None:
        self._scheduler = scheduler
        self._patience_s = patience_s
        self._order: ChangeRole | None = None
        self._deadline = 0.0

    @property
    def waiting(self) -> bool:
        """Whether there is a change to carry out."""
        return self._order is not None

    def order(self, order: ChangeRole, now: float) -> None:
        """The controller wants this worker to change; an order that names another is dropped."""
        agent = self._scheduler.ares
        if (order.worker_id, order.incarnation) != (agent.worker_id, agent.incarnation):
            agent.dropped.count(
                f"ChangeRole: it is for worker {order.worker_id}, start {order.incarnation}"
            )
            return
        self._order = order
        self._deadline = now + self._patience_s

    def step(self, now: float) -> None:
        """Between two steps of the event loop. Raises ``PdRoleSwitchRestart`` after the change:
        upstream's supervisor of event loops then enters the loop of the new role."""
        order, agent = self._order, self._scheduler.ares
        if order is None:
            return
        if agent.role == order.role:
            self._answer(order, "")
        elif self._all_ranks_idle():
            self._switch(order, now)
        elif now >= self._deadline:
            left = len(self._scheduler.live_requests())
            self._answer(
                order,
                f"the worker was busy for {self._patience_s:.0f} s: {left} requests, or memory "
                "that a transfer still holds",
            )

    def _switch(self, order: ChangeRole, now: float) -> None:
        agent, started = self._scheduler.ares, time.monotonic()
        agent.report_all_ended(self._scheduler, now)
        relabel(self._scheduler, order.role)
        agent.role = order.role
        self._answer(order, "")
        agent.report_load(self._scheduler, now, force=True)
        logger.info("worker %d is a %s worker now", agent.worker_id, order.role)
        logger.debug("relabelled within %.1f ms", 1e3 * (time.monotonic() - started))
        raise PdRoleSwitchRestart

    def _answer(self, order: ChangeRole, reason: str) -> None:
        agent = self._scheduler.ares
        self._order = None
        agent.report(
            RoleChanged(
                change_id=order.change_id,
                worker_id=agent.worker_id,
                role=agent.role,
                reason=reason,
            )
        )

    def _all_ranks_idle(self) -> bool:
        """Whether every rank is idle now; asked by all of them in the same step."""
        scheduler = self._scheduler
        idle = scheduler.is_fully_idle() and not scheduler._engine_paused
        group = scheduler.attn_tp_cpu_group
        if torch.distributed.get_world_size(group) == 1:
            return idle
        agreed = torch.tensor([idle], dtype=torch.int32)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=group)
        return bool(agreed.item())
