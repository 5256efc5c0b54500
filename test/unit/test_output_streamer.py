"""What a worker says to the client, and what it tells the controller instead."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.profiles.laws import NO_LAWS
from sglang_ares.srt.managers import worker_agent
from sglang_ares.srt.managers.io_struct import (
    ControllerInbound,
    Decoder,
    Message,
    RequestFailed,
    encode,
)
from sglang_ares.srt.managers.output_streamer import (
    KV_FAILURES,
    AresOutputStreamer,
    TokenizerEcho,
    has_news,
    kv_failure,
)
from sglang_ares.srt.managers.worker_agent import WorkerAgent
from sglang_ares.srt.security.bounds import MAX_REASON_CHARS

FAILED = "Decode transfer failed for request rank=0 rid='r#00'\nwith exception …"


class Agent(WorkerAgent):
    """The real one, without sockets; what it reports is kept."""

    def __init__(self) -> None:
        spec: Any = SimpleNamespace(
            worker_id=3,
            role="decode",
            incarnation=0,
            report_interval_s=1.0,
            tells_of_room=True,
            laws=NO_LAWS,
            outputs_endpoint=None,
        )
        super().__init__(spec, speaks=False)
        self.reports: list[Message] = []

    def report(self, message: Message) -> None:
        self.reports.append(message)


class Told:
    """What went to the detokenizer, and on which terms."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], bool, Any]] = []

    @property
    def rids(self) -> list[str]:
        return [rid for rids, _, _ in self.calls for rid in rids]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    agent = Agent()
    monkeypatch.setattr(AresOutputStreamer, "agent", agent, raising=False)
    return agent


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()

    def stream_output(self: Any, reqs: Any, return_logprob: bool, skip_req: Any = None) -> None:
        told.calls.append(([r.rid for r in reqs], return_logprob, skip_req))

    monkeypatch.setattr(SchedulerOutputStreamer, "stream_output", stream_output)
    return told


def new_req(rid: str = "r#00", output: int = 2, sent: int = 0, reason: Any = None) -> Req:
    req = Req(rid, "", array("q", [1, 2]), SamplingParams(max_new_tokens=9))
    req.output_ids = array("q", range(output))
    req.send_token_offset = sent
    req.finished_reason = reason
    return req


def stream(mode: DisaggregationMode, *reqs: Req, skip: Any = None) -> None:
    streamer: Any = object.__new__(AresOutputStreamer)
    object.__setattr__(streamer, "disaggregation_mode", mode)
    streamer.stream_output(list(reqs), True, skip)


PREFILL, DECODE = DisaggregationMode.PREFILL, DisaggregationMode.DECODE
BOTH = pytest.mark.parametrize("mode", [PREFILL, DECODE])


# --- what is a failed transfer --------------------------------------------------------------


@pytest.mark.parametrize("beginning", KV_FAILURES)
def test_a_failed_transfer_is_known_by_its_beginning(beginning: str) -> None:
    req = new_req(reason=FINISH_ABORT(f"{beginning} for request\nTraceback …", 500))
    assert kv_failure(req) == f"{beginning} for request", "one line, for the log"


@pytest.mark.parametrize(
    "reason",
    [
        None,
        FINISH_LENGTH(3),
        FINISH_ABORT(),
        FINISH_ABORT("the input is too long"),
        FINISH_ABORT("Oh: Decode transfer failed"),
    ],
    ids=repr,
)
def test_anything_else_is_the_requests_own_affair(reason: Any) -> None:
    assert kv_failure(new_req(reason=reason)) is None


# --- the decode worker ----------------------------------------------------------------------


def test_news_are_streamed_and_silence_is_not(agent: Agent, told: Told) -> None:
    news, landed = new_req("news#00", 3, 2), new_req("landed#00", 3, 3)
    assert has_news(news) and not has_news(landed)
    skip = object()
    stream(DECODE, news, landed, skip=skip)
    assert told.calls == [(["news#00"], True, skip)]


