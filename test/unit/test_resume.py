"""A request that goes on from tokens a dead worker had emitted, on upstream's own ``Req``."""

from __future__ import annotations

from array import array
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.disaggregation.checks import WorkerFacts, resume_fault
from sglang_ares.srt.disaggregation.request_state import (
    _LOGPROB_ATTRIBUTES,
    pack_ids,
    recompute_input,
    rewind,
)
from sglang_ares.srt.disaggregation.resume import ResumedRequests
from sglang_ares.srt.managers.dispatcher import resume_message
from sglang_ares.srt.managers.io_struct import Decoder, EmittedTokens, WorkerInbound, encode
from sglang_ares.srt.managers.scheduler import AresScheduler
from sglang_ares.srt.security.dropped import DroppedFrames

PROMPT = [5, 6, 7, 8, 9, 10, 11]
OUTPUT = [21, 22, 23, 24]
THINK_END = [98, 99]


def tokenized(**changes: Any) -> TokenizedGenerateReqInput:
    fields: dict[str, Any] = {
        "rid": "r#01",
        "input_text": "a prompt",
        "input_ids": array("q", PROMPT),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(max_new_tokens=50, temperature=0.7, sampling_seed=99),
        "return_logprob": True,
        "logprob_start_len": 2,
        "top_logprobs_num": 3,
        "token_ids_logprob": [9],
        "stream": True,
        "bootstrap_host": "10.0.0.1",
        "bootstrap_port": 4000,
        "bootstrap_room": 2**61,
    }
    return TokenizedGenerateReqInput(**(fields | changes))


def new_req(recv_req: TokenizedGenerateReqInput | None = None) -> Req:
    recv_req = recv_req or tokenized()
    return Req(
        recv_req.rid,
        recv_req.input_text,
        recv_req.input_ids,
        recv_req.sampling_params,
        return_logprob=recv_req.return_logprob,
        top_logprobs_num=recv_req.top_logprobs_num,
        token_ids_logprob=recv_req.token_ids_logprob,
        stream=recv_req.stream,
        bootstrap_host=recv_req.bootstrap_host,
        bootstrap_port=recv_req.bootstrap_port,
        bootstrap_room=recv_req.bootstrap_room,
        require_reasoning=recv_req.require_reasoning,
    )


def kv_arrives(req: Req) -> None:
    """What upstream's transfer queue does with the remembered token."""
    assert req.pd_rebootstrap_forced_output_id is not None
    req.output_ids.append(req.pd_rebootstrap_forced_output_id)
    req.pd_rebootstrap_forced_output_id = None


def stream_step(req: Req, token: int) -> tuple[list[int], list[int], int, int]:
    """One more token, and what upstream's streamer would send of it."""
    req.output_ids.append(token)
    news = list(req.output_ids[req.send_token_offset :])
    req.send_token_offset = len(req.output_ids)
    ids, read_offset = req.init_incremental_detokenize()
    text = list(ids[req.send_decode_id_offset :])
    req.send_decode_id_offset = len(ids)
    return news, text, read_offset, len(req.output_ids)


# --- rewind ---------------------------------------------------------------------------------


@given(output=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30))
def test_the_stream_goes_on_as_if_nothing_had_happened(output: list[int]) -> None:
    stays, resumed = new_req(), new_req()
    for token in output:
        stream_step(stays, token)
    rewind(resumed, pack_ids(output))
    kv_arrives(resumed)
    assert resumed.output_ids == stays.output_ids
    for name in ("send_token_offset", "send_decode_id_offset", "surr_offset", "read_offset",
                 "surr_and_decode_ids", "cur_decode_ids_len", "seqlen"):  # fmt: skip
        assert getattr(resumed, name) == getattr(stays, name), name
    for token in (40, 41, 42):
        assert stream_step(resumed, token) == stream_step(stays, token)


def test_the_last_token_waits_for_the_kv_of_those_before_it() -> None:
    req = new_req()
    rewind(req, pack_ids(OUTPUT))
    assert list(req.output_ids) == OUTPUT[:-1] and req.output_ids.typecode == "q"
    assert req.pd_rebootstrap_forced_output_id == OUTPUT[-1]
    assert req.pd_rebootstrap_in_progress
    assert req.seqlen == len(PROMPT) + len(OUTPUT) - 1, "so much KV is computed anew"
    assert not req.finished()


def test_one_token_only() -> None:
    req = new_req()
    rewind(req, pack_ids([21]))
    assert not req.output_ids and req.pd_rebootstrap_forced_output_id == 21


