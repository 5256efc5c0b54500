"""Recovery: each request of a dead worker goes on once, or ends with a reason; none is lost."""

from __future__ import annotations

import msgspec
import pytest

from sglang_ares.srt.managers.io_struct import Discard, FenceRequests, PeerDied
from sglang_ares.srt.managers.recovery import Recovery
from unit.recovery_world import MISSING, RecoveryWorld, request

P0, D1, D2, D3 = 0, 1, 2, 3


def world_with(
    rid: str = "r", worker: int = D1, tokens: int = 3, **fields: object
) -> RecoveryWorld:
    """One request that decodes on ``worker`` and has streamed ``tokens`` tokens."""
    world = RecoveryWorld()
    world.submit(rid, salt=worker - 1 + 3, **fields)
    assert world.state.owners[rid].decode == worker
    for _ in range(tokens):
        world.emit(worker, f"{rid}#00")
    return world


def kill(world: RecoveryWorld, worker_id: int) -> None:
    world.die(worker_id, 0)
    world.bury(worker_id)


def hear_all(world: RecoveryWorld) -> None:
    """All messages between the controller and the living arrive; fences wait."""
    for worker_id in world.state.workers:
        while world.to_worker(worker_id) or world.to_controller(worker_id):
            pass


# --- one death ------------------------------------------------------------------------------


def test_a_request_goes_on_behind_the_last_token_the_client_has() -> None:
    world = world_with()
    kill(world, D1)
    hear_all(world)
    assert [f.attempts for f in world.fences] == [{"r": 1}]
    owner = world.state.owners["r"]
    assert owner.recovering and owner.name == "r#01"
    world.answer_fence()
    assert not owner.recovering and owner.decode in (D2, D3)
    assert world.running[owner.decode]["r#01"].next_token == 3
    assert world.recovery.recovered == 1
    world.run_out()
    assert world.ledger.streams["r"] == [0, 1, 2, 3] and world.ledger.ended == {"r"}
    assert not world.state.owners and not world.told_ends


def test_nothing_is_recovered_before_every_survivor_has_let_go() -> None:
    """What a survivor has to say of a moved request must arrive first."""
    world = world_with()
    kill(world, D1)
    for survivor in (P0, D2, D3):
        assert isinstance(world.inbox[survivor][0], PeerDied)
        assert not world.fences and not world.recovery.settled(D1)
        world.to_worker(survivor)
        world.to_controller(survivor)
    assert len(world.fences) == 1 and world.recovery.settled(D1)


def test_requests_elsewhere_are_left_alone() -> None:
    world = world_with()
    world.submit("other", salt=4)
    assert world.state.owners["other"].decode == D2
    kill(world, D1)
    hear_all(world)
    assert [f.attempts for f in world.fences] == [{"r": 1}]
    assert world.state.owners["other"].attempt == 0


def test_the_old_attempt_is_voided_where_it_may_still_live() -> None:
    world = world_with()
    kill(world, D1)
    for survivor in (P0, D2, D3):
        world.to_worker(survivor)
        world.to_controller(survivor)
    assert list(world.inbox[P0]) == [Discard(rids=["r#00"])], "its prefill worker"
    assert not world.inbox[D2] and not world.inbox[D3]
    assert not any(w.dispatched for w in world.state.workers.values())


def test_a_request_that_had_ended_is_forgotten() -> None:
    """The worker died between its last token and its report."""
    world = world_with()
    world.finish(D1, "r#00")
    kill(world, D1)
    world.settle()
    assert not world.state.owners and not world.told_ends and world.dispatched["r"] == 1


def test_its_end_does_not_end_the_next_request_of_its_rid() -> None:
    """The client had the end, and used the rid again before the ledger had answered."""
    world = world_with()
    world.finish(D1, "r#00")
    kill(world, D1)
    hear_all(world)
    again = world.state.new_owner("r", request())
    assert world.dispatch(again, []) and again.name == "r#02"
    world.answer_fence()
    assert world.state.owners == {"r": again} and not again.recovering
    kill(world, again.decode)
    hear_all(world)
    (fence,) = world.fences
    assert (fence.attempts, fence.first_attempts) == ({"r": 3}, {"r": 2})


def test_a_failed_transfer_is_attempted_again() -> None:
    world = world_with(tokens=0)
    world.fail(D1, "r#00")
    hear_all(world)
    assert len(world.fences) == 1
    world.answer_fence()
    assert world.state.owners["r"].name == "r#01"
    world.run_out()
    assert world.ledger.ended == {"r"} and world.dispatched["r"] == 2


def test_reports_of_void_attempts_are_of_no_interest() -> None:
    world = world_with()
    world.recovery.on_request_failed("r#00", "first word")
    world.recovery.on_request_failed("r#00", "its prefill worker says so, too")
    world.recovery.on_request_failed("nobody#00", "x")
    assert len(world.fences) == 1
    world.answer_fence()
    world.recovery.on_request_failed("r#00", "late")
    assert not world.fences and world.state.owners["r"].attempt == 1


def test_answers_and_acknowledgements_nobody_asked_for() -> None:
    world = world_with()
    world.recovery.on_acknowledged(99, D2)
    world.recovery.on_fenced(world.ledger.fence(FenceRequests(fence_id=7, attempts={"r": 0})))
    assert world.dispatched["r"] == 1 and not world.state.owners["r"].recovering


# --- deaths upon deaths ---------------------------------------------------------------------


