"""What keeps the ranks of a worker together: the shared step, and the comparison afterwards."""

from __future__ import annotations

import multiprocessing as mp
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_ares.srt.disaggregation.migration import Migration, SourceState
from sglang_ares.srt.disaggregation.rank_agreement import TransitionDigest
from sglang_ares.srt.managers import control_intake
from sglang_ares.srt.managers.control_intake import (
    ControlIntake,
    ControlRequestReceiver,
    ControlStep,
)
from sglang_ares.srt.managers.migration_host import SchedulerMigrationHost
from sglang_ares.srt.platforms.cpu import give_cores_to_ranks


def record(migration_id: int, at: float) -> Migration:
    """A migration with one transition."""
    migration = Migration(
        migration_id=migration_id, rid="r", source=0, target=1, room=1, started_at=0.0,
        state=SourceState.OFFERED, deadline=1.0,
    )  # fmt: skip
    migration.enter(SourceState.ENDED, at, 1.0)
    return migration


# --- one process ----------------------------------------------------------------------------


def test_a_step_with_nothing_to_say_costs_nothing() -> None:
    intake = ControlIntake(list, lambda: False, lambda: 1, lambda: 0.0, lambda: 5.0)
    assert intake.gather() is None
    assert intake.take_out(["a request"]) == ["a request"]
    assert intake.pop_frames() == [] and intake.now == 0.0


@pytest.mark.parametrize("frames,waits", [([b"x", b"y"], False), ([], True)])
def test_frames_and_the_clock_come_out_on_the_other_side(frames: list[bytes], waits: bool) -> None:
    intake = ControlIntake(lambda: frames, lambda: waits, lambda: 1, lambda: 0.25, lambda: 5.0)
    step = intake.gather()
    assert step == ControlStep(5.0, frames, 1, 0.25)
    assert intake.take_out(["a request", step]) == ["a request"]
    assert intake.now == 5.0 and intake.decode_step_s == 0.25
    assert intake.pop_frames() == frames
    assert intake.pop_frames() == []


def test_frames_of_two_steps_keep_their_order() -> None:
    intake = ControlIntake(list, lambda: False, lambda: 1, lambda: 0.0)
    intake.take_out([ControlStep(1.0, [b"1", b"2"], 1, 0.0)])
    intake.take_out([ControlStep(2.0, [b"3"], 1, 0.0)])
    assert intake.pop_frames() == [b"1", b"2", b"3"] and intake.now == 2.0


def test_a_move_is_sized_by_rank_zeros_step_time() -> None:
    """A rank has measured another one itself: it would begin other moves, or larger ones."""
    intake = ControlIntake(list, lambda: False, lambda: 1, lambda: 0.5)
    intake.take_out([ControlStep(1.0, [], 1, 0.25)])
    host = object.__new__(SchedulerMigrationHost)
    scheduler: Any = SimpleNamespace(intake=intake, ares=SimpleNamespace(decode_step_s=0.5))
    host._scheduler = scheduler
    assert host.decode_step_s() == 0.25


def test_digest_counts_states_times_and_order() -> None:
    def digest(*records: Migration) -> int:
        total = TransitionDigest()
        for r in records:
            total.add(r)
        return total.value

    assert digest(record(1, 2.0), record(2, 3.0)) == digest(record(1, 2.0), record(2, 3.0))
    assert digest(record(1, 2.0)) != digest(record(1, 2.5)), "another step"
    assert digest(record(1, 2.0), record(2, 3.0)) != digest(record(2, 3.0), record(1, 2.0))


def test_a_rank_that_parted_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    digest = TransitionDigest()
    intake = ControlIntake(list, lambda: False, lambda: digest.value, lambda: 0.0)
    intake.take_out([ControlStep(1.0, [], 0, 0.0)])
    assert intake.in_step and not caplog.records
    digest.add(record(1, 1.0))
    for _ in range(2):
        intake.take_out([ControlStep(2.0, [], 0, 0.0)])
    assert not intake.in_step
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["integrity check failed"]


@pytest.mark.parametrize(
    "cores,ranks,named",
    [({0, 1}, 2, "0|1"), ({0, 1, 2, 3}, 2, "0,2|1,3"), ({5}, 2, "5|5"), ({0, 1}, 1, None)],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], ranks: int, named: str | None
) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores)
    monkeypatch.setattr("os.environ", environment)
    give_cores_to_ranks(ranks)
    assert environment.get("SGLANG_CPU_OMP_THREADS_BIND") == named
    environment["SGLANG_CPU_OMP_THREADS_BIND"] = "the operator's"
    give_cores_to_ranks(2)
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == "the operator's"


# --- two ranks, over gloo -------------------------------------------------------------------


def on_two_ranks(scenario: Any) -> list[Any]:
    """Run ``scenario(rank)`` in two processes of one gloo group; what each returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        context.Process(target=_rank, args=(scenario, rank, port, pipes[rank][1]))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for reader, _ in pipes:
            assert reader.poll(60), "a rank did not answer"
        return [reader.recv() for reader, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(scenario: Any, rank: int, port: int, writer: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    writer.send(scenario(rank))
    dist.barrier()


def _receive_three_steps(rank: int) -> list[Any]:
    """Upstream's broadcast with our intake: what each rank sees in each step."""
    control_intake_module: Any = __import__(
        "sglang.srt.managers.scheduler_components.request_receiver", fromlist=["x"]
    )
    control_intake_module.get_parallel = lambda: SimpleNamespace(
        enable_dp_attention=False, tp_size=2
    )
    frames = [[b"one", b"two"], [], []]
    waits = iter([False, True, False])
    intake = ControlIntake(
        lambda: frames.pop(0),
        lambda: next(waits),
        lambda: 7,
        lambda: 0.25 + rank,
        lambda: 100.0 + rank,
    )
    parts: dict[str, Any] = dict.fromkeys(
        f for f in control_intake.SchedulerRequestReceiver.__dataclass_fields__
    )
    parts["tp_group"] = SimpleNamespace(rank=rank, ranks=[0, 1])
    parts["tp_cpu_group"] = dist.group.WORLD
    receiver = ControlRequestReceiver(**parts, intake=intake)
    seen = []
    for step in range(3):
        arrived = [f"request {step}"] if rank == 0 else None
        requests = receiver._broadcast_reqs_across_ranks(arrived, None)
        seen.append((requests, intake.now, intake.decode_step_s, intake.pop_frames()))
    return seen


def test_all_ranks_see_rank_zeros_frames_clock_and_step_time() -> None:
    first, second = on_two_ranks(_receive_three_steps)
    assert first == second
    assert first == [
        (["request 0"], 100.0, 0.25, [b"one", b"two"]),
        (["request 1"], 100.0, 0.25, []),
        (["request 2"], 100.0, 0.25, []),
    ]
