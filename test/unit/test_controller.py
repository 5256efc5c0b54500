"""The controller's answers and routes, without processes: what goes to whom."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.ares_args import AresArgs
from sglang_ares.srt.managers.admission_queue import AdmissionQueue
from sglang_ares.srt.managers.attempts import internal_rid
from sglang_ares.srt.managers.cluster_documents import requests_document
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
from sglang_ares.srt.managers.controller import AresController
from sglang_ares.srt.managers.dispatcher import Dispatcher
from sglang_ares.srt.managers.front_desk import FrontDesk
from sglang_ares.srt.managers.io_struct import (
    ControllerInbound,
    ControlReply,
    Decoder,
    LedgerDropped,
    MigrateQuery,
    PolicyQuery,
    QueryReply,
    StartMigration,
    StatusQuery,
    WorkerInbound,
    encode,
)
from sglang_ares.srt.managers.law_keeper import LawKeeper
from sglang_ares.srt.managers.length_predictions import LengthPredictions
from sglang_ares.srt.managers.mover import Mover
from sglang_ares.srt.managers.recovery import Recovery
from sglang_ares.srt.managers.role_changes import RoleChanges
from sglang_ares.srt.managers.role_planner import RolePlanner
from sglang_ares.srt.managers.tokenizer_manager import AresTokenizerManager
from sglang_ares.srt.policy.elastic.instances import Slo
from sglang_ares.srt.policy.types import DECODE, PREFILL
from sglang_ares.srt.sampling.sample_seeds import SampleSeeds
from sglang_ares.srt.security.bounds import MAX_CLIENT_RID_CHARS, MAX_RID_CHARS
from sglang_ares.srt.security.dropped import DroppedFrames
from unit.recovery_world import request
from unit.test_cluster_state import report

P0, D1, D2 = 0, 1, 2


class Box:
    """The controller's mailbox: as the real one, an unknown peer is an error."""

    def __init__(self) -> None:
        self.peers = {"0", "1", "2"}
        self.sent: list[tuple[int, Any]] = []

    def knows(self, peer: str) -> bool:
        return peer in self.peers

    def send(self, peer: str, frame: bytes) -> None:
        if peer not in self.peers:
            raise KeyError(peer)
        self.sent.append((int(peer), Decoder(WorkerInbound).decode(frame)))