def test_the_lengths_of_what_came_to_its_end_are_noted_once(
    agent: Agent, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of clients' requests, that is, and of those that nobody aborted."""
    lengths: list[int] = []
    monkeypatch.setattr(agent, "note_ended", lengths.append)
    ended, aborted = new_req(output=7, reason=FINISH_LENGTH(7)), new_req(reason=FINISH_ABORT())
    probe = new_req(f"{HEALTH_CHECK_RID_PREFIX}_1", 1, reason=FINISH_LENGTH(1))
    stream(DECODE, ended, aborted, probe, new_req("running#00", 3))
    ended.finished_output = True
    stream(DECODE, ended)
    assert lengths == [7]


def test_the_load_is_told_soon_after_an_end(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for ends that follow each other closely; never where nobody waits for room."""
    scheduler: Any = SimpleNamespace()
    now = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(worker_agent, "time", clock)
    updates: list[float] = []
    monkeypatch.setattr(agent, "speaks", True)
    monkeypatch.setattr(agent, "_load", lambda *of: None)
    monkeypatch.setattr(agent, "report", lambda message: updates.append(now[0]))
    for now[0], ended in (
        (100.0, False),
        (100.1, True),
        (100.15, True),
        (100.19, False),
        (100.21, False),
    ):
        if ended:
            agent.note_ended(7)
        agent.tell_of_room(scheduler)
    assert updates == [100.1, 100.21]
    agent._tells_of_room = False
    now[0] = 200.0
    agent.note_ended(7)
    agent.tell_of_room(scheduler)
    assert len(updates) == 2


def test_an_end_without_a_token_is_streamed(agent: Agent, told: Told) -> None:
    stream(DECODE, new_req(output=3, sent=3, reason=FINISH_LENGTH(3)))
    assert told.rids == ["r#00"]


def test_nothing_to_say_is_no_message(agent: Agent, told: Told) -> None:
    stream(DECODE)
    stream(DECODE, new_req(output=3, sent=3))
    assert not told.calls


# --- the prefill worker ---------------------------------------------------------------------


def test_a_prefill_worker_streams_errors_only(agent: Agent, told: Told) -> None:
    stream(
        PREFILL,
        new_req("first-token#00", 1),
        new_req("only-one#00", 1, reason=FINISH_LENGTH(1)),
        new_req("too-long#00", 0, reason=FINISH_ABORT("the input is too long", 400)),
    )
    assert told.rids == ["too-long#00"] and not agent.reports


# --- both -----------------------------------------------------------------------------------


@BOTH
def test_a_failed_transfer_is_told_to_the_controller_only(
    mode: DisaggregationMode, agent: Agent, told: Told
) -> None:
    stream(mode, new_req(reason=FINISH_ABORT(FAILED, 500)))
    assert not told.calls
    assert agent.reports == [RequestFailed(rid="r#00", worker_id=3, reason=FAILED.splitlines()[0])]
    assert agent.is_void("r#00")


@BOTH
def test_a_long_error_is_told_as_far_as_the_message_may_say_it(
    mode: DisaggregationMode, agent: Agent, told: Told
) -> None:
    """The controller drops what is longer, and with it the request."""
    stream(mode, new_req(reason=FINISH_ABORT("Decode transfer failed " + "x" * 5000, 500)))
    heard = Decoder(ControllerInbound).decode(encode(*agent.reports))
    assert heard.reason == "Decode transfer failed ".ljust(MAX_REASON_CHARS, "x")


@BOTH
def test_it_is_told_once(mode: DisaggregationMode, agent: Agent, told: Told) -> None:
    for _ in range(3):
        stream(mode, new_req(reason=FINISH_ABORT(FAILED, 500)))
    assert len(agent.reports) == 1 and not told.calls


@BOTH
def test_a_void_attempt_says_nothing_to_anybody(
    mode: DisaggregationMode, agent: Agent, told: Told
) -> None:
    agent.note_void("r#00")
    stream(
        mode,
        new_req(),
        new_req(reason=FINISH_LENGTH(2)),
        new_req(reason=FINISH_ABORT("Aborted")),
        new_req(reason=FINISH_ABORT(FAILED, 500)),
    )
    assert not told.calls and not agent.reports


@BOTH
def test_the_next_attempt_is_heard(mode: DisaggregationMode, agent: Agent, told: Told) -> None:
    agent.note_void("r#00")
    stream(mode, new_req("r#01", reason=FINISH_ABORT("the input is too long")))
    assert told.rids == ["r#01"]


@BOTH
def test_a_client_that_has_left_gets_the_end_not_another_attempt(
    mode: DisaggregationMode, agent: Agent, told: Told
) -> None:
    """Its abort is why the transfer failed; the front waits for the confirmation."""
    agent.note_aborted("r#00")
    stream(mode, new_req(reason=FINISH_ABORT(FAILED, 500)))
    assert told.rids == ["r#00"] and not agent.reports


@BOTH
def test_neighbours_of_a_failed_request_are_heard(
    mode: DisaggregationMode, agent: Agent, told: Told
) -> None:
    error = FINISH_ABORT("the input is too long")
    stream(
        mode,
        new_req("a#00", reason=error),
        new_req("bad#00", reason=FINISH_ABORT(FAILED, 500)),
        new_req("b#02", reason=error),
    )
    assert told.rids == ["a#00", "b#02"] and len(agent.reports) == 1


# --- confirmations of aborts ----------------------------------------------------------------


class Sender:
    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any]] = []

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        self.sent.append((output, recv_obj))


@pytest.fixture
def sender() -> Sender:
    return Sender()


@pytest.fixture
def echo(agent: Agent, sender: Sender) -> TokenizerEcho:
    line: Any = sender
    return TokenizerEcho(line, agent)


def test_an_abort_is_confirmed_under_the_clients_rid(echo: TokenizerEcho, sender: Sender) -> None:
    req = object()
    echo.send_output(AbortReq(rid="r#07"), req)
    ((sent, recv_obj),) = sender.sent
    assert sent.rid == "r" and recv_obj is req


def test_the_abort_of_a_void_attempt_is_not(
    echo: TokenizerEcho, sender: Sender, agent: Agent
) -> None:
    """``Discard`` aborts it; its successor runs, and the client must not take this for the end."""
    agent.note_void("r#00")
    echo.send_output(AbortReq(rid="r#00"))
    assert not sender.sent
    echo.send_output(AbortReq(rid="r#01"))
    assert [o.rid for o, _ in sender.sent] == ["r"]


@pytest.mark.parametrize("output", [AbortReq(abort_all=True), SimpleNamespace(rid="r#00")])
def test_everything_else_passes_as_it_is(echo: TokenizerEcho, sender: Sender, output: Any) -> None:
    before = output.rid
    echo.send_output(output)
    assert sender.sent == [(output, None)] and output.rid == before
