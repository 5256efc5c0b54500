"""Workers on other hosts, as the controller's side sees them: who may join, who is gone, who comes
back as whom. The supervisor is the real one; time is ours."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.server_args import ServerArgs

from sglang_ares.ares_args import AresArgs
from sglang_ares.engine import default_server_args
from sglang_ares.srt.managers.cluster import admission_of, migration_limits
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import (
    FAILED_FOR_GOOD,
    LEFT,
    READY,
    RESTARTING,
    Ownership,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    Decoder,
    EndWorker,
    HostBeat,
    HostInbound,
    HostLeaving,
    JoinQuery,
    Lease,
    MayLeave,
    WorkerEnded,
    WorkerStarted,
)
from sglang_ares.srt.managers.lease import LeaseTimes
from sglang_ares.srt.managers.remote_workers import (
    Admission,
    RemoteWorker,
    RemoteWorkers,
    view_of,
)
from sglang_ares.srt.managers.supervisor import Supervisor
from sglang_ares.srt.managers.worker_host import HostConfig, WorkerHost
from sglang_ares.srt.predictor.start import SHIPPED_HEAD

TIMEOUT = 5.0
EXPIRY = LeaseTimes.of(TIMEOUT).expiry_s
ADMISSION = Admission(
    worker_id=0,
    incarnation=0,
    controller_endpoint="tcp://10.0.0.5:31001",
    outputs_endpoint="tcp://10.0.0.5:31005",
    report_interval_s=0.2,
    worker_timeout_s=TIMEOUT,
    start_timeout_s=60.0,
    limits=migration_limits(AresArgs()),
    decode_radix_cache=True,
    predictor="auto",
    predictor_correction=True,
    fault_injection=False,
    cluster_size=1,
)


class Box:
    """The mailbox: what hosts were told, and whose connection was lost."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.broken: list[str] = []

    def connect(self, peer: str, endpoint: str, *, watch: bool = False) -> None:
        assert endpoint.startswith("tcp://")

    def send(self, peer: str, frame: bytes) -> None:
        self.told.append((peer, Decoder(HostInbound).decode(frame)))

    def lost(self) -> list[str]:
        broken, self.broken = self.broken, []
        return broken


class World:
    """A cluster of remote workers only; the supervisor's host, too."""

    def __init__(self, max_restarts: int = 3) -> None:
        self.now = 1000.0
        self.workers: list[Any] = []
        self.state = ClusterState([])
        self.box = Box()
        self.events: list[tuple[str, int]] = []
        self.unsettled: set[int] = set()
        cluster: Any = self
        self.supervisor = Supervisor(self, cluster, self.state, TIMEOUT, max_restarts, self.now)
        box: Any = self.box
        self.remote = RemoteWorkers(
            box, self.supervisor, self.state, self.workers, {"--dtype": "x"}, ADMISSION, 100,
            self.enlist, lambda: self.now,
        )  # fmt: skip

    def enlist(self, worker: RemoteWorker) -> None:
        self.workers.append(worker)
        self.state.workers[worker.spec.worker_id] = view_of(worker)

    # The cluster, as the supervisor uses it.

    def kill(self, worker_id: int) -> None:
        self.workers[worker_id].kill()

    def poll_ready(self, worker: RemoteWorker) -> bool:
        return worker.poll_ready()

    # The supervisor's host.

    def leave_out(self, worker_id: int) -> None:
        self.events.append(("left out", worker_id))

    def on_worker_dead(self, worker_id: int) -> None:
        assert self.workers[worker_id].gone, "it could still write"
        self.events.append(("dead", worker_id))

    def settled(self, worker_id: int) -> bool:
        return worker_id not in self.unsettled

    def restart(self, worker_id: int) -> None:
        worker = self.workers[worker_id]
        worker.open(worker.spec.incarnation + 1)

    def take_in(self, worker: Any) -> None:
        self.events.append(("taken in", worker.spec.worker_id))

    # What hosts do.

    def join(self, host: str = "h1", role: str = "decode", dtype: str = "x") -> tuple[int, Any]:
        return self.remote.answer(
            JoinQuery(
                query_id=1,
                host_id=host,
                role=role,
                host=f"10.0.0.{host[-1]}",
                mailbox=f"tcp://10.0.0.{host[-1]}:4000",
                settings={"--dtype": dtype},
            )
        )

    def started(self, admission: Admission, most: int = 100) -> None:
        self.remote.on_message(
            WorkerStarted(
                worker_id=admission.worker_id,
                incarnation=admission.incarnation,
                pids=[77],
                kv_capacity=4096,
                max_input_tokens=most,
                control_endpoint="tcp://10.0.0.1:4003",
                bootstrap_host="10.0.0.1",
                bootstrap_port=4001,
            )
        )
        self.tick()

    def ready(self, host: str = "h1", role: str = "decode") -> Admission:
        status, admission = self.join(host, role)
        assert status == 200, admission
        self.started(admission)
        assert self.view(admission.worker_id).state == READY
        result: Admission = admission
        return result

    def beat(self, admission: Admission, number: int = 1) -> None:
        ids = {"worker_id": admission.worker_id, "incarnation": admission.incarnation}
        self.remote.on_message(HostBeat(**ids, beat=number))
        self.supervisor.on_heartbeat(*ids.values(), 0, self.now)

    def ended(self, admission: Admission, reason: str = "died", *, leaves: bool = False) -> None:
        self.remote.on_message(
            WorkerEnded(
                worker_id=admission.worker_id,
                incarnation=admission.incarnation,
                reason=reason,
                leaves=leaves,
            )
        )

    def tick(self, seconds: float = 0.0, times: int = 3) -> None:
        self.now += seconds
        self.supervisor._last_tick = self.now  # the controller itself has not been paused
        for _ in range(times):
            self.supervisor.tick(self.now)
            self.remote.tick()

    def view(self, worker_id: int = 0) -> WorkerView:
        return self.state.workers[worker_id]

    def told(self, kind: type) -> list[Any]:
        return [message for _, message in self.box.told if isinstance(message, kind)]


