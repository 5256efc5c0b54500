"""A side of a migration dies, in every state: one owner or a new attempt, and no memory lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from sglang_ares.srt.disaggregation.migration import (
    COMPLETED,
    FAILED,
    SourceState,
    TargetState,
)
from sglang_ares.srt.managers.io_struct import Committed, Decoder, Peer, WorkerInbound
from unit.mortal_world import MortalWorld

RIDS = ("r", "stays")
SOURCE_STATES = [s for s in SourceState if s not in (SourceState.DONE, SourceState.ENDED)]
TARGET_STATES = [s for s in TargetState if s is not TargetState.RELEASED]


def moving_world(overlap: bool, slow_builds: bool = False) -> tuple[MortalWorld, int]:
    world = MortalWorld(overlap=overlap, slow_builds=slow_builds, page_size=4)
    world.submit("r", prompt=30, max_new=60)
    world.submit("stays", worker=1, prompt=9, max_new=60)
    world.round()
    return world, world.start("r", 0, 1)


def records(world: MortalWorld, migration: int) -> tuple[Any, Any]:
    source = world.workers[0].manager.outbound.get(migration)
    target = world.workers[1].manager.inbound.get(migration)
    return source and source.record, target and target.record


def step(world: MortalWorld) -> None:
    for link in world.links():
        world.deliver(*link)
    for transfer in list(world.transfers.values()):
        world.advance(transfer)
    for worker in world.workers:
        if worker.worker_id not in world.dead:
            worker.iterate()
    world.check()


def drive(world: MortalWorld, migration: int, side: int, state: Any) -> None:
    """Until one side is in ``state``; the last two states of each side need a nudge."""
    for _ in range(200):
        record = records(world, migration)[side]
        if record is not None and record.state is state:
            return
        if state in (SourceState.RECALLING, SourceState.CANCELLING) and record is not None:
            nudge = SourceState.HANDOVER if state is SourceState.RECALLING else SourceState.COPYING
            if record.state is nudge:
                transfer = world.transfers[record.room]
                while transfer.under_way is None and transfer.advance():
                    pass  # a chunk hangs in the transfer engine
                world.now += 6
                world.workers[0].iterate()
                continue
        if state is TargetState.ABORTING and record and record.state is TargetState.RECEIVING:
            world.transfers[record.room].fail_target()
            world.workers[1].iterate()
            continue
        if state is TargetState.COMMITTED and world.adopted:
            return
        for link in world.links():
            world.deliver(*link)
            record = records(world, migration)[side]
            if record is not None and record.state is state:
                return
        for transfer in list(world.transfers.values()):
            transfer.advance()
        for worker in world.workers:
            worker.iterate()
            record = records(world, migration)[side]
            if record is not None and record.state is state:
                return
            if state is TargetState.COMMITTED and world.adopted:
                return
    raise AssertionError(f"never in {state}")


def finish(world: MortalWorld) -> None:
    world.tell_all()
    world.settle()
    world.check_quiet()
    for _ in range(80):
        world.round()
    world.check_quiet()
    for rid in world.streams:
        if rid not in world.to_recover():
            assert world.ends[rid] == ["finished"]
            assert world.streams[rid] == list(range(60))


# Without overlap a request stops at once: STOPPING does not last.
CASES = [
    (side, state, overlap)
    for side, states in enumerate((SOURCE_STATES, TARGET_STATES))
    for state in states
    for overlap in (False, True)
    if overlap or state is not SourceState.STOPPING
]


@pytest.mark.parametrize("victim", [0, 1], ids=["source dies", "target dies"])
@pytest.mark.parametrize("side, state, overlap", CASES, ids=str)
def test_death_in_each_state(side: int, state: Any, victim: int, overlap: bool) -> None:
    world, migration = moving_world(overlap, slow_builds=state is TargetState.BUILDING)
    drive(world, migration, side, state)
    world.kill(victim)
    world.check()
    finish(world)
    if victim == 0:
        assert "stays" not in world.to_recover()
        assert ("r" in world.to_recover()) == (state is not TargetState.COMMITTED)
    else:
        assert "stays" in world.to_recover()
        result = world.result(migration)
        assert result.outcome == FAILED and result.reason
        owned = [
            SourceState.HANDOVER, SourceState.RECALLING, TargetState.COMMITTED
        ]  # fmt: skip
        if side == 0:
            assert ("r" in world.to_recover()) == (state in owned)
        elif state is TargetState.COMMITTED:
            assert "r" in world.to_recover()


def test_it_decodes_on_at_once_when_the_target_dies_during_the_copy() -> None:
    world, migration = moving_world(overlap=False)
    drive(world, migration, 0, SourceState.COPYING)
    world.kill(1)
    world.tell(0, 1)
    assert world.owner("r") == 0 and not world.lost
    assert world.result(migration).reason == "target died"
    finish(world)


def test_the_targets_last_word_may_still_arrive() -> None:
    """``Committed`` was sent, then the target died: the move counts, and the request is
    recovered as one of the target's."""
    world, migration = moving_world(overlap=False)
    drive(world, migration, 1, TargetState.COMMITTED)
    decoder = Decoder(WorkerInbound)
    sent = [decoder.decode(frame) for frame in world.network[1, 0]]
    assert isinstance(sent[-1], Committed)
    world.kill(1, heard=len(sent))
    for _ in sent:
        world.deliver(1, 0)
    finish(world)
    assert world.result(migration).outcome == COMPLETED
    assert not world.lost and "r" in world.to_recover()


