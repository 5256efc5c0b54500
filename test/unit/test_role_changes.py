"""Changes of roles in the controller: what begins, how it ends, what is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    DYING,
    READY,
    MovingRequest,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    ChangeRole,
    Message,
    PoolCounters,
    RoleChanged,
    WorkerReport,
)
from sglang_ares.srt.managers.role_changes import OPERATOR, EndedChange, RoleChanges
from sglang_ares.srt.policy.types import DECODE, PREFILL, RequestLoad, WorkerLoad

P0, P1, D2, D3 = 0, 1, 2, 3
CAPACITY = 1000


class World:
    """Two prefill and two decode workers, and what the controller does to them."""

    def __init__(self, fixed: str | None = None) -> None:
        self.state = ClusterState(
            [
                WorkerView(worker_id=i, role=role, pids=[], kv_capacity=CAPACITY)
                for i, role in enumerate([PREFILL, PREFILL, DECODE, DECODE])
            ]
        )
        self.changes = RoleChanges(self, self.state, fixed, timeout_s=30.0)
        self.told: list[tuple[int, Message]] = []
        self.emptied = 0
        self.handed_back: list[int] = []
        self.ended: list[EndedChange] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []

    def tell(self, worker_id: int, message: Message) -> None:
        self.told.append((worker_id, message))

    def empty_workers(self) -> None:
        self.emptied += 1

    def hand_back(self, worker_id: int) -> None:
        self.handed_back.append(worker_id)

    def role_changed(self, worker_id: int, role: str) -> None:
        self.state.workers[worker_id].role = role

    def role_change_ended(self, ended: EndedChange) -> None:
        self.ended.append(ended)

    def order(self, worker_id: int, role: str, now: float = 0.0) -> tuple[int, str] | None:
        return self.changes.order(
            worker_id,
            role,
            now,
            cause=OPERATOR,
            answer=lambda status, body: self.answers.append((status, body)),
        )

    def own(self, rid: str, prefill: int, decode: int) -> Ownership:
        owner = Ownership(rid, None, prefill, decode, dispatched_at=0.0)
        self.state.note_dispatch(owner, 10)
        return owner

    def report(self, worker_id: int, *rids: str, finished: tuple[str, ...] = ()) -> None:
        view = self.state.workers[worker_id]
        requests = tuple(
            RequestLoad(rid=rid, tokens=10, output_tokens=1, age_s=1, since_move_s=1, movable=True)
            for rid in rids
        )
        load = WorkerLoad(
            worker_id=worker_id,
            role=view.role,
            kv_tokens=10 * len(rids),
            kv_capacity=CAPACITY,
            running=len(rids),
            queued=0,
            queued_tokens=0,
            requests=requests,
        )
        pools = PoolCounters(
            kv_free=0, kv_cached=0, kv_locked=0, request_slots_free=0, metadata_slots_free=0,
            requests=0, idle=not rids,
        )  # fmt: skip
        self.state.note_report(
            WorkerReport(
                worker_id=worker_id,
                incarnation=0,
                load=load,
                finished=list(finished),
                pools=pools,
                migrations_in=0,
                migrations_out=0,
                retracted=0,
                decode_step_ms=0.0,
            )
        )

    def changed(self, worker_id: int, role: str, reason: str = "", now: float = 1.0) -> None:
        order = [m for w, m in self.told if w == worker_id and isinstance(m, ChangeRole)][-1]
        self.changes.on_changed(
            RoleChanged(change_id=order.change_id, worker_id=worker_id, role=role, reason=reason),
            now,
        )


@pytest.fixture
def world() -> World:
    return World()


# --- a change that succeeds -----------------------------------------------------------------


def test_an_idle_worker_is_told_at_once(world: World) -> None:
    assert world.order(D2, PREFILL) is None
    ((worker, message),) = world.told
    assert worker == D2 and isinstance(message, ChangeRole) and message.role == PREFILL
    assert [w.worker_id for w in world.state.with_role(DECODE)] == [D3], "no requests meanwhile"
    assert not world.answers
    world.changed(D2, PREFILL, now=0.5)
    assert [w.worker_id for w in world.state.with_role(PREFILL)] == [P0, P1, D2]
    ((status, body),) = world.answers
    assert status == 200 and body["outcome"] == "changed" and body["seconds"] == 0.5
    assert not world.changes.under_way and world.ended[0].old_role == DECODE


def test_a_decode_worker_is_emptied_first(world: World) -> None:
    owner = world.own("r", P0, D2)
    world.order(D2, PREFILL)
    assert not world.told and world.emptied == 1
    move = MovingRequest(owner.name, D2, D3)
    world.state.moving[1] = move
    owner.decode = D3
    world.changes.tick(1.0)
    assert not world.told, "the move has not been reported back"
    del world.state.moving[1]
    world.changes.tick(2.0)
    assert len(world.told) == 1
    world.changed(D2, PREFILL, now=2.5)
    assert world.answers[0][1]["emptying_s"] == 2.0 and world.answers[0][1]["requests"] == 1


def test_what_waits_for_its_prompt_is_handed_back_once(world: World) -> None:
    running, waiting = world.own("running", P0, D2), world.own("waiting", P0, D2)
    world.own("elsewhere", P0, D3)
    world.report(D2, running.name)
    assert world.state.without_output(D2) == [waiting]
    world.order(D2, PREFILL)
    world.changes.tick(0.9)
    assert not world.handed_back
    for now in (1.1, 1.2, 1.3):
        world.changes.tick(now)
    assert world.handed_back == [D2]


def test_a_prefill_worker_hands_back_what_it_has_not_delivered(world: World) -> None:
    delivered, queued = world.own("delivered", P0, D2), world.own("queued", P0, D3)
    world.own("elsewhere", P1, D2)
    world.report(D2, delivered.name)
    assert world.state.without_output(P0) == [queued]
    world.order(P0, DECODE)
    world.changes.tick(5.0)
    assert world.handed_back == [P0]


def test_a_move_towards_it_keeps_it(world: World) -> None:
    world.own("r", P0, D3)
    world.state.moving[1] = MovingRequest("r#00", D3, D2)
    world.order(D2, PREFILL)
    assert not world.told


def test_a_prefill_worker_finishes_what_was_sent_to_it(world: World) -> None:
    owner = world.own("r", P0, D2)
    world.order(P0, DECODE)
    assert not world.told, "it may not have arrived yet"
    world.report(P0, owner.name)
    world.changes.tick(1.0)
    assert not world.told
    world.report(P0, finished=(owner.name,))
    world.changes.tick(2.0)
    assert len(world.told) == 1 and "r" in world.state.owners


def test_a_request_that_recovers_is_nowhere(world: World) -> None:
    world.own("r", P0, D2).recovering = True
    world.order(D2, PREFILL)
    assert len(world.told) == 1


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "role", "status", "why"),
    [
        (9, DECODE, 404, "there is no worker 9"),
        (D2, DECODE, 409, "already"),
        (P0, PREFILL, 409, "already"),
    ],
)
def test_orders_that_make_no_sense(
    world: World, worker: int, role: str, status: int, why: str
) -> None:
    refusal = world.order(worker, role)
    assert refusal is not None and refusal[0] == status and why in refusal[1]


def test_fixed_roles() -> None:
    refusal = World(fixed="--ep-size > 1").order(D2, PREFILL)
    assert refusal is not None and "--ep-size" in refusal[1]


def test_a_second_order_for_the_same_worker(world: World) -> None:
    world.own("r", P0, D2)
    world.order(D2, PREFILL)
    refusal = world.order(D2, PREFILL)
    assert refusal == (409, "worker 2 is becoming a prefill worker already")


def test_the_last_worker_of_a_role(world: World) -> None:
    assert world.order(D2, PREFILL) is None
    refusal = world.order(D3, PREFILL)
    assert refusal == (409, "worker 3 is the last decode worker in use")


def test_a_drained_worker_is_not_in_use(world: World) -> None:
    world.state.workers[D3].draining = True
    refusal = world.order(D2, PREFILL)
    assert refusal is not None and "last decode worker" in refusal[1]


def test_a_lost_worker(world: World) -> None:
    view = world.state.workers[D2]
    view.state, view.reason = DYING, "died"
    assert world.order(D2, PREFILL) == (409, "worker 2 is dying: died")


def test_no_room_on_the_others(world: World) -> None:
    for worker, tokens in ((D2, 600), (D3, 500)):
        world.report(worker, "r")
        report = world.state.workers[worker].report
        assert report is not None
        load = msgspec.structs.replace(report.load, kv_tokens=tokens)
        world.state.workers[worker].report = msgspec.structs.replace(report, load=load)
    refusal = world.order(D2, PREFILL)
    assert refusal is not None and "600 tokens" in refusal[1] and "500 are free" in refusal[1]


# --- changes that fail ----------------------------------------------------------------------


def test_what_cannot_be_emptied_stays(world: World) -> None:
    world.own("r", P0, D2)
    world.order(D2, PREFILL)
    world.changes.tick(31.0)
    ((status, body),) = world.answers
    assert status == 409 and "1 requests are still on it" in body["reason"]
    assert [w.worker_id for w in world.state.with_role(DECODE)] == [D2, D3], "it serves on"


def test_the_worker_says_no(world: World) -> None:
    world.order(D2, PREFILL)
    world.changed(D2, DECODE, "the worker was busy for 10 s")
    assert world.answers[0][1]["reason"] == "the worker was busy for 10 s"
    assert world.state.workers[D2].role == DECODE
    assert world.order(D2, PREFILL) is None, "it may be tried again"


@pytest.mark.parametrize("busy", [True, False])
def test_the_worker_dies(world: World, busy: bool) -> None:
    if busy:
        world.own("r", P0, D2)
    world.order(D2, PREFILL)
    world.changes.on_worker_lost(D2, "died (exit code -9)", 1.0)
    ((status, body),) = world.answers
    was = "emptying" if busy else "switching"
    assert status == 409 and body["reason"] == (
        f"worker 2 was lost while {was}: it died (exit code -9)"
    )
    assert world.state.workers[D2].role == DECODE and not world.changes.under_way
    world.changes.on_worker_lost(D3, "died", 1.0)


def test_an_answer_that_comes_after_all_is_of_no_interest(world: World) -> None:
    world.order(D2, PREFILL)
    world.changes.on_worker_lost(D2, "died", 1.0)
    world.changed(D2, PREFILL)
    assert len(world.answers) == 1 and world.state.workers[D2].role == DECODE


def test_it_becomes_the_last_of_its_role_meanwhile(world: World) -> None:
    world.own("r", P0, D2)
    world.order(D2, PREFILL)
    world.state.workers[D3].state = DYING
    world.changes.tick(1.0)
    assert "last decode worker" in world.answers[0][1]["reason"]
    assert [w.worker_id for w in world.state.with_role(DECODE)] == [D2]


# --- documents ------------------------------------------------------------------------------


def test_status(world: World) -> None:
    world.own("r", P0, D2)
    world.order(D2, PREFILL)
    document = world.changes.status(2.0)
    (under_way,) = document["changing"]
    assert under_way["worker"] == D2 and under_way["state"] == "emptying"
    assert under_way["requests"] == 1 and under_way["seconds"] == 2.0
    world.changes.tick(31.0)
    document = world.changes.status(33.0)
    assert not document["changing"] and document["last"][0]["ago_s"] == 2.0
    assert document["last"][0]["outcome"] == "failed"
    assert world.state.workers[D2].state == READY
