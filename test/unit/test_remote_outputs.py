"""Outputs and requests of workers on other hosts: what travels arrives unchanged, what cannot is
said to be lost, and nothing false is let in."""

from __future__ import annotations

from array import array
from http import HTTPStatus
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FlushCacheReqInput,
    FreezeGCReq,
    GetInternalStateReqOutput,
    TokenizedGenerateReqInput,
    UpdateWeightsFromTensorReqInput,
    wrap_as_pickle,
)
from sglang.srt.utils.weight_versions import WeightVersionSpan

from sglang_ares.srt.disaggregation.refusals import TRAVEL, first_refusal
from sglang_ares.srt.disaggregation.request_state import tokenized_input
from sglang_ares.srt.managers.io_struct import (
    ControlReply,
    ControlRequest,
    Decoder,
    Generate,
    Message,
    Outputs,
    OutputsInbound,
    WorkerInbound,
    encode,
)
from sglang_ares.srt.managers.remote_io import (
    RemoteInput,
    ReplySender,
    decode_reply,
    decode_request,
)
from sglang_ares.srt.managers.remote_outputs import (
    NOT_NEEDED,
    STAY,
    OutputBatch,
    batch_fault,
    pack_batch,
    unpack_batch,
)
from sglang_ares.srt.security.dropped import DroppedFrames
from unit.test_messages import tokenized


def batch(**changes: Any) -> BatchTokenIDOutput:
    """Two requests; the second has ended and wanted log-probabilities."""
    fields: dict[str, Any] = {
        "rids": ["a#00", "b#01"],
        "http_worker_ipcs": [None, None],
        "finished_reasons": [None, {"type": "stop", "matched": 7}],
        "decoded_texts": ["", "héllo"],
        "decode_ids": [array("q", [1, 2, 3]), array("q", [4])],
        "read_offsets": [2, 0],
        "output_ids": [array("q", [3]), array("q", [4, 5])],
        "skip_special_tokens": [True, False],
        "spaces_between_special_tokens": [True, True],
        "no_stop_trim": [False, False],
        "prompt_tokens": [2, 9],
        "reasoning_tokens": [0, 1],
        "completion_tokens": [1, 40],
        "cached_tokens": [0, 8],
        "cached_tokens_details": [None, {"device": 8, "storage_backend": "none"}],
        "retraction_counts": [0, 1],
        "weight_versions": [None, [WeightVersionSpan(version="v1", start=0, end=40)]],
        "input_token_logprobs_val": [],
        "input_token_logprobs_idx": [],
        "output_token_logprobs_val": [[], [-0.5, float("-inf")]],
        "output_token_logprobs_idx": [[], [4, 5]],
        "input_top_logprobs_val": [],
        "input_top_logprobs_idx": [],
        "output_top_logprobs_val": [[], [[-0.5, -1.0], None]],
        "output_top_logprobs_idx": [[], [[4, 9], None]],
        "input_token_ids_logprobs_val": [],
        "input_token_ids_logprobs_idx": [],
        "output_token_ids_logprobs_val": [[], [torch.tensor([-0.5]), [-2.0]]],
        "output_token_ids_logprobs_idx": [[], [[4], [5]]],
        "output_token_entropy_val": None,
        "output_token_sampling_mask": None,
        "output_hidden_states": None,
        "routed_experts": None,
        "indexer_topk": None,
        "placeholder_tokens_idx": None,
        "placeholder_tokens_val": None,
        "time_stats": wrap_as_pickle(["of the worker", "of the worker"]),
        "dp_ranks": [0, 0],
        "spec_verify_ct": [],
    }
    return BatchTokenIDOutput(**(fields | changes))


def over_the_wire(packed: OutputBatch) -> OutputBatch:
    frame = encode(Outputs(worker_id=3, batch=packed))
    arrived: OutputBatch = Decoder(OutputsInbound).decode(frame).batch
    return arrived


def test_outputs_arrive_unchanged() -> None:
    packed = over_the_wire(pack_batch(batch()))
    assert batch_fault(packed) is None
    sent, arrived = msgspec.structs.asdict(batch()), msgspec.structs.asdict(unpack_batch(packed))
    sent["output_token_ids_logprobs_val"][1][0] = [-0.5]
    for name in OutputBatch.__struct_fields__:
        assert arrived[name] == sent[name], name
    assert arrived["output_ids"][1].typecode == "q"
    assert arrived["time_stats"] is None, "it would have to be unpickled"


