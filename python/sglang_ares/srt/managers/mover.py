"""Commands migrations, for whatever cause: the policy's plans, memory that runs short, a worker to
be emptied, the operator's wish."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from sglang_ares.srt.disaggregation.migration import COMPLETED
from sglang_ares.srt.managers.cluster_views import (
    DRAIN,
    MEMORY,
    POLICY,
    ROLE,
    MovingRequest,
)
from sglang_ares.srt.managers.io_struct import MigrationResult, StartMigration
from sglang_ares.srt.managers.memory_relief import MemoryRelief
from sglang_ares.srt.policy.draining import drain_moves
from sglang_ares.srt.policy.move_cost import MoveCostFit
from sglang_ares.srt.policy.registry import RESCHEDULING
from sglang_ares.srt.policy.snapshot import Snapshot
from sglang_ares.srt.policy.types import DECODE, MoveCost, RescheduleLimits, moves_per_round

if TYPE_CHECKING:
    from sglang_ares.ares_args import AresArgs
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.io_struct import Landed, Message, WorkerReport
    from sglang_ares.srt.managers.length_predictions import LengthPredictions

logger = logging.getLogger(__name__)

# Tokens of KV that a migration is reckoned to copy per second before any was measured.
_FIRST_TOKENS_PER_S = 100_000.0


class Mover:
    """Plans on the latest loads; ``tell`` sends to a worker."""

    def __init__(
        self,
        state: ClusterState,
        ares_args: AresArgs,
        reserved_tokens: int,
        tell: Callable[[int, Message], None],
        predictions: LengthPredictions,
        now: float,
    ) -> None:
        self._state = state
        self._predictions = predictions
        self._args = ares_args
        self._tell = tell
        self.use(ares_args.rescheduling)
        self._limits = RescheduleLimits(
            threshold=ares_args.reschedule_threshold,
            min_gap_tokens=ares_args.min_gap_tokens,
            reserved_tokens=reserved_tokens,
            cooldown_s=ares_args.move_cooldown,
            interval_s=ares_args.reschedule_interval,
            tpot_slo_ms=ares_args.tpot_slo_ms,
        )
        self._costs = MoveCostFit(
            MoveCost(tokens_per_s=_FIRST_TOKENS_PER_S, budget_tokens=ares_args.move_budget)
        )
        self._relief = MemoryRelief(
            report_interval_s=ares_args.report_interval,
            floor=ares_args.memory_floor,
            reserved_tokens=reserved_tokens,
        )
        self.next_round = now + ares_args.reschedule_interval
        self._next_migration_id = 1

    def use(self, rescheduling: str) -> None:
        """Plan with this policy from now on; :class:`KeyError` if there is none of the name."""
        self._policy = RESCHEDULING.get(rescheduling)
        self.rescheduling = rescheduling

    def start(self, rid: str, source: int, target: int, cause: str) -> int:
        """Command a migration; its id."""
        migration_id = self._next_migration_id
        self._next_migration_id += 1
        self._state.note_migration_started(migration_id, MovingRequest(rid, source, target, cause))
        self._tell(source, StartMigration(migration_id=migration_id, rid=rid, target=target))
        return migration_id

    @property
    def cost(self) -> MoveCost:
        """What a migration is reckoned to take now."""
        return self._costs.cost

    def run_round_when_due(self, now: float) -> None:
        """Let the policy plan, once per interval."""
        if now >= self.next_round:
            self.next_round = now + self._args.reschedule_interval
            self.run_round()

    def run_round(self) -> None:
        """Plan and command. A policy that fails, or plans for workers that are not there, costs
        its round, not the cluster."""
        try:
            cluster = self._predictions.filled(Snapshot.of(self._state.loads(DECODE)))
            limits = msgspec.structs.replace(
                self._limits,
                max_moves=moves_per_round(len(cluster.workers), self._args.max_moves),
                cost=self.cost,
                closed=self._state.closed,
            )
            moves = self._policy(cluster, limits)
        except Exception:
            logger.exception("rescheduling policy %s failed", self.rescheduling)
            return
        serving = {w.worker_id for w in self._state.with_role(DECODE)}
        for move in moves:
            if {move.source, move.target} <= serving:
                self.start(move.rid, move.source, move.target, POLICY)
            else:
                logger.error("the policy planned an impossible move: %s", move)

    def on_report(self, report: WorkerReport) -> None:
        """A worker's new load: is its memory short, is there still something to drain?"""
        self.empty_draining_workers()
        if self._args.memory_relief:
            for move in self._relief.plan(report, self._state):
                self.start(move.rid, move.source, move.target, MEMORY)

    def on_result(self, result: MigrationResult) -> None:
        """A migration has ended."""
        self._relief.note_result(result)
        if result.outcome == COMPLETED:
            self._costs.observe_move(result.tokens_sent, result.duration_s)

    def on_landed(self, message: Landed) -> None:
        """A moved request goes on."""
        self._costs.observe_pause(message.blackout_s)

    def empty_draining_workers(self) -> None:
        """Move what is left on decode workers that are drained, or change their role, to the
        others."""
        for view in self._state.ready(DECODE):
            changing = view.changing_to is not None and self._args.role_emptying == "migrate"
            if not view.draining and not changing:
                continue
            cause = ROLE if changing else DRAIN
            moving = frozenset(m.rid for m in self._state.moving.values())
            underway = sum(m.source == view.worker_id for m in self._state.moving.values())
            most = max(0, self._args.max_migrations_per_worker - underway)
            limits = msgspec.structs.replace(self._limits, max_moves=most)
            for move in drain_moves(view.load(moving), self._state.loads(DECODE), limits):
                self.start(move.rid, move.source, move.target, cause)
