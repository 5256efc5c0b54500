"""Who changes their role by itself: the planner that ``--ares-roles`` names, once a second.

Each pass gives the policy the workers as they stand and the forecast of arrivals, and orders the
flip it decides on. Arrow's request scheduling, too, can ask for a worker that prefills (Algorithm
1); it is asked here with a prompt of mean length, as the engine places requests by
``--ares-placement``. No pass while a change is under way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from sglang_ares.srt.managers.instances import Instances
from sglang_ares.srt.managers.role_changes import PLANNER
from sglang_ares.srt.policy import elastic  # noqa: F401  (it registers)
from sglang_ares.srt.policy.elastic.arrow import flipped
from sglang_ares.srt.policy.elastic.decisions import (
    REQUEST_SCHEDULING,
    ROLES,
    Flip,
    FlipMemory,
    FlipRules,
    Moment,
)
from sglang_ares.srt.policy.elastic.forecast import ArrivalForecast
from sglang_ares.srt.policy.elastic.instances import InstanceTable, Slo
from sglang_ares.srt.policy.types import DECODE, PREFILL, MoveCost

if TYPE_CHECKING:
    from sglang_ares.profiles.profile import PrefillTime
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.io_struct import WorkerReport
    from sglang_ares.srt.managers.role_changes import RoleChanges

logger = logging.getLogger(__name__)

STATIC = "static"
_PASS_S = 1.0


class RoleLoads(NamedTuple):
    """Loads as ratios to the SLOs. ``of_role``: of those pools whose SLO is set. ``of_worker``: by
    worker, the role it has or is to have, and its load, None without an SLO."""

    of_role: dict[str, float]
    of_worker: dict[int, tuple[str, float | None]]


class RolePlanner:
    """Plans on the latest reports. ``cost`` tells what a migration takes; ``policy`` is a name of
    ``ROLES``. ``dilation``: how much slower than real time an emulated cluster runs.
    ``prefill_time``: what is known of earlier runs. ``show`` is given the loads once a second."""

    def __init__(
        self,
        state: ClusterState,
        roles: RoleChanges,
        policy: str,
        slo: Slo,
        cost: Callable[[], MoveCost],
        now: float,
        dilation: float = 1.0,
        prefill_time: PrefillTime | None = None,
        show: Callable[[RoleLoads], None] = lambda loads: None,
        reserved_tokens: int = 512,
    ) -> None:
        self._state = state
        self._roles = roles
        self.policy = policy
        self._slo = slo
        self._cost = cost
        self._pass_s = _PASS_S * dilation
        rules = FlipRules(reserved_tokens=reserved_tokens)
        self._rules = msgspec.structs.replace(
            rules, cooldown_s=rules.cooldown_s * dilation, horizon_s=rules.horizon_s * dilation
        )
        self._memory = FlipMemory()
        self._instances = Instances(state, slo, prefill_time)
        self._show = show
        self._forecast = ArrivalForecast(10.0 * dilation, 30.0 * dilation)
        self._arrived: list[int] = []
        self._last_pass = now
        self._table: InstanceTable | None = None

    # --- what happens -----------------------------------------------------------------------

    def on_arrival(self, prompt_tokens: int) -> None:
        """A request was dispatched."""
        self._arrived.append(prompt_tokens)

    def on_report(self, report: WorkerReport, now: float) -> None:
        """A worker's report."""
        self._instances.on_report(report, now)
        for length in report.ended_lengths:
            self._forecast.finished(length)

    def run_pass_when_due(self, now: float) -> None:
        """Observe, and plan, once a second. A policy that fails costs its pass."""
        if now - self._last_pass < self._pass_s:
            return
        prompts, self._arrived = self._arrived, []
        prefill_ms = sum(self._instances.prompt_ms(tokens) for tokens in prompts)
        interval_s = now - self._last_pass
        self._forecast.observe(interval_s, len(prompts), sum(prompts), prefill_ms)
        self._last_pass = now
        self._table = self._instances.table(now)
        self._show(self.loads(self._table))
        self._forecast.observe_resident(interval_s, float(self._table.decode_tokens.sum()))
        if self.policy == STATIC or self._roles.under_way or self._instances.prefill_time is None:
            return
        if not all(self._state.with_role(role) for role in (PREFILL, DECODE)):
            return
        try:
            self._plan(self._moment(now), prompts)
        except Exception:
            logger.exception("role planning policy %s failed", self.policy)

    def _moment(self, now: float) -> Moment:
        assert self._table is not None
        return Moment(
            instances=self._table,
            slo=self._slo,
            rules=msgspec.structs.replace(self._rules, cost=self._cost()),
            memory=self._memory,
            demand=self._forecast.demand,
            now=now,
        )

    def _plan(self, moment: Moment, prompts: list[int]) -> None:
        flip, memory = ROLES.get(self.policy)(moment)
        if flip is None and prompts:
            prompt_ms = self._instances.prompt_ms(sum(prompts) // len(prompts))
            assignment = REQUEST_SCHEDULING.get(self.policy).prefill(prompt_ms, moment)
            if assignment.flip:
                flip = Flip(assignment.row, False, "no prefill worker meets the TTFT SLO")
                memory = flipped(memory, moment.now, to_decode=False)
        if flip is not None:
            worker_id = int(moment.instances.worker_id[flip.row])
            role = DECODE if flip.to_decode else PREFILL
            refusal = self._roles.order(worker_id, role, moment.now, cause=PLANNER, why=flip.reason)
            if refusal is not None:
                logger.info("worker %d stays as it is: %s", worker_id, refusal[1])
                memory = msgspec.structs.replace(self._memory, held_passes=0)
        self._memory = memory

    # --- documents --------------------------------------------------------------------------

    def loads(self, table: InstanceTable) -> RoleLoads:
        """Every worker's load, and the pools'."""
        slo = self._slo
        of_role = {}
        if slo.ttft_ms:
            of_role[PREFILL] = table.prefill_load(slo)
        if slo.tpot_ms:
            of_role[DECODE] = table.decode_load(slo)
        of_worker: dict[int, tuple[str, float | None]] = {}
        for row, worker_id in enumerate(table.worker_id.tolist()):
            role = DECODE if table.decodes[row] else PREFILL
            ms, slo_ms = (
                (table.token_ms, slo.tpot_ms)
                if table.decodes[row]
                else (table.prefill_ms, slo.ttft_ms)
            )
            of_worker[worker_id] = (role, float(ms[row] / slo_ms) if slo_ms else None)
        return RoleLoads(of_role, of_worker)

    def status(self) -> dict[str, Any]:
        """The policy, the pools, and the loads as ratios to the SLOs (None without one)."""
        slo, table = self._slo, self._table
        return {
            "policy": self.policy,
            "ttft_slo_ms": slo.ttft_ms or None,
            "tpot_slo_ms": slo.tpot_ms or None,
            "prefill_load": table.prefill_load(slo) if table and slo.ttft_ms else None,
            "decode_load": table.decode_load(slo) if table and slo.tpot_ms else None,
            "pools": self._pools(),
            "workers": self._workers(table) if table is not None else [],
            "prefill_time": msgspec.to_builtins(self._instances.prefill_time),
        }

    def _workers(self, table: InstanceTable) -> list[dict[str, Any]]:
        """By worker: its load, and the most tokens it may hold within the TPOT SLO."""
        rows = zip(self.loads(table).of_worker.items(), table.max_tokens.tolist(), strict=True)
        return [
            {
                "id": worker_id,
                "load": load,
                "max_tokens": most if self._slo.tpot_ms else None,
            }
            for (worker_id, (_, load)), most in rows
        ]

    def _pools(self) -> dict[str, list[int]]:
        pools: dict[str, list[int]] = {PREFILL: [], DECODE: []}
        for view in self._state.serving():
            name = f"{view.role} to {view.changing_to}" if view.changing_to else view.role
            pools.setdefault(name, []).append(view.worker_id)
        return pools