def test_every_column_travels_or_stays_or_is_not_needed() -> None:
    upstream = {f.name for f in msgspec.structs.fields(BatchTokenIDOutput)}
    travel = set(OutputBatch.__struct_fields__)
    assert travel | set(STAY) | set(NOT_NEEDED) == upstream
    assert len(travel) + len(STAY) + len(NOT_NEEDED) == len(upstream), "in two lists"


@pytest.mark.parametrize("name", STAY)
def test_a_request_with_what_cannot_travel_ends_with_an_error(name: str) -> None:
    value: Any = [None, [[0.5]]] if name != "customized_info" else wrap_as_pickle({"x": [1, 2]})
    arrived = over_the_wire(pack_batch(batch(**{name: value})))
    reason = arrived.finished_reasons[1]
    assert reason is not None and reason["status_code"] == 501 and name in str(reason["message"])
    assert (arrived.finished_reasons[0] is None) == (name != "customized_info")


def test_empty_columns_of_what_cannot_travel_harm_nobody() -> None:
    packed = pack_batch(batch(output_hidden_states=[[], []], beam_search_output=[None, None]))
    assert packed.finished_reasons == batch().finished_reasons


@pytest.mark.parametrize(
    "changes",
    [
        {"decoded_texts": ["one"]},
        {"completion_tokens": [1, 1]},
        {"output_ids": [b"\x01\x00\x00", b""]},
        {"cached_tokens": []},
        {"output_token_logprobs_val": [[]]},
    ],
)
def test_batches_that_cannot_be_true_have_a_fault(changes: dict[str, Any]) -> None:
    assert batch_fault(msgspec.structs.replace(pack_batch(batch()), **changes)) is not None


# --- requests and answers -------------------------------------------------------------------


def sent_by(requests: list[Any]) -> list[Message]:
    told: list[Message] = []
    line = RemoteInput(told.append)
    for request in requests:
        line.put(request)
    decoder = Decoder(WorkerInbound)
    return [decoder.decode(encode(message)) for message in told]


def test_a_request_arrives_as_it_was_sent() -> None:
    request = tokenized(bootstrap_host="10.0.0.1", bootstrap_port=4000, bootstrap_room=2**61)
    (message,) = sent_by([request])
    assert isinstance(message, Generate)
    arrived = tokenized_input(
        message.spec,
        bootstrap_host=message.bootstrap_host,
        bootstrap_port=message.bootstrap_port,
        bootstrap_room=message.room,
    )
    assert isinstance(arrived, TokenizedGenerateReqInput) and arrived == request


def test_control_requests_arrive_as_they_were_sent_and_others_stay() -> None:
    finish = {"type": "abort", "message": "gone", "status_code": HTTPStatus.GONE}
    requests = [AbortReq(rid="r#00", finished_reason=finish), FlushCacheReqInput(timeout_s=3.0),
                FreezeGCReq()]  # fmt: skip
    tensors = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[b"pickled"])
    messages = sent_by([*requests, tensors])
    assert all(isinstance(m, ControlRequest) for m in messages) and len(messages) == 3
    arrived = [decode_request(m.body) for m in messages if isinstance(m, ControlRequest)]
    assert arrived == requests


@pytest.mark.parametrize("body", [b"", b"{}", b'["UpdateWeightsFromTensorReqInput"]', b"[[]]"])
def test_other_control_requests_are_not_let_in(body: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with pytest.raises(msgspec.MsgspecError):
            decode(body)


def test_answers_arrive_and_unknown_ones_are_counted() -> None:
    told: list[Any] = []
    dropped = DroppedFrames("worker-3")
    replies = ReplySender(told.append, 3, dropped)
    state = GetInternalStateReqOutput(internal_state={"x": [1, {"y": None}], "z": 0.5})
    replies.send_output(state)
    replies.send_output(FreezeGCReq())
    (message,) = told
    assert isinstance(message, ControlReply) and decode_reply(message.body) == state
    assert dropped.total == 1


def test_what_does_not_move_does_not_travel_either() -> None:
    assert first_refusal(TRAVEL, tokenized(return_flat_raw_top_logprobs=False)) is None
    row = first_refusal(TRAVEL, tokenized())
    assert row is not None and row.key == "flat_logprobs"
    hidden = tokenized(return_hidden_states=True)
    assert first_refusal(TRAVEL, hidden) is not None