def test_logprobs_that_went_out_are_not_sent_again() -> None:
    req = new_req()
    rewind(req, pack_ids(OUTPUT))
    assert req.send_output_token_logprobs_offset == len(OUTPUT)
    for name in _LOGPROB_ATTRIBUTES:
        assert len(getattr(req.logprob, name)) == len(OUTPUT), name
    req.logprob.output_token_logprobs_val.append(-0.5)
    assert req.logprob.output_token_logprobs_val[len(OUTPUT) :] == [-0.5]
    assert all(isinstance(v, float) for v in req.logprob.output_token_logprobs_val)


def test_without_logprobs_there_are_none() -> None:
    req = new_req(tokenized(return_logprob=False, top_logprobs_num=0, token_ids_logprob=None))
    before = {name: getattr(req.logprob, name) for name in _LOGPROB_ATTRIBUTES}
    rewind(req, pack_ids(OUTPUT))
    assert {name: getattr(req.logprob, name) for name in _LOGPROB_ATTRIBUTES} == before


def test_the_grammar_has_seen_all_output_once() -> None:
    accepted: list[int] = []
    req = new_req()
    req.grammar = SimpleNamespace(accept_token=accepted.append)
    rewind(req, pack_ids(OUTPUT))
    assert accepted == OUTPUT


# --- what the workers are sent --------------------------------------------------------------


def test_the_prefill_worker_computes_all_but_the_last_token() -> None:
    attempt = tokenized()
    sent = recompute_input(attempt, array("q", OUTPUT))
    assert list(sent.input_ids) == PROMPT + OUTPUT[:-1] and sent.input_ids.typecode == "q"
    params = sent.sampling_params
    assert (params.max_new_tokens, params.ignore_eos) == (1, True)
    assert params.sampling_seed == 99
    assert not (sent.return_logprob or sent.stream or sent.top_logprobs_num)
    assert sent.logprob_start_len == -1 and sent.token_ids_logprob is None
    assert (sent.rid, sent.bootstrap_host, sent.bootstrap_port, sent.bootstrap_room) == (
        "r#01", "10.0.0.1", 4000, 2**61
    )  # fmt: skip
    assert list(attempt.input_ids) == PROMPT and attempt.sampling_params.max_new_tokens == 50


def message(output: list[int] = OUTPUT, reasoning_tokens: int = 3, **changes: Any) -> Any:
    emitted = EmittedTokens(
        rid="r",
        ended=False,
        output_ids=pack_ids(output),
        cached_tokens=6,
        reasoning_tokens=reasoning_tokens,
    )
    return Decoder(WorkerInbound).decode(encode(resume_message(tokenized(**changes), emitted)))


def test_the_decode_worker_is_sent_the_request_and_its_output() -> None:
    resume = message()
    assert resume.spec.rid == "r#01" and resume.output_ids == pack_ids(OUTPUT)
    assert (resume.room, resume.bootstrap_host, resume.bootstrap_port) == (
        2**61, "10.0.0.1", 4000
    )  # fmt: skip
    assert (resume.cached_tokens, resume.reasoning_tokens) == (6, 3)


def test_a_request_of_any_length_can_go_on() -> None:
    """Clients of the chat endpoint seldom say how long an answer may become; only the worker that
    runs the request fills that in, on its own copy."""
    params = SamplingParams(max_new_tokens=None)
    params.normalize(None)
    emitted = EmittedTokens(
        rid="r", ended=False, output_ids=pack_ids(OUTPUT), cached_tokens=6, reasoning_tokens=3
    )
    sent = resume_message(tokenized(sampling_params=params), emitted)
    resume = Decoder(WorkerInbound).decode(encode(sent))
    assert resume.spec.sampling_params.max_new_tokens is None
    assert resume_fault(resume, WorkerFacts(vocab_size=100, max_tokens=100)) is None


def test_one_that_cannot_go_on_here_is_not_left_without_an_answer() -> None:
    failed: list[tuple[str, str]] = []
    worker: Any = SimpleNamespace(
        resumed=object(),
        _host=SimpleNamespace(facts=WorkerFacts(vocab_size=10, max_tokens=100)),
        ares=SimpleNamespace(
            dropped=DroppedFrames("worker"), request_failed=lambda *of: failed.append(of)
        ),
    )
    AresScheduler._resume(worker, message())
    assert failed == [("r#01", "input_ids has a token outside the vocabulary of 10")]


# --- from the message into a batch ----------------------------------------------------------


class FakeScheduler:
    def __init__(self) -> None:
        self.received: list[TokenizedGenerateReqInput] = []
        self.queued: list[tuple[Req, bool]] = []
        self.disagg_decode_prealloc_queue = SimpleNamespace(
            kv_manager=SimpleNamespace(submit_prefill_recompute=None), add=self._add
        )
        processor: Any = SimpleNamespace(model_config=SimpleNamespace(think_end_ids=THINK_END))
        processor._maybe_update_reasoning_tokens = partial(
            SchedulerBatchResultProcessor._maybe_update_reasoning_tokens, processor
        )
        self.batch_result_processor = processor

    def handle_generate_request(self, recv_req: TokenizedGenerateReqInput) -> None:
        self.received.append(recv_req)

    def _add(self, req: Req, is_retracted: bool = False, is_rebootstrap: bool = False) -> None:
        assert not is_retracted
        self.queued.append((req, is_rebootstrap))