class Controller(AresController):
    """The real one, around tables only."""

    def __init__(self) -> None:
        self.state = ClusterState(
            [
                WorkerView(P0, PREFILL, pids=[], kv_capacity=1000),
                WorkerView(D1, DECODE, pids=[], kv_capacity=1000),
                WorkerView(D2, DECODE, pids=[], kv_capacity=1000),
            ]
        )
        box, front, recovery = Box(), SimpleNamespace(), SimpleNamespace()
        self.box = self._mailbox = box  # type: ignore[assignment]
        self.replies: list[tuple[int, Any]] = []
        front.socket = SimpleNamespace(send_multipart=self._keep_reply)
        self._front = front  # type: ignore[assignment]
        self.ended: list[str] = []
        recovery.on_abort = lambda owner: self.ended.append(owner.rid)
        self.recovery = recovery  # type: ignore[assignment]
        self.put: list[tuple[str, Any]] = []
        self.workers = [self._line(name) for name in ("to 0", "to 1", "to 2")]
        self.to_all: list[Any] = []
        args = AresArgs()
        predictions = LengthPredictions(use_prior=True)
        self.mover = Mover(self.state, args, 512, self.tell, predictions, now=0.0)
        self.dispatcher = Dispatcher(
            self.state,
            SimpleNamespace(),
            [],
            args.placement,
            SimpleNamespace(),
            self.tell,
            predictions,
            512,
        )
        self.dropped_ledger = DroppedFrames("ledger")
        self.answered: list[tuple[str, int | None, str]] = []
        self.waiting = AdmissionQueue(
            self.state,
            2.0,
            self.dispatcher.rooms,
            lambda owner, among: self.dispatcher.send_attempt(owner, None, among),
            self.missing_role,
            self.end,
        )
        host: Any = self
        self.roles = RoleChanges(host, self.state, None, 30.0)
        slo = Slo(ttft_ms=0.0, tpot_ms=0.0)
        self.planner = RolePlanner(
            self.state, self.roles, "static", slo, lambda: self.mover.cost, now=0.0
        )
        self.desk = FrontDesk(
            front,
            self.state,
            self.mover,
            self.dispatcher,
            self.waiting,
            predictions,
            self.roles,
            self.planner,
            LawKeeper(None),
            args,
            "/run",
            [self.dropped_ledger],
            self.tell,
        )

    def _keep_reply(self, parts: list[bytes]) -> None:
        reply = Decoder(QueryReply).decode(parts[1])
        self.replies.append((reply.status, msgspec.json.decode(reply.body)))

    def _line(self, name: str) -> Any:
        return SimpleNamespace(put=lambda obj: self.put.append((name, obj)))

    def send_control_message(self, obj: Any) -> None:
        self.to_all.append(obj)

    def end(self, owner: Ownership, status: int | None, reason: str) -> None:
        self.answered.append((owner.rid, status, reason))

    def own(self, rid: str, decode: int = D1) -> Ownership:
        owner = Ownership(rid, None, P0, decode, dispatched_at=0.0)
        self.state.note_dispatch(owner, 10)
        return owner

    def lose(self, worker_id: int, state: str = DYING) -> None:
        self.state.workers[worker_id].state = state
        self.box.peers.discard(str(worker_id))

    def migrate(self, rid: str, target: int) -> tuple[int, str] | None:
        """The refusal, if it is one."""
        self.desk.answer(b"front", MigrateQuery(query_id=1, rid=rid, target=target))
        return (self.replies[-1][0], self.replies[-1][1]["reason"]) if self.replies else None


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def sent(controller: Controller) -> list[tuple[str, Any]]:
    return controller.put


# --- requests that come in ------------------------------------------------------------------


