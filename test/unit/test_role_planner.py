"""The planner's loop: what the policies are given, and what becomes of their decisions."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import Ownership, WorkerView
from sglang_ares.srt.managers.instances import Instances
from sglang_ares.srt.managers.io_struct import PoolCounters, WorkerReport
from sglang_ares.srt.managers.role_changes import PLANNER, RoleChanges
from sglang_ares.srt.managers.role_planner import RoleLoads, RolePlanner
from sglang_ares.srt.policy.elastic.decisions import ROLES, Flip, FlipMemory, Moment
from sglang_ares.srt.policy.elastic.instances import Slo
from sglang_ares.srt.policy.types import (
    DECODE,
    PREFILL,
    MoveCost,
    RequestLoad,
    StepTime,
    WorkerLoad,
)

P0, P1, D2, D3 = 0, 1, 2, 3
CAPACITY = 10_000
SLO = Slo(ttft_ms=1000.0, tpot_ms=50.0)
LAW = StepTime(fixed_ms=10.0, per_request_ms=0.0, per_token_ms=0.01)
POOLS = PoolCounters(
    kv_free=0, kv_cached=0, kv_locked=0, request_slots_free=0, metadata_slots_free=0, requests=0,
    idle=True,
)  # fmt: skip


def new_state() -> ClusterState:
    return ClusterState(
        [
            WorkerView(worker_id=i, role=role, pids=[], kv_capacity=CAPACITY)
            for i, role in enumerate([PREFILL, PREFILL, DECODE, DECODE])
        ]
    )


def report(
    state: ClusterState,
    worker_id: int,
    tokens: tuple[int, ...] = (),
    *,
    step_ms: float = 0.0,
    output_tokens: int = 0,
    prefill_law: tuple[float, float, float] | None = None,
    step: StepTime | None = None,
) -> WorkerReport:
    """A worker with running requests of so many tokens."""
    requests = tuple(
        RequestLoad(
            rid=f"{worker_id}-{i}#00",
            tokens=n,
            output_tokens=output_tokens,
            age_s=1.0,
            since_move_s=1.0,
            movable=True,
        )
        for i, n in enumerate(tokens)
    )
    load = WorkerLoad(
        worker_id=worker_id,
        role=state.workers[worker_id].role,
        kv_tokens=sum(tokens),
        kv_capacity=CAPACITY,
        running=len(tokens),
        queued=0,
        queued_tokens=0,
        step=step,
        requests=requests,
    )
    message = WorkerReport(
        worker_id=worker_id,
        incarnation=0,
        load=load,
        finished=[],
        pools=POOLS,
        migrations_in=0,
        migrations_out=0,
        retracted=0,
        decode_step_ms=step_ms,
        prefill_law=prefill_law,
    )
    state.note_report(message)
    return message


# --- what the policies are given ------------------------------------------------------------


def test_the_table() -> None:
    state = new_state()
    instances = Instances(state, SLO)
    instances.on_report(report(state, P0, (100, 200), prefill_law=(5.0, 0.1, 0.0)), 0.0)
    instances.on_report(report(state, D2, (1000,), step_ms=20.0, output_tokens=3, step=LAW), 0.0)
    instances.on_report(report(state, D2, (1000,), step_ms=40.0, output_tokens=4, step=LAW), 0.5)
    owner = Ownership("new", None, P1, D3, dispatched_at=0.0)
    state.note_dispatch(owner, 70)
    table = instances.table(1.0)
    assert table.worker_id.tolist() == [P0, P1, D2, D3]
    assert table.decodes.tolist() == [False, False, True, True]
    assert table.prefill_tokens.tolist() == [300, 70, 0, 0]
    assert table.prefill_ms.tolist() == [pytest.approx(40.0), pytest.approx(12.0), 0, 0]
    assert table.decode_tokens.tolist() == [0, 0, 1000, 70]
    assert table.token_ms.tolist() == [0, 0, 30.0, 0], "the mean of the interval"
    assert table.max_tokens.tolist() == [4000] * 4, "one law for workers that have none"


def test_prompts_that_are_computed_are_no_work() -> None:
    state = new_state()
    instances = Instances(state, SLO)
    law = (5.0, 0.1, 0.0)
    instances.on_report(report(state, P0, (100,), output_tokens=1, prefill_law=law), 0.0)
    assert instances.table(0.0).prefill_ms.tolist() == [0.0] * 4


def test_a_stalled_worker_does_not_read_as_idle() -> None:
    state = new_state()
    instances = Instances(state, SLO)
    instances.on_report(report(state, D2, (1000,), step_ms=20.0, output_tokens=3), 0.0)
    assert instances.table(1.0).token_ms[2] == 20.0
    instances.on_report(report(state, D2, (1000,), output_tokens=3), 1.5)
    assert instances.table(3.0).token_ms[2] == 3000.0
    instances.on_report(report(state, D2), 4.0)
    assert instances.table(9.0).token_ms[2] == 0.0


def test_a_worker_that_changes_counts_to_its_new_role() -> None:
    state = new_state()
    state.workers[D2].changing_to = PREFILL
    report(state, D2, (500,), output_tokens=2)
    table = Instances(state, SLO).table(0.0)
    assert table.decodes.tolist() == [False, False, False, True]
    assert table.unfinished.tolist() == [False, False, True, False]


# --- what becomes of decisions --------------------------------------------------------------


class World:
    """A planner over tables, with a policy of the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flip: Flip | None) -> None:
        self.state = new_state()
        host: Any = self
        self.changes = RoleChanges(host, self.state, None, timeout_s=30.0)
        self.moments: list[Moment] = []
        self.flip = flip

        def plan(moment: Moment) -> tuple[Flip | None, FlipMemory]:
            self.moments.append(moment)
            return self.flip, FlipMemory(held_passes=len(self.moments), last_flip_s=moment.now)

        monkeypatch.setattr(ROLES, "get", lambda name: plan)
        self.planner = RolePlanner(self.state, self.changes, "ares", SLO, MoveCost, now=0.0)
        first = report(self.state, P0, (100,), prefill_law=(5.0, 0.1, 0.0))
        self.planner.on_report(first, 0.0)

    def tell(self, worker_id: int, message: Any) -> None: ...

    def empty_workers(self) -> None: ...

    def role_changed(self, worker_id: int, role: str) -> None: ...

    def role_change_ended(self, ended: Any) -> None: ...