@pytest.fixture
def scheduler() -> Any:
    return FakeScheduler()


@pytest.fixture
def resumed(scheduler: Any) -> ResumedRequests:
    return ResumedRequests(scheduler)


def built(scheduler: Any, resumed: ResumedRequests) -> Req:
    resumed.start(message())
    return new_req(scheduler.received[-1])


def test_it_is_received_like_any_request(scheduler: Any, resumed: ResumedRequests) -> None:
    resumed.start(message())
    (received,) = scheduler.received
    expected = tokenized()
    assert received.sampling_params == expected.sampling_params
    assert list(received.input_ids) == PROMPT and received.bootstrap_room == 2**61


def test_others_are_not_taken(scheduler: Any, resumed: ResumedRequests) -> None:
    resumed.start(message())
    assert not resumed.take_built(new_req(tokenized(bootstrap_room=17)))
    assert not scheduler.queued


def test_it_waits_for_its_kv_with_its_output(scheduler: Any, resumed: ResumedRequests) -> None:
    req = built(scheduler, resumed)
    assert resumed.take_built(req)
    assert scheduler.queued == [(req, True)]
    assert list(req.output_ids) == OUTPUT[:-1]
    assert not resumed.take_built(req), "taken once"


def test_the_prefill_worker_is_not_asked_again(scheduler: Any, resumed: ResumedRequests) -> None:
    manager = scheduler.disagg_decode_prealloc_queue.kv_manager
    assert manager.submit_prefill_recompute(object(), {"input_ids": []}) is None


def test_it_enters_with_the_counters_the_client_knows(
    scheduler: Any, resumed: ResumedRequests
) -> None:
    req, other = built(scheduler, resumed), new_req()
    resumed.take_built(req)
    resumed.note_entering([other])
    kv_arrives(req)
    req.cached_tokens, req.reasoning_tokens = 10, 0  # what the second prefill found
    resumed.note_entering([other, req])
    assert (req.cached_tokens, req.reasoning_tokens) == (6, 3)
    resumed.note_entering([req])
    assert not resumed._waiting


@pytest.mark.parametrize("died_after", range(1, 8))
def test_reasoning_ends_where_it_would_have(
    scheduler: Any, resumed: ResumedRequests, died_after: int
) -> None:
    """Before, within and after the sequence that ends it."""
    answer = [10, 98, 11, *THINK_END, 20, 21, 22]
    unbroken = new_req(tokenized(require_reasoning=True))
    count = scheduler.batch_result_processor._maybe_update_reasoning_tokens
    for token in answer[:died_after]:
        count(unbroken, token)
    resumed.start(message(answer[:died_after], unbroken.reasoning_tokens, require_reasoning=True))
    req = new_req(scheduler.received[-1])
    assert resumed.take_built(req)
    kv_arrives(req)
    resumed.note_entering([req])
    for token in answer[died_after:]:
        count(req, token)
        count(unbroken, token)
        assert req.reasoning_tokens == unbroken.reasoning_tokens
    assert req.reasoning_tokens == 5


def test_one_that_ends_while_it_waits_is_let_go(scheduler: Any, resumed: ResumedRequests) -> None:
    req = built(scheduler, resumed)
    resumed.take_built(req)
    req.finished_reason = FINISH_ABORT("Decode transfer failed")
    resumed.note_entering([])
    assert not resumed._waiting


@pytest.mark.parametrize("where", ["to_finish", "finished_reason"])
def test_one_that_was_aborted_while_it_was_built_is_answered_not_queued(
    scheduler: Any, resumed: ResumedRequests, where: str
) -> None:
    """Upstream retires a new request that is aborted already; a resumed one it would let wait
    for its KV, and then stream a token that is not the client's next."""
    req = built(scheduler, resumed)
    setattr(req, where, FINISH_ABORT())
    assert resumed.take_built(req)
    assert scheduler.queued == [(req, False)]
    assert not req.output_ids and req.pd_rebootstrap_forced_output_id is None
    assert not resumed._waiting and not resumed._told


def test_finished_and_entering_at_once(scheduler: Any, resumed: ResumedRequests) -> None:
    req = built(scheduler, resumed)
    resumed.take_built(req)
    kv_arrives(req)
    req.finished_reason = FINISH_LENGTH(len(OUTPUT))
    resumed.note_entering([req])
    assert not resumed._waiting