def test_a_host_joins_and_its_worker_serves() -> None:
    world = World()
    status, admission = world.join()
    assert status == 200 and admission.worker_id == 0 and admission.incarnation == 0
    assert world.view().state == RESTARTING and world.view().host == "10.0.0.1"
    assert world.join() == (200, admission), "the answer may have got lost"
    world.started(admission)
    assert world.view().state == READY and world.events == [("taken in", 0)]
    assert world.view().kv_capacity == 4096 and world.workers[0].peer.bootstrap_port == 4001
    assert world.ready("h2", "prefill").worker_id == 1


def test_other_settings_are_refused_with_the_difference() -> None:
    world = World()
    status, answer = world.join(dtype="y")
    assert status == 409 and "--dtype is y there and x in the cluster" in answer["reason"]
    assert not world.workers
    world.ready()
    assert world.join(role="prefill")[0] == 409


def test_a_worker_that_takes_shorter_inputs_is_let_go() -> None:
    world = World()
    _, admission = world.join()
    world.started(admission, most=99)
    assert world.view().state == RESTARTING
    (answer,) = world.told(MayLeave)
    assert "--max-total-tokens" in answer.reason


def test_a_lease_is_renewed_while_the_host_asks() -> None:
    world = World()
    admission = world.ready()
    for number in range(20):
        world.tick(1.0)
        world.beat(admission, number)
    assert [lease.beat for lease in world.told(Lease)] == list(range(20))
    assert world.view().state == READY


def test_a_silent_host_is_gone_only_when_its_lease_is_over() -> None:
    world = World()
    admission = world.ready()
    world.beat(admission)
    world.tick(TIMEOUT + 0.1)
    assert world.events[-1] == ("left out", 0) and world.told(EndWorker), "nothing is freed yet"
    world.beat(admission, 2)
    world.tick(EXPIRY - TIMEOUT)
    assert world.events[-1] == ("left out", 0), "it was heard: its lease was renewed"
    world.tick(EXPIRY)
    assert world.events[-1] == ("dead", 0)
    assert world.view().state == FAILED_FOR_GOOD and "cannot be reached" in world.view().reason
    world.beat(admission, 3)
    assert [lease.beat for lease in world.told(Lease)] == [1, 2], "too late"


def test_it_comes_back_as_the_same_worker() -> None:
    world = World()
    admission = world.ready()
    world.ended(admission, "died (exit code -9)")
    world.tick()
    assert world.events[-1] == ("dead", 0) and world.view().state == RESTARTING
    status, again = world.join()
    assert status == 200 and (again.worker_id, again.incarnation) == (0, 1)
    world.started(admission)
    assert world.view().state == RESTARTING, "the former worker's words are void"
    world.started(again)
    assert world.view().state == READY and world.view().incarnation == 1


def test_it_joins_again_in_the_role_its_host_starts_it_in() -> None:
    """It may have changed its role since."""
    world = World()
    admission = world.ready()
    worker = world.workers[0]
    worker.spec = dataclasses.replace(worker.spec, role="prefill")
    world.ended(admission)
    world.tick()
    status, again = world.join()
    assert status == 200 and again.incarnation == 1 and worker.spec.role == "decode"


def test_it_may_not_come_back_before_the_others_have_let_go() -> None:
    world = World()
    admission = world.ready()
    world.unsettled.add(0)
    world.ended(admission)
    world.tick()
    assert world.join()[0] == 503
    world.unsettled.clear()
    world.tick()
    assert world.join()[0] == 200


def test_a_join_tells_that_the_former_worker_is_gone() -> None:
    """The report of its end may come later, or never."""
    world = World()
    world.ready()
    assert world.join()[0] == 503
    world.tick()
    assert ("dead", 0) in world.events
    assert world.join()[1].incarnation == 1


def test_a_host_that_was_out_of_reach_joins_again() -> None:
    world = World()
    admission = world.ready()
    world.tick(TIMEOUT + 0.1)
    world.tick(EXPIRY)
    assert world.view().state == FAILED_FOR_GOOD
    world.ended(admission, "lost the controller, and with it its lease")
    world.unsettled.add(0)
    assert world.join()[0] == 503 and world.join()[0] == 503
    world.unsettled.clear()
    assert world.join()[0] == 503
    world.tick()
    status, again = world.join()
    assert status == 200 and (again.worker_id, again.incarnation) == (0, 1)
    assert len(world.workers) == 1