def test_a_request_that_no_message_could_carry_is_refused_at_once(controller: Controller) -> None:
    """Its first worker would serve it; after that worker's death nobody could."""
    controller.ares_args = AresArgs()  # type: ignore[misc]
    controller._seeds = SampleSeeds()
    request = TokenizedGenerateReqInput(
        rid="r",
        input_text="x",
        input_ids=array("q", [1]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(custom_params={"a": {"b": [1]}}),
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
    controller.dispatch(request)
    ((rid, status, reason),) = controller.answered
    assert (rid, status) == ("r", 400) and "sampling_params.custom_params" in reason
    assert not controller.put


@pytest.mark.parametrize("start", ["", "HEALTH_CHECK", "ARES_PROBE"])
@pytest.mark.parametrize("batch", [False, True])
def test_a_rid_that_no_message_could_carry_is_refused_by_the_front(start: str, batch: bool) -> None:
    """Every report of a worker that names it would be dropped, with all the others it names."""
    front = AresTokenizerManager.__new__(AresTokenizerManager)
    front.rid_to_state, front.enable_trace = {}, False
    front.disaggregation_mode = DisaggregationMode.NULL
    longest = start.ljust(MAX_CLIENT_RID_CHARS, "x")
    assert len(internal_rid(longest, 10**9)) <= MAX_RID_CHARS

    def arrive(rid: str) -> None:
        text, rids = (["y", "y"], ["short", rid]) if batch else ("y", rid)
        request = GenerateReqInput(text=text, rid=rids)
        request.normalize_batch_and_arguments()
        front._init_req_state(request)

    with pytest.raises(ValueError, match="the rid is longer than 500 characters"):
        arrive(longest + "x")
    assert not front.rid_to_state
    arrive(longest)
    assert longest in front.rid_to_state


@pytest.mark.parametrize(("text", "own"), [("y", 1), (["y", "z"], 2)])
def test_rids_drawn_for_samples_leave_no_state_behind(
    monkeypatch: pytest.MonkeyPatch, text: Any, own: int
) -> None:
    """Each sample of a request with ``n`` above 1 gets another rid; upstream would remember the
    first ones for ever, and a server that is told to end would wait for them."""
    front: Any = AresTokenizerManager.__new__(AresTokenizerManager)
    front.rid_to_state, front.enable_trace = {}, False
    front.disaggregation_mode = DisaggregationMode.NULL
    request = GenerateReqInput(text=text, stream=True, sampling_params={"n": 3})
    request.normalize_batch_and_arguments()
    assert len(request.rid) > own
    front._init_req_state(request)
    assert list(front.rid_to_state) == request.rid[:own]


# --- moves on command -----------------------------------------------------------------------


def test_a_move_is_commanded_by_the_attempts_name(controller: Controller) -> None:
    controller.own("r").attempt = 2
    assert controller.migrate("r", D2) is None
    assert controller.box.sent == [(D1, StartMigration(migration_id=1, rid="r#02", target=D2))]


@pytest.mark.parametrize("state", [DYING, RESTARTING, FAILED_FOR_GOOD])
def test_a_request_of_a_dead_worker_is_not_moved(controller: Controller, state: str) -> None:
    """Its recovery has not begun: the others have not let go of the worker yet. There is nobody
    to command."""
    controller.own("r", D1)
    controller.lose(D1, state)
    assert controller.migrate("r", D2) == (
        409, "the request is being recovered from a dead worker"
    )  # fmt: skip
    assert not controller.state.moving and not controller.box.sent


def test_other_refusals(controller: Controller) -> None:
    controller.own("r")
    assert controller.migrate("nobody", D2) == (404, "no live request has the rid 'nobody'")
    assert controller.migrate("r", 9) == (404, "there is no worker 9")
    assert controller.migrate("r", P0) == (409, "worker 0 is a prefill worker")
    assert controller.migrate("r", D1) == (409, "the request is on worker 1 already")
    controller.state.note_migration_started(5, MovingRequest("r#00", D1, D2))
    assert controller.migrate("r", D2) == (409, "the request is being moved already")
    controller.state.owners["r"].recovering = True
    assert "being recovered" in controller.migrate("r", D2)[1]  # type: ignore[index]
    controller.lose(D2)
    controller.state.workers[D2].reason = "died (exit code -9)"
    assert controller.migrate("r", D2) == (409, "worker 2 is dying: died (exit code -9)")


# --- aborts ---------------------------------------------------------------------------------


def test_an_abort_goes_to_the_two_workers_of_the_request(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    owner = controller.own("r", D2)
    owner.attempt = 1
    controller.route_abort(AbortReq(rid="r"))
    assert sorted(socket for socket, _ in sent) == ["to 0", "to 2"]
    assert {abort.rid for _, abort in sent} == {"r#01"} and owner.aborted
    assert not controller.to_all


def test_an_abort_is_not_sent_to_the_dead(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    """Recovery confirms it, once the worker is buried."""
    owner = controller.own("r", D2)
    controller.lose(D2)
    controller.route_abort(AbortReq(rid="r"))
    assert [socket for socket, _ in sent] == ["to 0"] and owner.aborted


def test_the_abort_of_a_request_that_is_nowhere_is_recoverys(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    controller.own("r").recovering = True
    controller.own("other")
    controller.route_abort(AbortReq(rid="r"))
    assert controller.ended == ["r"] and not sent and not controller.to_all


def test_the_abort_of_a_moving_request_goes_to_all(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    controller.own("r")
    controller.state.note_migration_started(5, MovingRequest("r#00", D1, D2))
    controller.route_abort(AbortReq(rid="r"))
    assert [a.rid for a in controller.to_all] == ["r#00"] and not sent


def test_abort_all_reaches_workers_and_requests_that_are_nowhere(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    controller.own("a")
    controller.own("b").recovering = True
    controller.route_abort(AbortReq(abort_all=True))
    assert [a.abort_all for a in controller.to_all] == [True] and not sent
    assert controller.ended == ["b"]
    assert all(o.aborted for o in controller.state.owners.values())


def test_an_abort_of_a_stranger_is_upstreams(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    controller.own("r")
    controller.route_abort(AbortReq(rid="HEALTH_CHECK_1"))
    assert len(controller.to_all) == 1 and not sent and not controller.state.owners["r"].aborted


def test_a_request_that_waits_is_on_no_worker(
    controller: Controller, sent: list[tuple[str, Any]]
) -> None:
    """It cannot be moved, and its abort concerns no worker."""
    controller.waiting.arrive(controller.state.new_owner("r", None))
    assert controller.migrate("r", D2) == (409, "the request waits for a worker with room")
    assert [r["worker"] for r in requests_document(controller.state)] == [None]
    controller.route_abort(AbortReq(rid="r"))
    assert controller.answered == [("r", None, "aborted by the client")]
    assert not sent and not controller.to_all
    assert not controller.state.owners and not len(controller.waiting)


# --- a worker changes its role --------------------------------------------------------------


def test_what_cannot_move_is_not_handed_back(controller: Controller) -> None:
    """Its first token may have come after the last report; the fence would then find output that
    no other worker can go on from, and the client would get an error."""
    recovered: list[tuple[list[str], str]] = []
    controller.recovery.recover = lambda owners, reason: recovered.append(  # type: ignore[method-assign]
        ([owner.rid for owner in owners], reason)
    )
    controller.ares_args = AresArgs()  # type: ignore[misc]
    movable, immovable = controller.own("movable"), controller.own("immovable")
    movable.request = request()
    immovable.request = request(custom_logit_processor="a function")
    controller.hand_back(D1)
    assert recovered == [(["movable"], "worker 1 changes its role")]
    assert (movable.handed_back, immovable.handed_back) == (1, 0)


# --- what can be served ---------------------------------------------------------------------


def test_a_role_is_missing_when_all_of_it_is_given_up(controller: Controller) -> None:
    for state in (READY, DYING, RESTARTING):
        controller.state.workers[D1].state = FAILED_FOR_GOOD
        controller.state.workers[D2].state = state
        assert controller.missing_role() is None
    for worker_id in (D1, D2):
        controller.state.workers[worker_id].state = FAILED_FOR_GOOD
        controller.state.workers[worker_id].reason = "died (exit code -9)"
    assert controller.missing_role() == (
        "no decode worker is left: worker 1 died (exit code -9); worker 2 died (exit code -9)"
    )


# --- workers that go ------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "lost"), [(False, [D1]), (True, [])])
def test_metrics_forget_a_worker_that_died_or_left(
    controller: Controller, monkeypatch: pytest.MonkeyPatch, left: bool, lost: list[int]
) -> None:
    told: dict[str, list[int]] = {"lost": [], "gone": []}
    host: Any = controller
    host.metrics = SimpleNamespace(
        worker_lost=lambda worker, role: told["lost"].append(worker),
        worker_gone=lambda worker, role: told["gone"].append(worker),
    )
    host.cluster = SimpleNamespace(workers=[SimpleNamespace(left=left)] * 3)
    host.status, host._active_workers = [True] * 3, [P0, D1, D2]
    host._mailbox.disconnect = controller.box.peers.discard
    for line in controller.workers:
        monkeypatch.setattr(line, "close", lambda: None, raising=False)
    monkeypatch.setattr(controller, "_tell_front_who_serves", lambda: None)
    controller.leave_out(D1)
    assert told == {"lost": lost, "gone": [D1]} and controller.status == [True, False, True]


def test_the_late_report_of_a_worker_that_is_gone_is_not_measured(controller: Controller) -> None:
    host: Any = controller
    host._from_workers, host.dropped = Decoder(ControllerInbound), None
    measured: list[Any] = []
    host.metrics = SimpleNamespace(reported=measured.append)
    controller.lose(D1)
    host._on_worker_message(encode(report(D1)))
    assert not measured


def test_a_move_whose_source_died_has_failed_for_whoever_counts_or_waits(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[str, str, str]] = []
    host: Any = controller
    host.metrics = SimpleNamespace(
        migrated=lambda result, cause: counted.append((cause, result.outcome, result.reason))
    )
    host.recovery = Recovery(host, controller.state, max_attempts=3)
    monkeypatch.setattr(controller.waiting, "cluster_changed", lambda: None)
    controller.own("r")
    controller.own("of another", D2)
    controller.migrate("r", D2)
    controller.migrate("of another", D1)
    controller.lose(D1, RESTARTING)
    controller.on_worker_dead(D1)
    assert counted == [("manual", "failed", "source died")]
    assert controller.state.migrations.document(1)["failed"] == {"source died": 1}
    ((status, body),) = controller.replies
    assert (status, body["outcome"], body["reason"]) == (409, "failed", "source died")
    assert [m.rid for m in controller.state.moving.values()] == ["of another#00"]


def test_what_the_ledger_does_not_let_in_is_shown(controller: Controller) -> None:
    counted: list[tuple[str, int]] = []
    host: Any = controller
    host._from_workers, host.dropped = Decoder(ControllerInbound), None
    host.metrics = SimpleNamespace(dropped=lambda *of: counted.append(of))
    for total in (3, 5):
        host._on_worker_message(encode(LedgerDropped(dropped_frames=total)))
    controller.desk.answer(b"front", StatusQuery(query_id=1))
    assert controller.replies[-1][1]["dropped_frames"] == {"ledger": 5}
    assert counted == [("ledger", 3), ("ledger", 5)]


# --- policies -------------------------------------------------------------------------------


def use(
    controller: Controller, placement: str, rescheduling: str, admission: str = ""
) -> tuple[int, Any]:
    query = PolicyQuery(
        query_id=1, placement=placement, rescheduling=rescheduling, admission=admission
    )
    controller.desk.answer(b"front", query)
    return controller.replies[-1]


def test_policies_change_while_the_cluster_serves() -> None:
    controller = Controller()
    assert use(controller, "round_robin", "none") == (
        200,
        {"placement": "round_robin", "admission": "worker", "rescheduling": "none"},
    )
    assert [controller.dispatcher.choose(1) for _ in range(3)] == [(P0, D1), (P0, D2), (P0, D1)]
    assert use(controller, "", "reactive", "slo")[1] == {
        "placement": "round_robin",
        "admission": "slo",
        "rescheduling": "reactive",
    }


def test_an_unknown_policy_changes_nothing() -> None:
    controller = Controller()
    before = use(controller, "", "")[1]
    for name in ("nobodys", "oracle"):  # the oracle is for the simulator only
        status, body = use(controller, "round_robin", name)
        assert status == 400
        assert name in body["reason"] and "reactive" in body["reason"]
    status, body = use(controller, "round_robin", "reactive", "nobodys")
    assert status == 400 and "nobodys" in body["reason"] and "slo" in body["reason"]
    assert use(controller, "", "")[1] == before


def test_an_answer_from_another_host_that_is_none_is_counted_and_dropped() -> None:
    dropped = DroppedFrames("controller")
    host: Any = SimpleNamespace(
        _from_workers=Decoder(ControllerInbound),
        _decode=lambda decoder, frame, of: decoder.decode(frame),
        state=ClusterState([]),
        dropped=dropped,
    )
    AresController._on_worker_message(host, encode(ControlReply(worker_id=0, body=b"\0")))
    assert dropped.total == 1
