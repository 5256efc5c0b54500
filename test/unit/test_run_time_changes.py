"""Weights and LoRA adapters that control requests load: a worker that is started later has them,
or does not serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.managers.io_struct import (
    FlushCacheReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    UnloadLoRAAdapterReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromTensorReqInput,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.server_args import ServerArgs

from sglang_ares.ares_args import AresArgs
from sglang_ares.engine import default_server_args
from sglang_ares.srt.managers import scheduler as scheduler_module
from sglang_ares.srt.managers.cluster import WorkerCluster, WorkerProcess
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import FAILED_FOR_GOOD, RESTARTING, WorkerView
from sglang_ares.srt.managers.controller import AresController
from sglang_ares.srt.managers.io_struct import MayLeave
from sglang_ares.srt.managers.law_keeper import LawKeeper
from sglang_ares.srt.managers.remote_workers import WorkerStartError
from sglang_ares.srt.managers.run_time_changes import RunTimeChanges, repeat
from sglang_ares.srt.managers.scheduler import AresScheduler
from sglang_ares.srt.managers.supervisor import Supervisor
from sglang_ares.srt.policy.types import DECODE, PREFILL
from sglang_ares.srt.security.control_plane import ControlPlane
from unit.test_remote_workers import World


def load(name: str) -> LoadLoRAAdapterReqInput:
    return LoadLoRAAdapterReqInput(lora_name=name, lora_path=f"/loras/{name}", lora_id=f"id-{name}")


def unload(name: str) -> UnloadLoRAAdapterReqInput:
    return UnloadLoRAAdapterReqInput(lora_name=name, lora_id=f"id-{name}")


def of_type(kind: type) -> Any:
    fields = msgspec.structs.fields(kind)
    return kind(**{f.name: None for f in fields if f.required})


WEIGHTS = [
    UpdateWeightFromDiskReqInput(model_path="/models/new"),
    of_type(UpdateWeightsFromTensorReqInput),
    of_type(LoadLoRAAdapterFromTensorsReqInput),
]


def changes_after(*requests: Any) -> RunTimeChanges:
    changes = RunTimeChanges()
    for request in requests:
        changes.note(request)
    return changes


# --- what is noted --------------------------------------------------------------------------


def test_adapters_are_to_be_as_they_are_now() -> None:
    changes = changes_after(load("a"), load("b"), unload("a"), load("c"))
    assert changes.adapters == [load("b"), load("c")]
    assert changes.why_not_anew is None and changes.why_not_join is not None


def test_the_unloading_of_an_adapter_of_the_start_is_repeated() -> None:
    assert changes_after(unload("first"), load("a")).adapters == [unload("first"), load("a")]


@pytest.mark.parametrize("request_", WEIGHTS)
def test_new_weights_are_not_to_be_had_again(request_: Any) -> None:
    why = changes_after(request_).why_not_anew
    assert why is not None and type(request_).__name__ in why


def test_other_control_requests_change_nothing() -> None:
    changes = changes_after(FlushCacheReqInput())
    assert changes.count == 0 and changes.why_not_join is None


def test_the_controller_notes_what_it_sends_to_all_workers() -> None:
    sent: list[Any] = []
    changes = RunTimeChanges()
    controller: Any = SimpleNamespace(
        cluster=SimpleNamespace(changes=changes),
        workers=[SimpleNamespace(put=sent.append)],
        _active_workers=[0],
    )
    AresController.send_control_message(controller, load("a"))
    assert sent == changes.adapters == [load("a")]


# --- a worker that is started anew ----------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> WorkerCluster:
    """One whose processes do nothing; they are ready at once."""

    def spawn(worker: WorkerProcess, start_timeout_s: float) -> None:
        process: Any = SimpleNamespace(pid=1, exitcode=None)
        process.kill = lambda: setattr(process, "exitcode", -9)
        process.is_alive = lambda: process.exitcode is None
        worker.processes = [process]
        worker.info = {"max_total_num_tokens": 1}

    monkeypatch.setattr(WorkerProcess, "spawn", spawn)
    args = ServerArgs(**default_server_args())
    ports: Any = SimpleNamespace(
        instance_id="i", tokenizer_ipc_name="ipc://t", detokenizer_ipc_name="ipc://d"
    )
    control = ControlPlane.create(AresArgs())
    cluster = WorkerCluster(args, ports, AresArgs(decode_workers=1), control, LawKeeper(None))
    cluster.start()
    return cluster


class Host:
    """The controller, as the supervisor uses it."""

    def __init__(self, cluster: WorkerCluster) -> None:
        self.cluster = cluster
        self.taken_in: list[int] = []
        views = [WorkerView(i, r, pids=[], kv_capacity=1) for i, r in enumerate((PREFILL, DECODE))]
        self.state = ClusterState(views)
        self.supervisor = Supervisor(self, cluster, self.state, 1e9, 5, 0.0)

    def leave_out(self, worker_id: int) -> None: ...

    def on_worker_dead(self, worker_id: int) -> None: ...

    def settled(self, worker_id: int) -> bool:
        return True

    def restart(self, worker_id: int) -> None:
        self.cluster.restart(worker_id)

    def take_in(self, worker: Any) -> None:
        self.taken_in.append(worker.spec.worker_id)

    def die(self, worker_id: int) -> None:
        self.cluster.kill(worker_id)

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.supervisor.tick(self.supervisor._last_tick + 0.5)


def test_it_is_told_of_the_adapters(cluster: WorkerCluster) -> None:
    host = Host(cluster)
    cluster.changes.note(load("a"))
    host.die(1)
    host.tick(5)
    assert host.taken_in == [1] and cluster.local[1].spec.adapters == (load("a"),)


def test_it_is_left_out_once_weights_have_changed(cluster: WorkerCluster) -> None:
    host = Host(cluster)
    cluster.changes.note(WEIGHTS[0])
    host.die(1)
    host.tick(20)
    view = host.state.workers[1]
    assert view.state == FAILED_FOR_GOOD and not host.taken_in
    assert "UpdateWeightFromDiskReqInput" in view.reason


@pytest.mark.parametrize(("request_", "served"), [(load("a"), [1]), (WEIGHTS[0], [])])
def test_it_does_not_serve_if_the_others_change_while_it_starts(
    cluster: WorkerCluster, request_: Any, served: list[int]
) -> None:
    host = Host(cluster)
    host.die(1)
    host.tick(3)
    assert host.state.workers[1].state == RESTARTING and host.state.workers[1].incarnation == 1
    cluster.changes.note(request_)
    with pytest.raises(WorkerStartError, match="have changed"):
        cluster.poll_ready(cluster.workers[1])
    host.tick(20)
    assert host.taken_in == served
    assert not served or cluster.local[1].spec.adapters == (request_,)


def test_adapters_are_loaded_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    def handle(request: Any) -> Any:
        done.append(request)
        return SimpleNamespace(success=True)

    def construct(scheduler: Any, *args: Any) -> None:
        scheduler._request_dispatcher, scheduler._remote = handle, None

    monkeypatch.setattr(Scheduler, "__init__", construct)
    monkeypatch.setattr(scheduler_module, "pool_counters", lambda *args, **more: None)
    monkeypatch.setattr(scheduler_module, "get_parallel", lambda: SimpleNamespace(tp_rank=0))
    monkeypatch.setattr(
        scheduler_module, "start_heartbeat", lambda *args: done.append("gives signs of life")
    )
    spec: Any = SimpleNamespace(adapters=(unload("first"), load("a")))
    monkeypatch.setattr(AresScheduler, "spec", spec, raising=False)
    args: Any = None
    AresScheduler(args, args)
    assert done == [unload("first"), load("a"), "gives signs of life"]


def test_an_adapter_that_cannot_be_loaded_again_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    gone = SimpleNamespace(success=False, error_message="no such file")
    repeat([load("a")], lambda request: gone)
    assert "of a could not be repeated: no such file" in caplog.text


# --- workers of other hosts -----------------------------------------------------------------


@pytest.mark.parametrize("request_", [load("a"), WEIGHTS[0]])
def test_none_joins_once_something_has_changed(request_: Any) -> None:
    world = World()
    world.remote._changes.note(request_)
    status, document = world.join()
    assert status == 409 and "while the server ran" in document["reason"]
    assert not world.workers


def test_one_that_has_been_starting_meanwhile_is_let_go() -> None:
    world = World()
    _, admission = world.join()
    world.remote._changes.note(WEIGHTS[0])
    world.started(admission)
    (told,) = world.told(MayLeave)
    assert "while the server ran" in told.reason and world.view().state == RESTARTING
