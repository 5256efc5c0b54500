"""The controller's tables: who owns what, what is moving, what is reported."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares.srt.managers.attempts import internal_rid
from sglang_ares.srt.managers.cluster_documents import requests_document, status_document
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    DYING,
    FAILED_FOR_GOOD,
    READY,
    RESTARTING,
    MovingRequest,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    Adopted,
    FirstEstimates,
    MigrationResult,
    PoolCounters,
    WorkerReport,
)
from sglang_ares.srt.policy.types import DECODE, PREFILL, RequestLoad, WorkerLoad

P0, D1, D2 = 0, 1, 2
POLICIES = {"placement": "least_tokens", "rescheduling": "reactive"}


@pytest.fixture
def state() -> ClusterState:
    return new_state()


def new_state() -> ClusterState:
    return ClusterState(
        [
            WorkerView(P0, PREFILL, pids=[100], kv_capacity=1000),
            WorkerView(D1, DECODE, pids=[101, 111], kv_capacity=1000),
            WorkerView(D2, DECODE, pids=[102], kv_capacity=2000),
        ]
    )


def first_attempt(rid: str) -> str:
    """What the workers call a request that was dispatched once."""
    return internal_rid(rid, 0)


def dispatch(state: ClusterState, rid: str, prefill: int, decode: int, tokens: int) -> Ownership:
    owner = Ownership(rid, None, prefill, decode, dispatched_at=time.monotonic())
    state.note_dispatch(owner, tokens)
    return owner


def report(
    worker_id: int,
    requests: dict[str, int] | None = None,
    *,
    finished: list[str] | None = None,
    queued: int = 0,
    queued_tokens: int = 0,
    output_tokens: int = 1,
) -> WorkerReport:
    requests = requests or {}
    return WorkerReport(
        worker_id=worker_id,
        incarnation=0,
        load=WorkerLoad(
            worker_id=worker_id,
            role=PREFILL if worker_id == P0 else DECODE,
            kv_tokens=sum(requests.values()),
            kv_capacity=1000,
            running=len(requests),
            queued=queued,
            queued_tokens=queued_tokens,
            requests=tuple(
                RequestLoad(
                    rid=first_attempt(rid),
                    tokens=tokens,
                    output_tokens=output_tokens,
                    age_s=1.0,
                    since_move_s=1.0,
                    movable=True,
                )
                for rid, tokens in requests.items()
            ),
        ),
        finished=[first_attempt(rid) for rid in finished or []],
        pools=PoolCounters(
            kv_free=1,
            kv_cached=2,
            kv_locked=0,
            request_slots_free=3,
            metadata_slots_free=4,
            requests=5,
            idle=False,
        ),
        migrations_in=0,
        migrations_out=0,
        retracted=0,
        decode_step_ms=1.5,
    )


def start(state: ClusterState, migration_id: int, rid: str, source: int, target: int) -> None:
    state.note_migration_started(migration_id, MovingRequest(first_attempt(rid), source, target))


def result(
    migration_id: int,
    rid: str = "r",
    source: int = D1,
    target: int = D2,
    outcome: str = "completed",
    reason: str = "",
) -> MigrationResult:
    return MigrationResult(
        migration_id=migration_id,
        rid=first_attempt(rid),
        source=source,
        target=target,
        outcome=outcome,
        reason=reason,
        tokens=10,
        tokens_sent=7,
        tokens_saved=3 if outcome == "completed" else 0,
        kv_bytes=100,
        duration_s=0.5,
    )


def empty(state: ClusterState) -> bool:
    return not (state.owners or state.moving or any(w.dispatched for w in state.workers.values()))


# --- dispatch and reports -------------------------------------------------------------------


def test_workers_without_a_report_are_empty(state: ClusterState) -> None:
    (prefill,) = state.loads(PREFILL)
    assert (prefill.worker_id, prefill.load_tokens, prefill.kv_capacity) == (P0, 0, 1000)
    assert [w.worker_id for w in state.loads(DECODE)] == [D1, D2]


def test_a_dispatched_request_counts_until_a_report_shows_it(state: ClusterState) -> None:
    dispatch(state, "r", P0, D1, 300)
    for role in (PREFILL, DECODE):
        first = state.loads(role)[0]
        assert (first.queued, first.queued_tokens, first.load_tokens) == (1, 300, 300)
    state.note_report(report(D1))  # made before it arrived
    assert state.loads(DECODE)[0].load_tokens == 300
    state.note_report(report(D1, {"r": 310}))
    assert state.loads(DECODE)[0].load_tokens == 310
    assert state.loads(DECODE)[0].queued == 0


def test_finished_on_both_workers_leaves_nothing(state: ClusterState) -> None:
    dispatch(state, "r", P0, D1, 300)
    state.note_report(report(P0, {"r": 300}))
    state.note_report(report(P0, finished=["r"]))
    assert "r" in state.owners, "prefill is through, the request is not"
    state.note_report(report(D1, {"r": 310}))
    state.note_report(report(D1, finished=["r"]))
    assert empty(state)


def test_finished_between_two_reports_leaves_nothing(state: ClusterState) -> None:
    dispatch(state, "r", P0, D1, 300)
    state.note_report(report(D1, finished=["r"]))
    state.note_report(report(P0, finished=["r"]))
    assert empty(state)


def test_a_worker_that_is_not_ready_takes_nothing(state: ClusterState) -> None:
    state.workers[D1].state = "draining"
    assert [w.worker_id for w in state.loads(DECODE)] == [D2]


def test_reports_of_strangers_are_ignored(state: ClusterState) -> None:
    state.note_report(report(17, {"x": 5}, finished=["y"]))
    assert empty(state) and 17 not in state.workers


def test_finished_elsewhere_does_not_end_the_request(state: ClusterState) -> None:
    """A worker that never owned it (an abort went to all) says that it has left."""
    dispatch(state, "r", P0, D1, 300)
    state.note_report(report(D2, finished=["r"]))
    assert state.owners["r"].decode == D1


def test_a_late_report_of_the_end_is_not_taken_for_that_of_the_next_of_its_rid(
    state: ClusterState,
) -> None:
    dispatch(state, "r", P0, D1, 300)
    again = state.new_owner("r", None)
    again.prefill, again.decode = P0, D1
    state.note_dispatch(again, 20)
    state.note_report(report(D1, finished=["r"]))
    assert state.owners == {"r": again}
    assert [w.dispatched for w in state.workers.values()] == [{"r#01": 20}, {"r#01": 20}, {}]


def test_what_ended_elsewhere_is_not_taken_back_once_its_rid_was_used_again(
    state: ClusterState,
) -> None:
    """Its client had its end, or could not have used the rid."""
    state.workers[D1].host = "elsewhere"
    dispatch(state, "used again", P0, D1, 300)
    dispatch(state, "r", P0, D1, 300)
    state.note_report(report(D1, finished=["used again", "r"]))
    state.new_owner("used again", None)
    state.take_back_ended(D1)
    assert list(state.owners) == ["r"]


# --- migrations -----------------------------------------------------------------------------


def test_a_completed_migration_changes_the_owner(state: ClusterState) -> None:
    dispatch(state, "r", P0, D1, 10)
    start(state, 1, "r", D1, D2)
    assert state.note_migration_result(result(1))
    assert state.owners["r"].decode == D2
    assert state.migrations.completed == 1 and not state.moving
    state.note_report(report(D1))
    state.note_report(report(P0, finished=["r"]))
    state.note_report(report(D2, {"r": 20}))
    state.note_report(report(D1, {}))
    assert "r" in state.owners
    state.note_report(report(D2, finished=["r"]))
    assert not state.owners and not state.moving


def test_a_request_that_moved_before_its_first_report_leaves_nothing(state: ClusterState) -> None:
    """Dispatched, moved away before the source's next report, finished on the target: the
    source never lists it, neither as running nor as finished."""
    dispatch(state, "r", P0, D1, 10)
    start(state, 1, "r", D1, D2)
    state.note_report(report(P0, finished=["r"]))
    state.note_migration_result(result(1))
    state.note_report(report(D1))
    state.note_report(report(D2, {"r": 20}))
    state.note_report(report(D2, finished=["r"]))
    assert empty(state), {w.worker_id: w.dispatched for w in state.workers.values()}


@pytest.mark.parametrize("outcome", ["refused", "failed", "cancelled"])
def test_a_migration_that_did_not_happen_changes_no_owner(
    state: ClusterState, outcome: str
) -> None:
    dispatch(state, "r", P0, D1, 10)
    start(state, 1, "r", D1, D2)
    assert state.note_migration_result(result(1, outcome=outcome, reason="why: because"))
    assert state.owners["r"].decode == D1
    migrations = status_document(state, POLICIES)["migrations"]
    assert (migrations["attempted"], migrations["completed"], migrations["in_flight"]) == (1, 0, 0)
    assert migrations[outcome] == {"why": 1}


def test_an_unknown_result_is_not_counted(state: ClusterState) -> None:
    assert not state.note_migration_result(result(99))
    assert state.migrations.completed == 0


def test_a_result_is_counted_once(state: ClusterState) -> None:
    start(state, 1, "r", D1, D2)
    assert state.note_migration_result(result(1))
    assert not state.note_migration_result(result(1))
    assert state.migrations.completed == 1


def test_the_target_reports_the_end_before_the_source_reports_the_move(
    state: ClusterState,
) -> None:
    """Two sockets, no order between them."""
    dispatch(state, "r", P0, D1, 10)
    state.note_report(report(D1, {"r": 10}))
    start(state, 1, "r", D1, D2)
    state.note_report(report(P0, finished=["r"]))
    state.note_report(report(D2, finished=["r"]))
    assert state.note_migration_result(result(1))
    assert "r" not in state.owners
    state.note_report(report(D1))
    assert empty(state)


def test_the_source_reports_the_end_of_a_request_that_did_not_get_away(
    state: ClusterState,
) -> None:
    dispatch(state, "r", P0, D1, 10)
    start(state, 1, "r", D1, D2)
    state.note_report(report(P0, finished=["r"]))
    state.note_report(report(D1, finished=["r"]))
    state.note_migration_result(result(1, outcome="cancelled", reason="finished"))
    assert empty(state)


def test_a_cancelled_arrival_is_not_taken_for_the_end(state: ClusterState) -> None:
    """The target built the request, then the migration failed: the target lists it as gone,
    maybe before the source reports the failure. The request lives on at the source."""
    dispatch(state, "r", P0, D1, 10)
    state.note_report(report(D1, {"r": 12}))
    start(state, 1, "r", D1, D2)
    state.note_report(report(D2, finished=["r"]))
    state.note_migration_result(result(1, outcome="failed", reason="timeout in COPYING"))
    state.note_report(report(D1, {"r": 15}))
    assert "r" in state.owners, "a live request must not vanish from /ares/requests"
    assert requests_document(state)[0]["worker"] == D1


def test_a_moving_request_is_not_movable(state: ClusterState) -> None:
    state.note_report(report(D1, {"r": 10, "other": 5}))
    start(state, 1, "r", D1, D2)
    requests = state.loads(DECODE)[0].requests
    assert {r.rid: r.movable for r in requests} == {"r#00": False, "other#00": True}
    state.note_migration_result(result(1, outcome="refused", reason="x"))
    assert all(r.movable for r in state.loads(DECODE)[0].requests)


# --- any order ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_no_entry_is_left_behind(data: Any) -> None:
    """Requests come, move and end; each worker's messages arrive in order, those of different
    workers in any."""
    state = new_state()
    count = data.draw(st.integers(1, 4))
    queues: dict[int, list[Any]] = {P0: [], D1: [], D2: []}
    migration_id = 0
    for i in range(count):
        rid = f"r{i}"
        home = data.draw(st.sampled_from([D1, D2]))
        dispatch(state, rid, P0, home, 10)
        queues[P0].append(report(P0, finished=[rid]))
        if data.draw(st.booleans()):
            queues[home].append(report(home, {rid: 11}))
        if data.draw(st.booleans()):
            target = D1 if home == D2 else D2
            migration_id += 1
            start(state, migration_id, rid, home, target)
            outcome = data.draw(st.sampled_from(["completed", "refused", "failed"]))
            queues[home].append(result(migration_id, rid, home, target, outcome, "x"))
            if outcome == "completed":
                if data.draw(st.booleans()):
                    queues[target].append(report(target, {rid: 15}))
                home = target
        queues[home].append(report(home, finished=[rid]))
    for worker in (D1, D2):
        queues[worker].append(report(worker))
    while any(queues.values()):
        worker = data.draw(st.sampled_from([w for w, q in queues.items() if q]))
        message = queues[worker].pop(0)
        if isinstance(message, WorkerReport):
            state.note_report(message)
        else:
            assert state.note_migration_result(message)
    assert empty(state), (state.owners, {w.worker_id: w.dispatched for w in state.workers.values()})


# --- attempts and deaths --------------------------------------------------------------------


def adopted(migration_id: int, rid: str, worker_id: int) -> Adopted:
    return Adopted(migration_id=migration_id, rid=first_attempt(rid), worker_id=worker_id)


def test_only_the_current_attempt_has_an_owner(state: ClusterState) -> None:
    owner = dispatch(state, "r", P0, D1, 10)
    assert state.owner_of("r#00") is owner
    owner.attempt = 2
    assert owner.name == "r#02" and state.owner_of("r#02") is owner
    for name in ("r", "r#00", "r#01", "r#03", "s#02"):
        assert state.owner_of(name) is None


def test_what_a_void_attempt_reports_changes_nothing(state: ClusterState) -> None:
    """The old worker wakes up and says that it has finished; the new attempt still runs."""
    owner = dispatch(state, "r", P0, D1, 10)
    owner.attempt, owner.decode = 1, D2
    state.note_dispatch(owner, 14)
    state.note_report(report(D1, finished=["r"]))
    state.note_adopted(adopted(1, "r", D1))
    assert state.owners["r"].decode == D2


def test_a_request_that_is_being_recovered_is_nowhere(state: ClusterState) -> None:
    """Whatever is still said of it, the token ledger decides how it goes on."""
    owner = dispatch(state, "r", P0, D1, 10)
    start(state, 1, "r", D1, D2)
    owner.recovering = True
    state.note_report(report(D1, finished=["r"]))
    state.note_adopted(adopted(1, "r", D2))
    state.note_migration_result(result(1))
    assert state.owners["r"] is owner and owner.decode == D1


def test_the_target_itself_says_that_it_owns_the_request(state: ClusterState) -> None:
    """Its source dies before it has reported the move."""
    dispatch(state, "r", P0, D1, 10)
    start(state, 1, "r", D1, D2)
    state.note_adopted(adopted(1, "r", D2))
    assert state.owners["r"].decode == D2
    state.note_lost(D1)
    assert not state.moving and state.migrations.failed == {"source died": 1}
    state.note_report(report(P0, finished=["r"]))
    state.note_report(report(D2, {"r": 12}))
    state.note_report(report(D2, finished=["r"]))
    assert empty(state)


def test_a_dead_worker_has_no_load_and_no_moves(state: ClusterState) -> None:
    dispatch(state, "waiting", P0, D1, 30)
    state.note_report(report(D1, {"r": 100}))
    start(state, 1, "r", D1, D2)
    start(state, 2, "s", D2, D1)
    state.note_lost(D1)
    assert list(state.moving) == [2], "the source of a move towards it reports by itself"
    assert state.workers[D1].report is None and not state.workers[D1].dispatched
    assert state.workers[P0].dispatched, "what was sent to others still counts there"


@pytest.mark.parametrize("lost", [DYING, RESTARTING, FAILED_FOR_GOOD])
def test_a_lost_worker_takes_nothing_and_its_reports_do_not_count(
    state: ClusterState, lost: str
) -> None:
    dispatch(state, "r", P0, D1, 30)
    state.workers[D1].state = lost
    assert not state.note_report(report(D1, {"x": 5}, finished=["r"]))
    assert state.workers[D1].report is None and "r" in state.owners
    assert [w.worker_id for w in state.loads(DECODE)] == [D2]


def test_a_report_of_an_earlier_incarnation_does_not_count(state: ClusterState) -> None:
    state.workers[D1].incarnation = 1
    assert state.workers[D1].state == READY
    assert not state.note_report(report(D1, {"x": 5}))
    assert state.workers[D1].report is None


def test_documents_tell_of_a_lost_worker_and_of_attempts(state: ClusterState) -> None:
    owner = dispatch(state, "r", P0, D2, 30)
    owner.attempt = 3
    view = state.workers[D1]
    view.state, view.reason, view.incarnation = RESTARTING, "died (exit code -9)", 2
    document = status_document(state, POLICIES)["workers"][1]
    assert (document["state"], document["restarts"]) == ("restarting", 2)
    assert document["reason"] == "died (exit code -9)"
    assert "reason" not in status_document(state, POLICIES)["workers"][2]
    (entry,) = requests_document(state)
    assert (entry["rid"], entry["attempt"], entry["worker"]) == ("r", 3, D2)


# --- documents ------------------------------------------------------------------------------


def test_status_document(state: ClusterState) -> None:
    dispatch(state, "waiting", P0, D1, 30)
    state.note_report(report(D1, {"r": 100}, queued=2, queued_tokens=50))
    start(state, 1, "r", D1, D2)
    start(state, 2, "s", D1, D2)
    start(state, 3, "t", D1, D2)
    start(state, 4, "u", D1, D2)
    state.note_migration_result(result(2))
    state.note_migration_result(result(3, outcome="refused", reason="no KV memory: full"))
    state.note_migration_result(result(4, outcome="failed", reason="timeout in COPYING"))
    document = json.loads(json.dumps(status_document(state, POLICIES)))
    assert document["placement"] == "least_tokens" and document["rescheduling"] == "reactive"
    assert document["uptime_s"] >= 0
    assert document["requests"] == 1
    assert document["migrations"] == {
        "attempted": 4,
        "completed": 1,
        "refused": {"no KV memory": 1},
        "failed": {"timeout in COPYING": 1},
        "cancelled": {},
        "in_flight": 1,
        "tokens_sent": 21,
        "tokens_saved": 3,
        "causes": {"manual": 0, "policy": 4, "memory": 0, "drain": 0, "role": 0},
    }
    assert [w["id"] for w in document["workers"]] == [P0, D1, D2]
    required = {"id", "role", "state", "restarts", "pids", "running", "queued",
                "queued_tokens", "kv_tokens", "kv_capacity"}  # fmt: skip
    for worker in document["workers"]:
        assert required <= set(worker)
    reported = document["workers"][1]
    assert reported["pids"] == [101, 111]
    assert (reported["role"], reported["state"]) == ("decode", "ready")
    assert (reported["running"], reported["kv_tokens"]) == (1, 100)
    assert (reported["queued"], reported["queued_tokens"]) == (3, 80)
    assert reported["pools"]["metadata_slots_free"] == 4
    assert reported["decode_step_ms"] == 1.5 and reported["report_age_s"] >= 0


def test_requests_document(state: ClusterState) -> None:
    dispatch(state, "r", P0, D1, 30)
    dispatch(state, "new", P0, D2, 40)
    state.note_report(report(D1, {"r": 33}))
    first, second = json.loads(json.dumps(requests_document(state)))
    assert set(first) == {
        *("rid", "worker", "tokens", "output_tokens", "predicted_remaining", "age_s", "attempt")
    }
    assert (first["rid"], first["worker"], first["tokens"]) == ("r", D1, 33)
    assert (second["rid"], second["worker"]) == ("new", D2)
    assert first["age_s"] >= second["age_s"] >= 0


def test_a_request_on_two_reports_is_listed_once(state: ClusterState) -> None:
    """At a hand-over both workers may have listed it."""
    dispatch(state, "r", P0, D1, 30)
    start(state, 1, "r", D1, D2)
    state.note_report(report(D1, {"r": 40}))
    state.note_report(report(D2, {"r": 41}))
    (entry,) = requests_document(state)
    assert entry["worker"] == D1 and entry["tokens"] in (40, 41)


def test_what_moves_counts_where_it_goes(state: ClusterState) -> None:
    """Otherwise the next round would close the same gap once more."""
    request = RequestLoad(
        rid="r#00", tokens=300, output_tokens=1, age_s=1, since_move_s=1, movable=True
    )
    for worker_id, held in ((D1, 400), (D2, 0)):
        load = WorkerLoad(
            worker_id=worker_id,
            role="decode",
            kv_tokens=held,
            kv_capacity=1000,
            running=1,
            queued=0,
            queued_tokens=0,
            requests=(request,) if worker_id == D1 else (),
        )
        view = state.workers[worker_id]
        view.load = lambda moving=frozenset(), load=load: load  # type: ignore[method-assign]
    start(state, 1, "r", D1, D2)
    assert {w.worker_id: w.load_tokens for w in state.loads("decode")} == {D1: 100, D2: 300}


@pytest.mark.parametrize(
    ("output_tokens", "left"),
    [(1, (10, 20, 30, 40)), (16, (0, 5, 15, 25)), (41, None), (5000, None)],
)
def test_prefills_estimate_shrinks_with_the_output_until_it_is_used_up(
    state: ClusterState, output_tokens: int, left: Any
) -> None:
    """The decode worker has no head and reports no prediction."""
    dispatch(state, "r", P0, D1, 10)
    estimates = {first_attempt("r"): (10.0, 20.0, 30.0, 40.0)}
    state.note_first_estimates(FirstEstimates(worker_id=P0, remaining=estimates))
    state.note_report(report(D1, {"r": 10}, output_tokens=output_tokens))
    ((request,),) = (w.requests for w in state.loads(DECODE) if w.worker_id == D1)
    (document,) = requests_document(state)
    assert request.remaining == document["predicted_remaining"] == left