@pytest.mark.parametrize("committed_arrives", ["before", "after"])
def test_the_word_of_the_dead_around_the_news_of_their_death(committed_arrives: str) -> None:
    world, migration = moving_world(overlap=False)
    drive(world, migration, 1, TargetState.COMMITTED)
    world.kill(1, heard=5)
    if committed_arrives == "after":
        world.tell(0, 1)
        assert world.lost == [(0, "r")]
    finish(world)
    assert "r" in world.to_recover() and len(world.lost) <= 1
    expected = FAILED if committed_arrives == "after" else COMPLETED
    if committed_arrives == "after":
        assert world.result(migration).outcome == expected


def test_the_living_are_not_forgotten_when_a_worker_comes_back() -> None:
    """Another one hangs meanwhile: it is not among those that are introduced anew, but it is not
    buried either, and whoever waits for its KV must still be told by its address."""
    world, _ = moving_world(overlap=False)
    manager = world.workers[0].manager
    peers = [
        Peer(worker_id=i, role="decode", control_endpoint="", bootstrap_host="", bootstrap_port=i)
        for i in (0, 5)
    ]
    manager.connect(peers)
    forgotten = manager.forget_peer(1)
    assert forgotten is not None and forgotten.bootstrap_port == 1
    assert manager.forget_peer(1) is None
    assert manager.forget_peer(5) == peers[1]


# --- random schedules -----------------------------------------------------------------------

KINDS = (
    "nothing",
    *("deliver",) * 8,
    *("iterate",) * 8,
    *("kv",) * 8,
    *("start",) * 3,
    *("tell",) * 2,
    "build",
    "kill",
    "time",
    "abort",
    "front",
    "kv_fails_at_source",
    "kv_fails_at_target",
)


def perform(world: MortalWorld, kind: str, operand: int, rids: list[str]) -> None:
    living = [w.worker_id for w in world.workers if w.worker_id not in world.dead]
    rid = rids[operand % len(rids)]
    transfers = list(world.transfers.values())[-4:]
    transfer = transfers[operand % len(transfers)] if transfers else None
    worker = world.workers[living[operand % len(living)]]
    match kind:
        case "deliver":
            waiting = [link for link in world.links() if world.network[link]]
            if waiting:
                world.deliver(*waiting[operand % len(waiting)])
        case "iterate":
            worker.iterate()
            world.note_reports()
        case "kv" if transfer:
            world.advance(transfer)
        case "kv_fails_at_source" if transfer:
            transfer.fail_source()
        case "kv_fails_at_target" if transfer:
            transfer.fail_target()
        case "start":
            # The controller knows of the dead as soon as it has killed them.
            source, others = world.believed[rid], [w for w in living if w != world.believed[rid]]
            if source in living and others and rid not in world.to_recover():
                world.start(rid, source, others[operand % len(others)])
        case "tell" if world.untold:
            world.tell(*sorted(world.untold)[operand % len(world.untold)])
        case "build":
            worker.finish_build()
        case "kill" if len(living) > 1:
            world.kill(worker.worker_id, heard=operand // 8 % 4)
        case "time":
            world.now += 0.5 + operand % 8
        case "abort":
            world.abort(rid)
        case "front":
            world.deliver_front(worker.worker_id)
    world.note_reports()


@settings(max_examples=250)
@given(
    workers=st.sampled_from([2, 3, 3]),
    overlap=st.booleans(),
    slow_builds=st.booleans(),
    page_size=st.sampled_from([1, 4]),
    schedule=st.binary(min_size=60, max_size=280),
)
def test_any_schedule_with_deaths(
    workers: int, overlap: bool, slow_builds: bool, page_size: int, schedule: bytes
) -> None:
    world = MortalWorld(
        workers=workers, overlap=overlap, slow_builds=slow_builds, page_size=page_size
    )
    rids = ["r0", "r1", "r2"]
    for i, rid in enumerate(rids):
        world.submit(rid, worker=i % workers, prompt=3 + 7 * i, max_new=60)
    for kind, operand in zip(schedule[::2], schedule[1::2]):
        perform(world, KINDS[kind % len(KINDS)], operand, rids)
        world.check()
    world.tell_all()
    world.settle()
    world.check_quiet()
    for _ in range(80):
        world.round()
    world.settle()
    world.check_quiet()
    for rid in rids:
        assert world.ends[rid] or rid in world.to_recover(), f"{rid} never ended"
    for result in world.results:
        event(f"{result.outcome}: {result.reason.split(' of room')[0]}")