def test_a_survivor_that_dies_owes_no_acknowledgement() -> None:
    world = world_with()
    kill(world, D1)
    for survivor in (P0, D3):
        world.to_worker(survivor)
        world.to_controller(survivor)
    assert not world.fences
    kill(world, D2)
    assert [f.attempts for f in world.fences] == [{"r": 1}]


def test_a_dying_worker_is_not_asked() -> None:
    world = world_with()
    world.die(D2, 0)
    kill(world, D1)
    assert not world.inbox[D2]
    hear_all(world)
    assert world.recovery.settled(D1)


def test_the_new_home_dies_as_well() -> None:
    world = world_with()
    for _ in range(3):
        kill(world, world.state.owners["r"].decode)
        hear_all(world)
        world.answer_fence()
    owner = world.state.owners["r"]
    assert owner.attempt == 3 and owner.recovering, "nobody is left to take it"
    world.run_out()
    assert world.ledger.streams["r"] == [0, 1, 2, 3] and world.ledger.ended == {"r"}


def test_a_dead_worker_without_survivors_is_settled_at_once() -> None:
    world = RecoveryWorld(prefill=0, decode=1)
    kill(world, 0)
    assert world.recovery.settled(0)


def test_the_source_dies_after_its_target_has_said_that_it_owns_the_request() -> None:
    world = world_with()
    world.start_move("r", D2)
    world.commit(D1, "r#00")
    kill(world, D1)
    world.settle()
    assert world.state.owners["r"].decode == D2 and world.dispatched["r"] == 1
    world.run_out()
    assert world.ledger.ended == {"r"}


@pytest.mark.parametrize("committed", [False, True])
def test_the_target_dies_in_the_hand_over(committed: bool) -> None:
    """Its source cannot know whether the target has spoken; the ledger does."""
    world = world_with()
    world.start_move("r", D2)
    if committed:
        world.commit(D1, "r#00")
        world.emit(D2, "r#00")
    kill(world, D2)
    world.settle()
    assert world.dispatched["r"] == 2
    world.run_out()
    assert world.ledger.streams["r"] == list(range(5 if committed else 4))


def test_a_moved_request_no_longer_counts_where_it_was_dispatched_to() -> None:
    """It left before its first report there, and its new home dies: nobody but recovery could
    still take it off the first worker's books."""
    world = world_with()
    world.start_move("r", D2)
    world.commit(D1, "r#00")
    world.to_controller(D2)
    kill(world, D2)
    hear_all(world)
    assert len(world.fences) == 1
    assert not any(w.dispatched for w in world.state.workers.values())


# --- nowhere to go --------------------------------------------------------------------------


def test_it_waits_while_all_workers_of_a_role_start_anew() -> None:
    world = world_with()
    for worker in (D1, D2, D3):
        kill(world, worker)
    hear_all(world)
    while world.fences:
        world.answer_fence()
    assert world.state.owners["r"].recovering and not world.told_ends
    world.bring_back(D3)
    assert world.state.owners["r"].decode == D3


def test_it_ends_when_no_worker_of_a_role_is_left() -> None:
    world = world_with()
    for worker in (D1, D2, D3):
        world.die(worker, 0)
    world.missing = MISSING
    for worker in (D1, D2, D3):
        world.bury(worker, for_good=True)
    world.settle()
    assert world.told_ends == {"r": (503, MISSING)} and not world.state.owners


def test_it_ends_after_too_many_attempts() -> None:
    world = world_with()
    world.recovery = Recovery(world, world.state, max_attempts=2)
    for attempt in range(3):
        assert world.dispatched["r"] == attempt + 1, "the first, and two recoveries"
        world.fail(world.state.owners["r"].decode, f"r#{attempt:02d}")
        hear_all(world)
        world.answer_fence()
    status, reason = world.told_ends["r"]
    assert status == 500 and "failed 3 times" in reason and not world.state.owners


def test_what_cannot_move_ends_once_it_has_begun_to_stream() -> None:
    world = world_with(session_id="s")
    kill(world, D1)
    world.settle()
    status, reason = world.told_ends["r"]
    assert status == 500 and "cannot be continued elsewhere" in reason


def test_an_output_whose_beginning_is_forgotten_ends_with_an_error() -> None:
    world = world_with()
    kill(world, D1)
    hear_all(world)
    (fence,) = world.fences
    told = world.ledger.fence(fence)
    (emitted,) = told.requests
    forgotten = [msgspec.structs.replace(emitted, incomplete=True)]
    world.recovery.on_fenced(msgspec.structs.replace(told, requests=forgotten))
    status, reason = world.told_ends["r"]
    assert status == 500 and "not remembered" in reason and world.dispatched["r"] == 1


def test_what_cannot_move_is_dispatched_again_before_its_first_token() -> None:
    world = world_with(tokens=0, session_id="s")
    kill(world, D1)
    world.settle()
    assert not world.told_ends and world.dispatched["r"] == 2


# --- the client leaves ----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the burial", "acknowledging", "fencing", "parked"])
def test_an_abort_is_confirmed_in_every_stage(when: str) -> None:
    world = world_with()
    if when == "parked":
        for worker in (D1, D2, D3):
            kill(world, worker)
    else:
        world.die(D1, 0)
        if when == "before the burial":
            world.abort("r")
        world.bury(D1)
        if when == "acknowledging":
            world.abort("r")
    hear_all(world)
    if when == "fencing":
        world.abort("r")
    while world.fences:
        world.answer_fence()
    if when == "parked":
        assert not world.told_ends
        world.abort("r")
    assert world.told_ends == {"r": (None, "aborted")} and not world.state.owners
    world.run_out()
    assert world.dispatched["r"] == 1