def test_a_decision_is_ordered_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, Flip(1, True, "decode load 2.00 is at or above 1"))
    world.planner.run_pass_when_due(0.5)
    assert not world.moments, "once a second"
    world.planner.run_pass_when_due(1.0)
    (change,) = world.changes.status(1.0)["changing"]
    assert change["worker"] == P1 and change["role"] == DECODE and change["cause"] == PLANNER
    assert change["why"] == "decode load 2.00 is at or above 1"
    world.planner.run_pass_when_due(2.0)
    assert len(world.moments) == 1, "one change at a time"


def test_a_refused_decision_is_not_remembered_as_a_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, Flip(2, False, "why"))
    world.state.workers[D3].draining = True
    world.planner.run_pass_when_due(1.0)
    world.planner.run_pass_when_due(2.0)
    assert world.moments[1].memory == FlipMemory()


def test_memory_is_kept_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, None)
    for now in (1.0, 2.0):
        world.planner.run_pass_when_due(now)
    assert world.moments[1].memory == FlipMemory(held_passes=1, last_flip_s=1.0)


def test_rules_reserve_what_workers_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, None)
    world.planner = RolePlanner(
        world.state, world.changes, "ares", SLO, MoveCost, 0.0, reserved_tokens=64
    )
    world.planner.on_report(report(world.state, P0, (100,), prefill_law=(5.0, 0.1, 0.0)), 0.0)
    world.planner.run_pass_when_due(1.0)
    assert world.moments[-1].rules.reserved_tokens == 64


def test_arrivals_are_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, None)
    for now in range(1, 40):
        for _ in range(4):
            world.planner.on_arrival(100)
        world.planner.run_pass_when_due(float(now))
    demand = world.moments[-1].demand
    assert demand.requests_per_s == pytest.approx(4, rel=0.01)
    assert demand.prefill_ms_per_s == pytest.approx(60, rel=0.01)
    assert demand.prompt_tokens == pytest.approx(100)


def test_nothing_is_planned_before_prefill_times_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, None)
    world.planner = RolePlanner(world.state, world.changes, "ares", SLO, MoveCost, now=0.0)
    world.planner.run_pass_when_due(1.0)
    assert not world.moments


def test_it_plans_at_once_with_times_of_an_earlier_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, None)
    shown: list[RoleLoads] = []
    known = PrefillTime(fixed_ms=5.0, per_token_ms=0.1, per_square_ms=0.0)
    world.planner = RolePlanner(
        world.state, world.changes, "ares", SLO, MoveCost, 0.0, 1.0, known, shown.append
    )
    world.planner.on_report(report(world.state, D3, (100,), step_ms=75.0, output_tokens=3), 0.5)
    world.planner.run_pass_when_due(1.0)
    assert len(world.moments) == 1
    (loads,) = shown
    assert loads.of_role == {PREFILL: pytest.approx(0.0075), DECODE: 0.75}
    assert loads.of_worker == {
        P0: (PREFILL, pytest.approx(0.015)), P1: (PREFILL, 0.0), D2: (DECODE, 0.0),
        D3: (DECODE, 1.5),
    }  # fmt: skip


def test_without_promises_there_are_no_ratios() -> None:
    state, host = new_state(), None
    changes = RoleChanges(host, state, None, timeout_s=30.0)  # type: ignore[arg-type]
    shown: list[RoleLoads] = []
    none = Slo(ttft_ms=0.0, tpot_ms=0.0)
    planner = RolePlanner(state, changes, "static", none, MoveCost, 0.0, show=shown.append)
    planner.run_pass_when_due(1.0)
    assert shown[0].of_role == {} and shown[0].of_worker[P0] == (PREFILL, None)
    assert planner.status()["workers"][0] == {"id": P0, "load": None, "max_tokens": None}


def test_a_policy_that_fails_costs_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, None)

    def fail(moment: Moment) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(ROLES, "get", lambda name: fail)
    world.planner.run_pass_when_due(1.0)
    assert not world.changes.under_way


def test_status(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, None)
    assert world.planner.status()["prefill_load"] is None
    world.planner.run_pass_when_due(1.0)
    world.state.workers[D2].changing_to = PREFILL
    document = world.planner.status()
    assert document["workers"] == [
        {"id": P0, "load": pytest.approx(0.015), "max_tokens": CAPACITY},
        {"id": P1, "load": 0.0, "max_tokens": CAPACITY},
        {"id": D2, "load": 0.0, "max_tokens": CAPACITY},
        {"id": D3, "load": 0.0, "max_tokens": CAPACITY},
    ]
    assert document["prefill_load"] == pytest.approx(0.0075)
    assert document["decode_load"] == 0.0
    assert document["pools"] == {
        PREFILL: [P0, P1], DECODE: [D3], "decode to prefill": [D2]
    }  # fmt: skip