def test_another_host_takes_the_place_of_one_that_is_gone() -> None:
    world = World()
    world.ready()
    world.tick(TIMEOUT + 0.1)
    world.tick(EXPIRY)
    assert world.join("h2")[0] == 503
    world.tick()
    admission = world.ready("h2")
    assert admission.worker_id == 0 and world.view().host == "10.0.0.2"
    assert world.ready("h1").worker_id == 1, "the first one gets a new place"


def test_a_worker_that_dies_again_and_again_is_not_taken_back() -> None:
    world = World(max_restarts=1)
    for _ in range(2):
        world.ended(world.ready())
        world.tick()
    assert world.view().state == FAILED_FOR_GOOD
    status, answer = world.join()
    assert status == 409 and "--ares-max-restarts" in answer["reason"]


def test_a_lost_connection_ends_it() -> None:
    world = World()
    world.ready()
    world.box.broken = ["0"]
    world.tick()
    assert world.told(EndWorker) and "lost its connection" in world.view().reason


def test_a_host_leaves_when_its_worker_is_empty() -> None:
    world = World()
    admission = world.ready()
    world.state.owners["r"] = Ownership("r", None, 0, 0, 0.0)
    world.remote.on_message(HostLeaving(worker_id=0, incarnation=0))
    world.tick()
    assert world.view().draining and not world.told(MayLeave)
    del world.state.owners["r"]
    world.tick()
    assert len(world.told(MayLeave)) == 1
    world.ended(admission, "left", leaves=True)
    world.tick()
    assert world.view().state == LEFT and world.events[-1] == ("dead", 0)
    assert world.join()[0] == 503
    world.tick()
    assert world.ready().incarnation == 1 and not world.view().draining


def test_all_are_let_go_when_the_server_ends() -> None:
    world = World()
    world.ready()
    world.remote.server_ends()
    assert [m.reason for m in world.told(MayLeave)] == ["the server ends"]


@pytest.mark.parametrize("worker_id,incarnation", [(0, 7), (5, 0)])
def test_strange_reports_are_of_no_interest(worker_id: int, incarnation: int) -> None:
    world = World()
    world.ready()
    world.remote.on_message(
        WorkerEnded(worker_id=worker_id, incarnation=incarnation, reason="", leaves=True)
    )
    world.tick()
    assert world.view().state == READY


def test_requests_that_ended_on_a_lost_host_are_asked_about() -> None:
    state = ClusterState(
        [WorkerView(2, "decode", pids=[], kv_capacity=1, host="10.0.0.1")],
    )
    for rid, aborted in (("a", False), ("b", True), ("c", False)):
        owner = Ownership(rid, None, 0, 2, 0.0, aborted=aborted)
        state.owners[rid] = owner
        state._remember_ended(owner)
        state.forget(rid)
    state.owners["c"] = Ownership("c", None, 0, 2, 0.0, 1, 1)
    state.take_back_ended(7)
    assert set(state.owners) == {"c"}
    state.take_back_ended(2)
    assert set(state.owners) == {"a", "c"} and state.owners["c"].attempt == 1


# --- on the host ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "hosts", "runs"),
    [
        ("auto", "auto", str(SHIPPED_HEAD)),
        ("auto", "/heads/mine", "/heads/mine"),
        ("auto", "off", ""),
        ("/heads/servers", "/heads/mine", "/heads/mine"),
        ("off", "auto", ""),
        ("off", "/heads/mine", ""),
    ],
)
@pytest.mark.parametrize("correction", [True, False])
def test_a_joined_worker_predicts_as_the_server_wants_with_the_head_of_its_host(
    servers: str, hosts: str, runs: str, correction: bool
) -> None:
    args = AresArgs(predictor=servers, predictor_correction=correction)
    endpoint = SimpleNamespace(connect="tcp://10.0.0.5:31001")
    control: Any = SimpleNamespace(controller=endpoint, outputs=endpoint)
    admission = admission_of(args, control)
    assert admission is not None
    told = msgspec.convert(msgspec.to_builtins(admission), Admission)
    config = HostConfig("tcp://127.0.0.1:31000", "decode", "127.0.0.1", 0, 60.0, None, hosts)
    host = WorkerHost(ServerArgs(**default_server_args()), config)
    try:
        spec = host._worker(told).spec
    finally:
        host.close()
    assert (spec.predictor, spec.correct_drift) == (runs, correction)


def test_a_host_without_the_servers_head_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = HostConfig("tcp://127.0.0.1:31000", "decode", "127.0.0.1", 0, 60.0, None)
    host = WorkerHost(ServerArgs(**default_server_args()), config)
    try:
        host._worker(ADMISSION)
        assert not caplog.records
        host._worker(msgspec.structs.replace(ADMISSION, predictor="/heads/servers"))
    finally:
        host.close()
    assert "/heads/servers" in caplog.text and "--ares-predictor" in caplog.text
