"""Recovery in random histories: deaths, messages and fences in any order, aborts at any time."""

from __future__ import annotations

from hypothesis import event, given, settings
from hypothesis import strategies as st

from sglang_ares.srt.managers.cluster_views import DYING, READY
from unit.recovery_world import RecoveryWorld

KINDS = (
    "nothing",
    *("token",) * 4,
    *("to_worker",) * 6,
    *("to_controller",) * 6,
    *("fence",) * 3,
    *("submit",) * 2,
    *("die",) * 2,
    *("bury",) * 3,
    *("back",) * 2,
    *("move",) * 2,
    *("commit",) * 2,
    *("committed",) * 2,
    "fail",
    "finish",
    "abort",
)


def perform(world: RecoveryWorld, kind: str, operand: int) -> None:
    worker = operand % len(world.state.workers)
    rids = list(world.state.owners)
    running = [(w, n) for w, names in world.running.items() for n in names]
    free = [(w, n) for w, n in running if world.running[w][n].handed_to is None]
    handed = [(w, n) for w, n in running if (w, n) not in free]
    match kind:
        case "submit" if len(rids) < 5:
            world.submit(f"r{len(world.dispatched) + len(world.told_ends)}", salt=operand + 1)
        case "token" if free:
            world.emit(*free[operand % len(free)])
        case "finish" if free:
            world.finish(*free[operand % len(free)])
        case "fail" if free:
            world.fail(*free[operand % len(free)])
        case "to_worker":
            waiting = [w for w, queue in world.inbox.items() if queue]
            if waiting:
                world.to_worker(waiting[operand % len(waiting)])
        case "to_controller":
            waiting = [w for w, queue in world.outbox.items() if queue]
            if waiting:
                world.to_controller(waiting[operand % len(waiting)])
        case "fence":
            world.answer_fence(operand)
        case "die":
            world.die(worker, operand // 16)
        case "bury":
            dying = [w for w, view in world.state.workers.items() if view.state == DYING]
            if dying:
                world.bury(dying[operand % len(dying)])
        case "back":
            world.bring_back(worker)
        case "move" if rids:
            target = world.ready("decode")
            if target:
                world.start_move(rids[operand % len(rids)], target[operand // 8 % len(target)])
        case "commit" if handed:
            world.commit(*handed[operand % len(handed)])
        case "committed" if world.committed:
            world.hear_committed(*world.committed[operand % len(world.committed)])
        case "abort" if rids:
            world.abort(rids[operand % len(rids)])


@settings(max_examples=200)
@given(
    sizes=st.sampled_from([(1, 2), (1, 3), (2, 3)]),
    prelude=st.integers(1, 4),
    schedule=st.binary(min_size=20, max_size=300),
)
def test_any_history(sizes: tuple[int, int], prelude: int, schedule: bytes) -> None:
    """Workers die in any order, messages and fences arrive in any order, requests fail, move,
    end and are aborted at any time: every request ends once, whole or for a reason."""
    world = RecoveryWorld(prefill=sizes[0], decode=sizes[1])
    for i in range(prelude):
        world.submit(f"r{i}", salt=i + 1)
    for kind, operand in zip(schedule[::2], schedule[1::2]):
        perform(world, KINDS[kind % len(KINDS)], operand)
    world.settle()
    for worker_id, attempts in world.running.items():
        for name in attempts:
            assert world.state.owner_of(name), f"{name} runs on {worker_id} and nobody hears it"
    world.run_out()
    assert all(w.state == READY for w in world.state.workers.values())
    assert not world.state.owners and not any(world.running.values())
    assert not any(w.dispatched for w in world.state.workers.values())
    for rid in {*world.dispatched, *world.told_ends}:
        ends = (rid in world.ledger.ended) + (rid in world.told_ends)
        assert ends == 1, f"{rid} ended {ends} times"
        if rid in world.told_ends and world.told_ends[rid][0] is None:
            assert rid in world.aborted
        if world.told_ends.get(rid, (0, ""))[0] == 503:
            assert world.dispatched[rid] == 0, "only a new request may be turned away"
    event(f"recovered {min(world.recovery.recovered, 5)}")
    event(f"moved {min(world.moves, 3)}")
