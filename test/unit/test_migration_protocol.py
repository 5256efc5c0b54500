"""Live migration's state machines: every path once, and random schedules of everything at once.

Invariants of the design's section 4: one owner, nothing lost or repeated, memory reserved before
a byte moves and freed at the end, no state without an end.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_ares.srt.disaggregation.hosts import MigrationHost, SourceHost, TargetHost
from sglang_ares.srt.disaggregation.kv_link import (
    THROUGH,
    UNDER_WAY,
    UNTOUCHED,
    Arrival,
    ChunkCounter,
    CopyProgress,
    KvLink,
    drained,
)
from sglang_ares.srt.disaggregation.migration import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINAL_STATES,
    REFUSED,
    SOURCE_TRANSITIONS,
    TARGET_TRANSITIONS,
    Migration,
    MigrationLimits,
    ProtocolError,
    SourceState,
    TargetState,
)
from sglang_ares.srt.disaggregation.request_state import capture
from sglang_ares.srt.managers.io_struct import (
    Accept,
    Cancel,
    Cancelled,
    ChunkSent,
    Commit,
    Committed,
    Decoder,
    ForwardAbort,
    Message,
    Offer,
    Refuse,
    StartMigration,
    TransferFailed,
    WorkerInbound,
)
from sglang_ares.srt.managers.migration_host import SchedulerMigrationHost
from unit.migration_world import (
    DEFAULT_LIMITS,
    Link,
    Receiver,
    Sender,
    Transfer,
    Worker,
    World,
)

# --- helpers --------------------------------------------------------------------------------


def limits(**changes: Any) -> MigrationLimits:
    """The world's limits, changed."""
    return replace(DEFAULT_LIMITS, **changes)


def source_of(world: World, migration_id: int, worker: int = 0) -> Any:
    return world.workers[worker].manager.outbound[migration_id]


def target_of(world: World, migration_id: int, worker: int = 1) -> Any:
    return world.workers[worker].manager.inbound[migration_id]


def transfer_of(world: World, migration_id: int) -> Transfer:
    return world.transfers[source_of(world, migration_id).record.room]


def cancel(world: World) -> None:
    """Two steps of worker 0: it gives a migration up, then sees that the copy has drained."""
    world.workers[0].iterate()
    world.workers[0].iterate()


def drive_source_to(world: World, migration_id: int, state: SourceState) -> None:
    """Single steps of everything until the source is in ``state``."""
    for _ in range(200):
        source = source_of(world, migration_id)
        if source.record.state is state:
            return
        for link in world.links():
            world.deliver(*link)
        transfer_of(world, migration_id).advance()
        world.workers[0].iterate()
        if source.record.state is state:
            return
        world.workers[1].iterate()
        world.check()
    raise AssertionError(f"never in {state}: {source.record}")


def messages(world: World, source: int, target: int) -> list[Any]:
    decoder = Decoder(WorkerInbound)
    return [decoder.decode(frame) for frame in world.network[source, target]]


def finish(world: World) -> None:
    """Until quiet, then until every request has ended; all invariants on the way."""
    world.settle()
    world.check()
    world.check_quiet()
    world.run_out()
    world.settle()
    world.check_quiet()


@pytest.fixture(params=[False, True], ids=["serial", "overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return request.param


# --- the world is like the real one ---------------------------------------------------------


def public(cls: type) -> dict[str, list[str]]:
    """Methods and their parameters."""
    return {
        name: list(inspect.signature(member).parameters)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


@pytest.mark.parametrize("implementation", ["in memory", "scheduler"])
def test_both_hosts_implement_the_protocols(implementation: str) -> None:
    host = Worker if implementation == "in memory" else SchedulerMigrationHost
    for protocol in (SourceHost, TargetHost, MigrationHost):
        for name, parameters in public(protocol).items():
            assert public(host)[name] == parameters, name


def test_the_links_have_one_interface() -> None:
    real = public(KvLink)
    for name, parameters in public(Link).items():
        assert len(real[name]) == len(parameters), name
    assert set(real) - set(public(Link)) == {"connect"}


def test_senders_and_receivers_have_upstreams_interface() -> None:
    from sglang.srt.disaggregation.nixl.conn import NixlKVReceiver, NixlKVSender

    for fake, real in ((Sender, NixlKVSender), (Receiver, NixlKVReceiver)):
        for name in public(fake):
            assert callable(getattr(real, name)), name


# --- the tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", [SOURCE_TRANSITIONS, TARGET_TRANSITIONS])
def test_every_state_can_reach_a_final_one(table: dict[Any, frozenset[Any]]) -> None:
    assert set(table) == set(type(next(iter(table))))
    for start, nexts in table.items():
        seen, todo = set(), [start]
        while todo:
            state = todo.pop()
            seen.add(state)
            todo += [s for s in table[state] if s not in seen]
        assert seen & FINAL_STATES, f"{start} has no way to an end"
        assert (not nexts) == (start in FINAL_STATES)


@pytest.mark.parametrize("table", [SOURCE_TRANSITIONS, TARGET_TRANSITIONS])
def test_enter_obeys_the_table(table: dict[Any, frozenset[Any]]) -> None:
    for before, allowed in table.items():
        for after in table:
            record = Migration(
                migration_id=1, rid="r", source=0, target=1, room=1, started_at=0.0,
                state=before, deadline=1.0,
            )  # fmt: skip
            if after in allowed:
                record.enter(after, 3.0, 2.0)
                assert record.state is after and record.deadline == 5.0
                assert record.history == [(after.value, 3.0)]
            else:
                with pytest.raises(ProtocolError, match=f"{before.value} → {after.value}"):
                    record.enter(after, 3.0, 2.0)
                assert record.state is before


# --- moved ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("slow_builds", [False, True])
def test_a_request_moves(overlap: bool, page_size: int, slow_builds: bool) -> None:
    world = World(overlap=overlap, page_size=page_size, slow_builds=slow_builds)
    world.submit("r", prompt=30, max_new=40)
    world.submit("stays", prompt=7, max_new=30)
    world.round()
    migration = world.start("r", 0, 1)
    world.settle()
    result = world.result(migration)
    assert (result.outcome, result.reason) == (COMPLETED, "")
    assert (result.source, result.target, result.rid) == (0, 1, "r")
    assert world.owner("r") == 1 and world.owner("stays") == 0
    assert result.tokens > 30 and result.kv_bytes >= result.tokens
    finish(world)
    assert world.streams["r"] == list(range(40))
    assert world.streams["stays"] == list(range(30))


def test_it_keeps_decoding_while_it_is_copied() -> None:
    world = World()
    req = world.submit("r", prompt=30, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    before = len(req.output_ids)
    world.workers[0].iterate()
    assert len(req.output_ids) == before + 1


@pytest.mark.parametrize("page_size,prefix,sent", [(1, 20, 10), (4, 22, 12), (4, 999, 4)])
def test_pages_already_on_the_target_are_not_sent(page_size: int, prefix: int, sent: int) -> None:
    world = World(page_size=page_size, prefix_tokens=prefix)
    world.submit("r", prompt=30, max_new=40)
    migration = world.start("r", 0, 1)
    world.settle()
    result = world.result(migration)
    assert result.outcome == COMPLETED
    grown = result.tokens - 30
    assert sent <= result.kv_bytes <= sent + grown + page_size
    finish(world)


def test_it_moves_there_and_back_and_on(overlap: bool) -> None:
    world = World(workers=3, overlap=overlap, page_size=4)
    world.submit("r", prompt=9, max_new=60)
    for source, target in ((0, 1), (1, 0), (0, 2), (2, 1)):
        migration = world.start("r", source, target)
        world.settle()
        assert world.result(migration).outcome == COMPLETED
        assert world.owner("r") == target
    finish(world)


def test_two_requests_change_places(overlap: bool) -> None:
    world = World(overlap=overlap)
    world.submit("a", worker=0, max_new=50)
    world.submit("b", worker=1, max_new=50)
    world.start("a", 0, 1)
    world.start("b", 1, 0)
    world.settle()
    assert (world.owner("a"), world.owner("b")) == (1, 0)
    finish(world)


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_the_reservation_covers_a_request_close_to_its_end(left: int, overlap: bool) -> None:
    world = World(overlap=overlap, limits=MigrationLimits(5.0, headroom_tokens=8, final_tokens=1))
    req = world.submit("r", prompt=20, max_new=20)
    while req.sampling_params.max_new_tokens - len(req.output_ids) > left:
        world.round()
    world.start("r", 0, 1)
    finish(world)
    assert world.streams["r"] == list(range(20))


def test_a_copy_that_never_catches_up_stops_within_the_headroom(overlap: bool) -> None:
    """The request decodes faster than its pages arrive: it is stopped before it outgrows the
    target's reservation."""
    world = World(overlap=overlap, page_size=1)
    req = world.submit("r", prompt=40, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    reserved = req.kv.kv_committed_len + world.limits.headroom_tokens
    for _ in range(50):  # no chunk completes
        world.workers[0].iterate()
        world.check()
    assert source_of(world, migration).record.state is SourceState.STOPPING
    assert req.kv.kv_committed_len <= reserved
    world.settle()
    assert world.result(migration).outcome == COMPLETED
    finish(world)


def test_growth_while_the_offer_is_pending_stays_within_the_reservation(overlap: bool) -> None:
    """The target builds slowly (a grammar) and the request outgrows what the target reserves:
    it may not be handed over into memory that is not there."""
    world = World(overlap=overlap, slow_builds=True)
    world.submit("r", prompt=10, max_new=60)
    world.start("r", 0, 1)
    world.deliver(0, 1)
    for _ in range(world.limits.headroom_tokens + 4):
        world.workers[0].iterate()
        world.check()
    finish(world)
    assert world.streams["r"] == list(range(60))


# --- refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rid,target,reason",
    [("r", 7, "unknown target"), ("nobody", 1, "not running")],
)
def test_refused_by_the_source(rid: str, target: int, reason: str) -> None:
    world = World()
    world.submit("r")
    migration = world.start(rid, 0, target)
    result = world.result(migration)
    assert (result.outcome, result.reason) == (REFUSED, reason)
    assert not world.workers[0].manager.active
    finish(world)


def test_a_request_moves_once_at_a_time() -> None:
    world = World(workers=3)
    world.submit("r")
    first = world.start("r", 0, 1)
    second = world.start("r", 0, 2)
    assert world.result(second).reason == "already moving"
    world.settle()
    assert world.result(first).outcome == COMPLETED
    finish(world)


def test_a_worker_does_not_move_a_request_to_itself() -> None:
    """It would build a second request of the same rid beside the running one."""
    world = World()
    world.submit("r")
    migration = world.start("r", 0, 0)
    world.settle()
    assert world.result(migration).outcome == REFUSED
    finish(world)


def test_a_request_under_abort_is_immovable() -> None:
    world = World()
    world.submit("r")
    world.abort("r")
    world.deliver_front(0)
    migration = world.start("r", 0, 1)
    assert world.result(migration).reason.startswith("ending:")
    finish(world)


def test_refused_by_the_target() -> None:
    world = World()
    world.workers[1].refuses = "no running slot"
    world.submit("r")
    migration = world.start("r", 0, 1)
    world.settle()
    result = world.result(migration)
    assert (result.outcome, result.reason) == (REFUSED, "no running slot")
    assert world.owner("r") == 0
    finish(world)


def test_refused_for_want_of_kv_memory() -> None:
    world = World(budget=60)
    world.submit("big", prompt=30, worker=0, max_new=8)
    world.submit("other", prompt=30, worker=1, max_new=8)
    migration = world.start("big", 0, 1)
    world.settle()
    assert world.result(migration).reason == "no KV memory"
    finish(world)


def test_refused_for_want_of_a_metadata_slot() -> None:
    world = World()
    slots, world.workers[1].memory.free_slots = world.workers[1].memory.free_slots, []
    world.submit("r")
    migration = world.start("r", 0, 1)
    world.settle()
    assert world.result(migration).reason == "no metadata slot"
    world.workers[1].memory.free_slots = slots
    finish(world)


def test_failed_for_want_of_a_metadata_slot_at_the_source() -> None:
    world = World()
    slots, world.workers[0].memory.free_slots = world.workers[0].memory.free_slots, []
    world.submit("r")
    migration = world.start("r", 0, 1)
    world.settle()
    assert (world.result(migration).outcome, world.result(migration).reason) == (
        FAILED,
        "no metadata slot",
    )
    world.workers[0].memory.free_slots = slots
    assert world.owner("r") == 0
    finish(world)


def test_too_many_inbound_are_refused() -> None:
    world = World(slow_builds=True)
    for i in range(4):
        world.submit(f"r{i}")
        world.start(f"r{i}", 0, 1)
    while world.deliver(0, 1):
        pass
    world.settle()
    reasons = sorted(r.reason for r in world.results)
    assert reasons == ["", "", *["too many migrations inbound"] * 2]
    finish(world)


# --- ended by the request -------------------------------------------------------------------


def test_it_finishes_before_the_answer() -> None:
    world = World()
    world.submit("r", max_new=3)
    migration = world.start("r", 0, 1)
    for _ in range(4):
        world.workers[0].iterate()
    assert world.ends["r"] == ["finished"]
    world.settle()
    result = world.result(migration)
    assert (result.outcome, result.reason) == (CANCELLED, "no longer running")
    finish(world)


def test_it_finishes_while_it_is_copied(overlap: bool) -> None:
    world = World(overlap=overlap)
    world.submit("r", prompt=30, max_new=5)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    for _ in range(6):
        world.workers[0].iterate()
        world.check()
    world.settle()
    assert world.result(migration).outcome == CANCELLED
    assert world.ends["r"] == ["finished"]
    finish(world)


def test_it_finishes_in_the_step_that_was_under_way() -> None:
    """Whatever state the end falls into; one of the lengths ends in STOPPING."""
    reasons = set()
    for max_new in range(2, 30):
        world = World(overlap=True)
        world.submit("r", prompt=8, max_new=max_new)
        migration = world.start("r", 0, 1)
        for _ in range(60):
            for link in world.links():
                world.deliver(*link)
            for transfer in world.transfers.values():
                transfer.advance()
            for worker in world.workers:
                worker.iterate()
            world.check()
        finish(world)
        assert world.streams["r"] == list(range(max_new))
        reasons.add(world.result(migration).reason)
    assert {"", "finished"} <= reasons


def finished_while_stopping() -> tuple[World, int]:
    """A world whose request "r" has ended in the step that was under way when it was stopped."""
    for max_new in range(3, 30):
        world = World(overlap=True)
        req = world.submit("r", prompt=8, max_new=max_new)
        migration = world.start("r", 0, 1)
        drive_source_to(world, migration, SourceState.COPYING)
        source = source_of(world, migration)
        while source.record.state is SourceState.COPYING and not req.finished():
            transfer_of(world, migration).advance()
            world.workers[0].iterate()
        if source.record.state is SourceState.STOPPING and req.finished():
            return world, migration
    raise AssertionError("no length ends while stopping")


@pytest.mark.parametrize(
    "then", ["nothing", "abort", "kv fails at the source", "kv fails at the target", "timeout"]
)
def test_it_finishes_while_stopping_and_then_the_migration_ends(then: str) -> None:
    """The last step's result ended the request and freed its memory; what ends the migration
    before the next tick must not put it back into the batch."""
    world, migration = finished_while_stopping()
    if then == "abort":
        world.abort("r")
    elif then == "kv fails at the source":
        transfer_of(world, migration).fail_source()
    elif then == "kv fails at the target":
        transfer_of(world, migration).fail_target()
        world.workers[1].iterate()
        world.deliver(1, 0)
    elif then == "timeout":
        world.now += 6
    finish(world)
    assert world.ends["r"] == ["finished"]


# --- the engine is paused -------------------------------------------------------------------


def test_a_move_ends_while_the_engine_is_paused(overlap: bool) -> None:
    """Under overlap the result of a step waits for the pause to end, and the request with it; else
    the move goes on to its end."""
    world = World(overlap=overlap)
    world.submit("r", prompt=20, max_new=60)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    world.workers[0].paused = True
    world.settle()
    result = world.result(migration)
    if overlap:
        assert (result.outcome, result.reason) == (CANCELLED, "engine paused")
    else:
        assert result.outcome == COMPLETED
    world.workers[0].paused = False
    finish(world)
    assert world.streams["r"] == list(range(60))


@pytest.mark.parametrize(
    "enable_overlap, paused, waiting, can_stop",
    [
        (True, True, True, False),
        (True, True, False, True),
        (True, False, True, True),
        (False, True, False, True),
    ],
)
def test_a_request_cannot_stop_whose_result_waits_for_the_pause_to_end(
    enable_overlap: bool, paused: bool, waiting: bool, can_stop: bool
) -> None:
    req: Any = object()
    results = [(SimpleNamespace(reqs=[req]), None)] if waiting else []
    scheduler: Any = SimpleNamespace(
        enable_overlap=enable_overlap, _engine_paused=paused, result_queue=results
    )
    host = object.__new__(SchedulerMigrationHost)
    host._scheduler = scheduler
    assert host.can_stop(req) == can_stop


def test_an_abort_while_the_engine_is_paused_is_applied_afterwards(overlap: bool) -> None:
    world = World(overlap=overlap)
    world.submit("r", prompt=20, max_new=60)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    world.workers[0].paused = True
    world.workers[0].iterate()
    world.abort("r")
    world.settle()
    world.workers[0].paused = False
    world.round()
    world.round()
    assert world.ends["r"] == ["aborted"]
    finish(world)


# --- aborted by the client ------------------------------------------------------------------

MOVING_STATES = (
    SourceState.OFFERED,
    SourceState.COPYING,
    SourceState.STOPPING,
    SourceState.HANDOVER,
)


@pytest.mark.parametrize("state", MOVING_STATES)
@pytest.mark.parametrize("source_hears_first", [True, False])
def test_abort_in_each_state(state: SourceState, source_hears_first: bool) -> None:
    world = World(overlap=True)
    world.submit("r", prompt=10, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, state)
    world.abort("r")
    for worker in (0, 1) if source_hears_first else (1, 0):
        world.deliver_front(worker)
        world.check()
    world.settle()
    world.round()
    world.round()
    world.settle()
    assert world.ends["r"] == ["aborted"]
    assert len(world.streams["r"]) < 90
    finish(world)


def test_abort_and_stop_in_the_same_iteration() -> None:
    """The abort marks the running request; the same iteration's tick hands it over. The mark
    is not part of the state that moves, so a target that heard of the abort too early (or not
    at all) would decode on."""
    world = World()
    world.submit("r", prompt=10, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    while transfer_of(world, migration).advance():
        pass
    world.abort("r")
    world.front[1].clear()
    world.deliver_front(0)
    world.settle()
    world.round()
    world.round()
    world.settle()
    assert world.ends["r"] == ["aborted"]


@pytest.mark.parametrize("state", [SourceState.HANDOVER, SourceState.RECALLING])
def test_abort_survives_a_recall(state: SourceState) -> None:
    """Aborted after ``Commit``, and then the target lets go: it must end on the source."""
    world = World()
    world.submit("r", prompt=10, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.HANDOVER)
    transfer_of(world, migration).fail_target()
    if state is SourceState.RECALLING:
        world.workers[1].iterate()
        world.deliver(1, 0)
        assert source_of(world, migration).record.state is SourceState.RECALLING
    world.abort("r")
    world.deliver_front(0)
    world.deliver_front(1)
    world.settle()
    assert world.result(migration).outcome == FAILED
    world.round()
    world.round()
    assert world.ends["r"] == ["aborted"]


def test_the_forwarded_abort_reaches_a_target_that_has_committed() -> None:
    world = World()
    world.submit("r", prompt=10, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.HANDOVER)
    while transfer_of(world, migration).advance():
        pass
    world.deliver(0, 1)
    world.workers[1].iterate()
    world.workers[1].iterate()
    assert world.owner("r") == 1
    world.aborts.add("r")
    world.workers[0].abort_request("r")  # only the source is told
    assert [type(m) for m in messages(world, 0, 1)] == [ForwardAbort]
    world.settle()
    world.round()
    assert world.ends["r"] == ["aborted"]
    finish(world)


def test_abort_all_and_prefixes_reach_a_moving_request() -> None:
    for rids, abort_all in (("", True), ("gro", False)):
        world = World(overlap=True)
        world.submit("group-1", prompt=10, max_new=100)
        migration = world.start("group-1", 0, 1)
        drive_source_to(world, migration, SourceState.STOPPING)
        world.workers[0].manager.on_abort(rids, abort_all, world.now)
        assert source_of(world, migration).record.outcome == CANCELLED


# --- the transfer fails ---------------------------------------------------------------------


# Without overlap a request stops at once: STOPPING does not last, and nothing can fail in it.
@pytest.mark.parametrize(
    "state, overlap",
    [(s, o) for s in MOVING_STATES for o in (False, True) if o or s is not SourceState.STOPPING],
)
@pytest.mark.parametrize("side", ["source", "target"])
def test_kv_transfer_fails(state: SourceState, side: str, overlap: bool) -> None:
    world = World(overlap=overlap)
    world.submit("r", prompt=20, max_new=60)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, state)
    transfer = transfer_of(world, migration)
    if side == "source":
        transfer.fail_source()
    else:
        while transfer.receiver is None:
            world.deliver(0, 1)
        transfer.fail_target()
    world.settle()
    result = world.result(migration)
    assert result.outcome == FAILED and result.reason
    assert world.owner("r") == 0
    finish(world)
    assert world.streams["r"] == list(range(60))


def test_wrong_metadata_is_not_taken_for_the_request() -> None:
    world = World()
    world.submit("r", prompt=10, max_new=40)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.HANDOVER)
    slot = source_of(world, migration)._metadata_slot
    world.workers[0].memory.metadata[slot] = 4711
    world.settle()
    assert world.result(migration).reason.startswith("metadata of room 4711 arrived")
    assert world.owner("r") == 0
    finish(world)


# --- timeouts -------------------------------------------------------------------------------


def test_timeout_in_offered() -> None:
    """The target never answers, then does: its memory is freed."""
    world = World(slow_builds=True)
    world.submit("r", max_new=100)
    migration = world.start("r", 0, 1)
    world.deliver(0, 1)
    world.now += 6
    cancel(world)
    result = world.result(migration)
    assert (result.outcome, result.reason) == (FAILED, "timeout in OFFERED")
    assert world.owner("r") == 0
    finish(world)


def test_timeout_in_building() -> None:
    world = World(slow_builds=True)
    world.submit("r", max_new=100)
    migration = world.start("r", 0, 1)
    world.deliver(0, 1)
    world.now += 6
    world.workers[1].iterate()
    world.deliver(1, 0)
    result = world.result(migration)
    assert (result.outcome, result.reason) == (REFUSED, "timeout in BUILDING")
    finish(world)


@pytest.mark.parametrize("state", [SourceState.COPYING, SourceState.STOPPING])
def test_timeout_before_commit(state: SourceState) -> None:
    world = World(overlap=True)
    world.submit("r", prompt=20, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, state)
    world.now += 6
    world.workers[0].iterate()
    record = source_of(world, migration).record
    assert record.reason == f"timeout in {state.value}"
    world.workers[0].iterate()
    assert world.owner("r") == 0, "it goes on at once"
    finish(world)
    assert world.result(migration).outcome == FAILED


def test_timeout_in_handover_while_commit_is_on_its_way() -> None:
    """The source recalls; the target has taken over: the target keeps it."""
    world = World()
    world.submit("r", prompt=10, max_new=40)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.HANDOVER)
    transfer = transfer_of(world, migration)
    while transfer.advance():
        pass
    world.now += 6
    cancel(world)
    assert source_of(world, migration).record.state is SourceState.RECALLING
    assert [type(m) for m in messages(world, 0, 1)] == [Commit, Cancel]
    world.deliver(0, 1)
    world.workers[1].manager.inbound[migration].record.deadline = world.now + 5
    world.workers[1].iterate()
    world.settle()
    assert world.result(migration).outcome == COMPLETED
    assert world.owner("r") == 1
    finish(world)


def test_timeout_in_handover_and_the_target_lets_go() -> None:
    world = World()
    world.submit("r", prompt=10, max_new=40)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.HANDOVER)
    world.now += 6
    world.workers[0].iterate()
    world.check()
    assert not world.workers[0].emits("r"), "it must not run before the target has let go"
    world.settle()
    result = world.result(migration)
    assert (result.outcome, result.reason) == (FAILED, "timeout in HANDOVER")
    assert world.owner("r") == 0
    finish(world)


@pytest.mark.parametrize("state", [TargetState.RESERVED, TargetState.RECEIVING])
def test_timeout_at_the_target(state: TargetState) -> None:
    world = World()
    world.submit("r", prompt=20, max_new=100)
    migration = world.start("r", 0, 1)
    world.deliver(0, 1)
    if state is TargetState.RECEIVING:
        transfer_of(world, migration).advance()
        world.workers[1].iterate()
    assert target_of(world, migration).record.state is state
    world.now += 4  # the source's clock starts again below
    source_of(world, migration).record.deadline += 10
    world.now += 2
    world.workers[1].iterate()
    assert target_of(world, migration).record.state is TargetState.ABORTING
    assert world.workers[1].memory.table, "memory stays until the source has drained"
    world.settle()
    result = world.result(migration)
    assert (result.outcome, result.reason) == (FAILED, f"timeout in {state.value}")
    assert world.owner("r") == 0
    finish(world)


def test_the_targets_clock_starts_again_with_chunks_and_commit() -> None:
    world = World()
    world.submit("r", prompt=20, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    record = target_of(world, migration).record
    for last in (ChunkSent, Commit):
        source = source_of(world, migration).record
        while not [m for m in messages(world, 0, 1) if isinstance(m, last)]:
            transfer_of(world, migration).advance()
            world.workers[0].iterate()
        world.now += 4
        while world.deliver(0, 1):
            pass
        assert record.state is TargetState.RECEIVING
        assert record.deadline == world.now + world.limits.timeout_s
        source.deadline = world.now + world.limits.timeout_s
    finish(world)
    assert world.result(migration).outcome == COMPLETED


def test_a_chunk_of_a_migration_that_is_over_is_ignored() -> None:
    world = World()
    world.submit("r", max_new=60)
    migration = world.start("r", 0, 1)
    world.settle()
    for over in (migration, 9):
        world.workers[1].manager.handle(ChunkSent(migration_id=over, source=0), 0.0)
    assert not any(world.network.values())
    finish(world)


def test_memory_stays_reserved_while_a_write_is_under_way() -> None:
    """A chunk hangs in the transfer engine. The request runs on; the target's pages are freed
    only after the engine has let go of them."""
    world = World()
    world.submit("r", prompt=20, max_new=100)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    transfer = transfer_of(world, migration)
    while transfer.under_way is None:
        assert transfer.advance()
    world.now += 6
    for _ in range(20):
        world.workers[0].iterate()
        world.workers[1].iterate()
        for link in world.links():
            world.deliver(*link)
        world.check()
        assert source_of(world, migration).record.state is SourceState.CANCELLING
        assert world.owner("r") == 0
        assert world.workers[1].memory.table
    transfer.advance()
    finish(world)


def test_a_hand_over_whose_last_pages_hang_goes_on_once_they_settle() -> None:
    world = World()
    world.submit("r", prompt=20, max_new=60)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.HANDOVER)
    transfer = transfer_of(world, migration)
    while transfer.under_way is None:
        assert transfer.advance()
    world.now += 6
    for _ in range(5):
        world.workers[0].iterate()
        world.workers[1].iterate()
        for link in world.links():
            world.deliver(*link)
        world.check()
    transfer.fail_source()
    finish(world)
    assert world.result(migration).outcome == FAILED
    assert world.streams["r"] == list(range(60))


# --- late and unknown messages --------------------------------------------------------------


@pytest.mark.parametrize(
    "orphan",
    [
        Accept(migration_id=9, worker_id=1, prefix_tokens=0),
        TransferFailed(migration_id=9, worker_id=1, reason="x"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_who_holds_memory_for_an_unknown_migration_is_told_to_free_it(orphan: Message) -> None:
    world = World()
    world.workers[0].manager.handle(orphan, world.now)
    (answer,) = messages(world, 0, 1)
    assert answer == Cancel(migration_id=9, source=0, reason="migration unknown at the source")


@pytest.mark.parametrize(
    "late",
    [
        Refuse(migration_id=9, worker_id=1, reason="x"),
        Committed(migration_id=9, worker_id=1),
        Cancelled(migration_id=9, worker_id=1),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_end_of_an_unknown_migration_is_ignored_by_its_source(late: Message) -> None:
    world = World()
    world.submit("r")
    manager = world.workers[0].manager
    manager.handle(late, world.now)
    assert not manager.active and not any(world.network.values()) and not world.results
    assert world.owner("r") == 0


@pytest.mark.parametrize(
    "late",
    [
        Accept(migration_id=9, worker_id=1, prefix_tokens=0),
        TransferFailed(migration_id=9, worker_id=1, reason="x"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_target_of_an_unknown_migration_may_let_go(late: Message) -> None:
    """Its source was restarted, or gave up before: nothing is in flight, the target is told."""
    world = World()
    world.submit("r")
    manager = world.workers[0].manager
    manager.handle(late, world.now)
    assert not manager.active and not world.results
    assert messages(world, 0, 1) == [
        Cancel(migration_id=9, source=0, reason="migration unknown at the source")
    ]
    assert world.owner("r") == 0


def test_commit_of_an_unknown_migration_is_sent_back() -> None:
    world = World()
    req = world.submit("r")
    commit = Commit(migration_id=9, source=0, tokens=5, state=capture(req), stopped_at=0.0)
    world.workers[1].manager.handle(commit, world.now)
    (answer,) = messages(world, 1, 0)
    assert answer == TransferFailed(
        migration_id=9, worker_id=1, reason="migration unknown at the target"
    )


def test_cancel_of_an_unknown_migration_is_confirmed() -> None:
    world = World()
    world.workers[1].manager.handle(Cancel(migration_id=9, source=0, reason="x"), 0.0)
    assert messages(world, 1, 0) == [Cancelled(migration_id=9, worker_id=1)]


def test_cancel_after_commit_is_answered_with_committed() -> None:
    world = World()
    world.submit("r", max_new=60)
    migration = world.start("r", 0, 1)
    world.settle()
    world.workers[1].manager.handle(Cancel(migration_id=migration, source=0, reason="x"), 0.0)
    assert messages(world, 1, 0) == [Committed(migration_id=migration, worker_id=1)]
    finish(world)


def test_forwarded_abort_of_an_unknown_migration_is_ignored() -> None:
    world = World()
    world.workers[1].manager.handle(ForwardAbort(migration_id=9, source=0), 0.0)
    assert not any(world.network.values())


def test_accept_after_the_source_gave_up_frees_the_target() -> None:
    world = World()
    world.submit("r", max_new=60)
    migration = world.start("r", 0, 1)
    world.deliver(0, 1)
    transfer_of(world, migration).advance()
    world.workers[1].iterate()
    assert [type(m) for m in messages(world, 1, 0)] == [Accept]
    world.now += 6
    target_of(world, migration).record.deadline += 10
    world.workers[0].iterate()
    finish(world)
    assert world.result(migration).reason == "timeout in OFFERED"


def test_an_offer_of_an_unknown_worker_is_dropped() -> None:
    world = World()
    world.submit("r")
    world.start("r", 0, 1)
    (offer,) = messages(world, 0, 1)
    assert isinstance(offer, Offer)
    world.workers[1].manager.handle(msgspec.structs.replace(offer, source=12), 0.0)
    assert not world.workers[1].manager.active


def test_a_message_that_is_no_peers_is_dropped() -> None:
    world = World()
    world.workers[0].manager.handle(StartMigration(migration_id=1, rid="r", target=1), 0.0)
    assert not world.results and not world.workers[0].manager.active


def test_a_second_offer_while_the_first_is_still_building() -> None:
    """The grammar compiles slowly, the first migration times out, a second one follows: each
    build belongs to the offer it was made for."""
    world = World(slow_builds=True)
    world.submit("r", max_new=200)
    world.start("r", 0, 1)
    world.deliver(0, 1)
    world.now += 6
    cancel(world)
    world.deliver(0, 1)
    second = world.start("r", 0, 1)
    world.deliver(0, 1)
    assert len(world.workers[1].building) == 2
    while world.workers[1].finish_build():
        world.check()
    world.settle()
    assert world.result(second).outcome == COMPLETED
    finish(world)


# --- progress of a copy ---------------------------------------------------------------------


def test_copy_progress_waits_for_every_chunk_sent() -> None:
    counts = ChunkCounter()
    progress = CopyProgress(SimpleNamespace(_staging_outstanding=counts), 5)
    assert progress.poll() == THROUGH, "nothing was sent yet"
    for _ in range(3):
        progress.chunk_sent()
        assert progress.poll() == UNTOUCHED, "not taken up yet"
        counts[5] += 1
        assert progress.poll() == UNDER_WAY
        counts[5] -= 1
        assert progress.poll() == THROUGH == KVPoll.Success
    progress.close()
    assert not counts.finished
    assert CopyProgress(object(), 5).poll() == THROUGH, "a backend that does not count"


def test_the_least_progress_over_the_ranks_is_that_of_the_whole_copy() -> None:
    """Drained only where no rank writes; through only where every rank is."""
    states = (UNDER_WAY, UNTOUCHED, THROUGH)
    for here, there in itertools.product(states, repeat=2):
        least = min(here, there)
        assert drained(least) == (UNDER_WAY not in (here, there))
        assert (least == THROUGH) == (here == there == THROUGH)


def test_kv_has_arrived_only_with_its_metadata() -> None:
    """Whichever comes first; another room's metadata is a failure."""
    slot = 0
    receiver = SimpleNamespace(poll=lambda: state)
    arrival = Arrival(receiver, 7, lambda: slot)
    for state in (KVPoll.Bootstrapping, KVPoll.Transferring, KVPoll.Failed):
        assert arrival.poll() == state
    state = KVPoll.Success
    assert arrival.poll() == KVPoll.Transferring
    slot = 7
    assert arrival.poll() == KVPoll.Success
    slot = 8
    assert arrival.poll() == KVPoll.Failed


def test_a_chunk_taken_up_after_the_poll_delays_the_cancel() -> None:
    """The poll that counts is one from after the abort: until then a chunk may be taken up."""
    world = World(page_size=1)
    world.submit("r", prompt=20, max_new=40)
    migration = world.start("r", 0, 1)
    drive_source_to(world, migration, SourceState.COPYING)
    source = source_of(world, migration)
    transfer = world.transfers[source.record.room]
    assert transfer.chunks and transfer.under_way is None
    world.now += 2 * world.limits.timeout_s
    polls = world.workers[0].link.poll(list(source.pollers))
    transfer.advance()
    assert transfer.under_way is not None
    source.tick(world.now, *polls)
    assert source.record.state is SourceState.CANCELLING
    assert not source._cancel_sent, "a chunk is being written"
    source.tick(world.now, *world.workers[0].link.poll(list(source.pollers)))
    assert not source._cancel_sent, "a chunk is being written"
    transfer.advance()
    source.tick(world.now, *world.workers[0].link.poll(list(source.pollers)))
    assert source._cancel_sent


# --- random schedules -----------------------------------------------------------------------

KINDS = (
    "nothing",  # first: a failing schedule shrinks towards it
    *("round",) * 2,
    *("deliver",) * 8,
    *("iterate",) * 8,
    *("kv",) * 8,
    *("start",) * 4,
    *("time",) * 2,
    *("front",) * 2,
    "build",
    "abort",
    "kv_fails_at_source",
    "kv_fails_at_target",
    "refuse",
    "pause",
)
# Two bytes an action: which, and its operand. Fast to draw, and shrinks towards "nothing".
SCHEDULES = st.binary(min_size=120, max_size=280)
WORLDS = st.fixed_dictionaries(
    {
        "workers": st.sampled_from([2, 2, 3]),
        "page_size": st.sampled_from([1, 4]),
        "overlap": st.booleans(),
        "slow_builds": st.booleans(),
        "prefix_tokens": st.sampled_from([0, 0, 6]),
        "budget": st.sampled_from([600, 600, 80]),
        "limits": st.sampled_from(
            [
                None,
                None,
                limits(chunk_tokens=3),
                limits(chunk_tokens=4, bandwidth_mb_s=0.5),
                limits(bandwidth_mb_s=0.02, max_outbound=1),
                limits(memory_share=0.04),
                limits(live_copy=False),
            ]
        ),
        "texts": st.sampled_from([1, 3]),
    }
)
REQUESTS = st.lists(
    st.tuples(st.integers(1, 14), st.sampled_from([2, 9, 20, 80, 80])), min_size=1, max_size=3
)


def perform(world: World, kind: str, operand: int, rids: list[str]) -> None:
    workers = len(world.workers)
    rid = rids[operand % len(rids)]
    transfers = list(world.transfers.values())[-4:]
    match kind:
        case "nothing":
            pass
        case "round":
            world.round()
        case "deliver":
            # The operand chooses among the directions that have something under way.
            waiting = [link for link in world.links() if world.network[link]]
            if waiting:
                world.deliver(*waiting[operand % len(waiting)])
        case "iterate":
            world.workers[operand % workers].iterate()
        case "kv":
            if transfers:
                transfers[operand % len(transfers)].advance()
        case "kv_fails_at_source":
            if transfers:
                transfers[operand % len(transfers)].fail_source()
        case "kv_fails_at_target":
            if transfers:
                transfers[operand % len(transfers)].fail_target()
        case "start":
            # Where the controller believes it is: mostly right.
            holders = [w.worker_id for w in world.workers if w.find_running(rid)]
            source = holders[0] if holders else operand % workers
            world.start(rid, source, (source + 1 + operand % (workers - 1)) % workers)
        case "build":
            world.workers[operand % workers].finish_build()
        case "front":
            world.deliver_front(operand % workers)
        case "abort":
            world.abort(rid)
        case "refuse":
            host = world.workers[operand % workers]
            host.refuses = None if host.refuses else "no running slot"
        case "pause":
            host = world.workers[operand % workers]
            host.paused = not host.paused
        case "time":
            world.now += 0.5 + operand % 8


def run_schedule(
    world_args: dict[str, Any], requests: list[tuple[int, int]], schedule: bytes
) -> World:
    """Perform a schedule, let everything arrive, decode to the end; all invariants hold."""
    texts = world_args.pop("texts", 3)
    world = World(**world_args)
    rids = [f"r{i}" for i in range(len(requests))]
    for i, (rid, (prompt, max_new)) in enumerate(zip(rids, requests)):
        world.submit(
            rid,
            worker=i % world.worker_count,
            prompt=prompt,
            max_new=max_new,
            text=f"text {i % texts}",
        )
    for kind, operand in zip(schedule[::2], schedule[1::2]):
        perform(world, KINDS[kind % len(KINDS)], operand, rids)
        world.check()
    for worker in world.workers:
        worker.paused = False
    world.settle()
    world.check_quiet()
    for _ in range(3):
        world.round()
    for rid in world.aborts:
        assert world.ends[rid], f"the abort of {rid} was lost"
    world.run_out()
    world.settle()
    world.check_quiet()
    for rid, (_, max_new) in zip(rids, requests):
        if world.ends[rid] == ["finished"]:
            assert world.streams[rid] == list(range(max_new))
        else:
            assert rid in world.aborts
    for worker in world.workers:
        assert not worker.manager._building, "a build is still expected"
    for result in world.results:
        if result.outcome == COMPLETED:
            assert result.tokens_sent + result.tokens_saved == result.tokens, result
        else:
            assert result.tokens_saved == 0, result
    return world


@settings(max_examples=250)
@given(world_args=WORLDS, requests=REQUESTS, schedule=SCHEDULES)
def test_any_schedule(
    world_args: dict[str, Any], requests: list[tuple[int, int]], schedule: bytes
) -> None:
    for result in run_schedule(world_args, requests, schedule).results:
        event(f"{result.outcome}: {result.reason.split(' of room')[0]}")
