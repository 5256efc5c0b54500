"""Every message of ARES on the wire, and what of a request travels in them."""

from __future__ import annotations

import math
from array import array
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from transformers import AutoTokenizer

from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.disaggregation import request_state
from sglang_ares.srt.disaggregation.refusals import REQUEST, first_refusal
from sglang_ares.srt.disaggregation.request_state import (
    RequestSpec,
    RequestState,
    capture,
    make_fit_to_travel,
    pack_ids,
    restore,
    spec_of,
    tokenized_input,
    unpack_ids,
)
from sglang_ares.srt.managers import io_struct
from sglang_ares.srt.managers.io_struct import (
    MAX_MESSAGE_BYTES,
    Accept,
    Cancel,
    Commit,
    ConnectPeers,
    ControllerInbound,
    Decoder,
    FrontInbound,
    HostInbound,
    Landed,
    LedgerInbound,
    Message,
    MigrationResult,
    Offer,
    OutputsInbound,
    Peer,
    QueryReply,
    StartMigration,
    WorkerInbound,
    encode,
)
from unit.message_values import random_message

REJECTED = (msgspec.ValidationError, msgspec.DecodeError)
UNIONS: dict[str, Any] = {
    "worker": WorkerInbound,
    "controller": ControllerInbound,
    "ledger": LedgerInbound,
    "front": FrontInbound,
    "reply": QueryReply,
    "outputs": OutputsInbound,
    "host": HostInbound,
}
MESSAGES: list[type[Message]] = [
    c for c in vars(io_struct).values()
    if isinstance(c, type) and issubclass(c, Message) and c is not Message
]  # fmt: skip


def union_of(message: type[Message]) -> Any:
    return next(u for u in UNIONS.values() if message is u or message in get_args(u))


IDS = st.lists(st.integers(0, 2**31 - 1), max_size=20)
SAMPLING = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(0, 2**20),
    stop=st.none() | st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=3),
    stop_token_ids=st.none() | st.sets(st.integers(0, 2**20), max_size=3),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.1, 1),
    min_p=st.floats(0, 1),
    frequency_penalty=st.floats(-2, 2),
    json_schema=st.none() | st.just('{"type": "object"}'),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 9).map(str), st.floats(-9, 9)),
    sampling_seed=st.none() | st.integers(0, 2**62),
    custom_params=st.none() | st.dictionaries(st.text(max_size=3), st.integers(0, 9)),
)


def messages(message_type: type[Message]) -> st.SearchStrategy[Any]:
    """Messages of a type within the bounds of their fields."""
    return st.randoms(use_true_random=False).map(lambda rng: random_message(message_type, rng))


# --- the wire -------------------------------------------------------------------------------


def test_every_message_has_a_direction() -> None:
    assert len(MESSAGES) > 15
    for message in MESSAGES:
        assert union_of(message) is not None


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
@settings(max_examples=20)
@given(data=st.data())
def test_round_trip(message_type: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(message_type))
    frame = encode(message)
    assert Decoder(union_of(message_type)).decode(frame) == message
    assert msgspec.msgpack.decode(frame)[0] == message_type.__name__


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
@settings(max_examples=10)
@given(data=st.data())
def test_truncated_frames_are_rejected(message_type: type[Message], data: st.DataObject) -> None:
    frame = encode(data.draw(messages(message_type)))
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(REJECTED):
        Decoder(union_of(message_type)).decode(frame[:cut])


@pytest.mark.parametrize("union", UNIONS.values(), ids=UNIONS)
@settings(max_examples=150)
@given(frame=st.binary(max_size=60))
def test_random_bytes_are_rejected(union: Any, frame: bytes) -> None:
    with pytest.raises(REJECTED):
        Decoder(union).decode(frame)


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
@settings(max_examples=40)
@given(data=st.data())
def test_changed_bytes_are_rejected_or_valid(
    message_type: type[Message], data: st.DataObject
) -> None:
    frame = bytearray(encode(data.draw(messages(message_type))))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = Decoder(union_of(message_type)).decode(bytes(frame))
    except REJECTED:
        return
    assert encode(decoded)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x94\xa6Cancel\x01\x00\xa2\xff\xfe",
        b"\x91" * 100_000,
        b"\x94\xa6Cancel" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x94\xa6Cancel\x01\x00\xc7\x01\x05x",
    ],
    ids=["not utf-8", "deep", "deep field", "4 G items", "4 GB text", "extension"],
)
def test_nasty_frames_are_rejected(frame: bytes) -> None:
    """Whatever msgspec raises by itself, the receiver sees one family of errors."""
    with pytest.raises(REJECTED):
        Decoder(WorkerInbound).decode(frame)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
@settings(max_examples=15)
@given(data=st.data())
def test_one_field_replaced_is_rejected_or_valid(
    message_type: type[Message], data: st.DataObject
) -> None:
    """Whatever stands in a field: a message of the declared types, or a msgspec error."""
    parts = msgspec.msgpack.decode(encode(data.draw(messages(message_type))))
    parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(PLAIN)
    decoder = Decoder(union_of(message_type))
    try:
        decoded = decoder.decode(msgspec.msgpack.encode(parts))
    except REJECTED:
        return
    assert encode(decoded)


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
def test_a_field_of_the_wrong_type_is_rejected(message_type: type[Message]) -> None:
    fields = msgspec.structs.fields(message_type)
    frame = msgspec.msgpack.encode([message_type.__name__, *([{"no": "such"}] * len(fields))])
    with pytest.raises(msgspec.ValidationError):
        Decoder(union_of(message_type)).decode(frame)


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
def test_a_message_for_another_socket_is_rejected(message_type: type[Message]) -> None:
    own = union_of(message_type)
    fields = len(msgspec.structs.fields(message_type))
    frame = msgspec.msgpack.encode([message_type.__name__, *([0] * fields)])
    for union in UNIONS.values():
        if union is not own:
            with pytest.raises(msgspec.ValidationError):
                Decoder(union).decode(frame)


def test_a_missing_field_is_rejected() -> None:
    frame = msgspec.msgpack.encode(["Accept", 1, 2])
    with pytest.raises(msgspec.ValidationError):
        Decoder(WorkerInbound).decode(frame)


def test_an_oversize_frame_is_rejected_unread() -> None:
    decoder = Decoder(QueryReply)
    large = QueryReply(query_id=1, status=200, body=b"x" * (MAX_MESSAGE_BYTES + 1))
    with pytest.raises(msgspec.ValidationError, match=r"message of \d+ bytes is too large"):
        decoder.decode(encode(large))
    fits = QueryReply(query_id=1, status=200, body=b"x" * (MAX_MESSAGE_BYTES - 1000))
    assert decoder.decode(encode(fits)) == fits


OUT_OF_BOUNDS: tuple[Message, ...] = (
    Cancel(migration_id=-1, source=0, reason=""),
    Cancel(migration_id=2**62, source=0, reason=""),
    Cancel(migration_id=1, source=-1, reason=""),
    Cancel(migration_id=1, source=2**16, reason=""),
    Cancel(migration_id=1, source=1, reason="x" * 1001),
    Accept(migration_id=1, worker_id=1, prefix_tokens=-1),
    StartMigration(migration_id=1, rid="x" * 513, target=1),
    Landed(migration_id=1, rid="r", worker_id=1, steps=1, blackout_s=math.nan),
    Landed(migration_id=1, rid="r", worker_id=1, steps=1, blackout_s=math.inf),
    ConnectPeers(
        peers=[
            Peer(
                worker_id=1,
                role="admin",
                control_endpoint="ipc://x",
                bootstrap_host="h",
                bootstrap_port=1,
            )
        ]
    ),
    ConnectPeers(
        peers=[
            Peer(
                worker_id=1,
                role="decode\n",
                control_endpoint="ipc://x",
                bootstrap_host="h",
                bootstrap_port=65_536,
            )
        ]
    ),
    MigrationResult(
        migration_id=1, rid="r", source=0, target=1, outcome="won", reason="", tokens=1,
        tokens_sent=1, tokens_saved=0,
        kv_bytes=1, duration_s=1.0,
    ),
)  # fmt: skip


@pytest.mark.parametrize("message", OUT_OF_BOUNDS, ids=lambda m: type(m).__name__)
def test_values_out_of_bounds_are_rejected(message: Message) -> None:
    with pytest.raises(msgspec.ValidationError):
        Decoder(union_of(type(message))).decode(encode(message))


def field_types(info: Any) -> list[Any]:
    """All types below a type."""
    found = [info]
    match info:
        case inspect.StructType():
            below = [f.type for f in info.fields]
        case inspect.UnionType():
            below = list(info.types)
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            below = [info.item_type]
        case inspect.TupleType():
            below = list(info.item_types)
        case inspect.DictType():
            below = [info.key_type, info.value_type]
        case _:
            below = []
    for part in below:
        found += field_types(part)
    return found


PLAIN_TYPES = (
    inspect.StructType, inspect.UnionType, inspect.ListType, inspect.VarTupleType,
    inspect.TupleType, inspect.SetType, inspect.DictType, inspect.IntType, inspect.FloatType,
    inspect.StrType, inspect.BytesType, inspect.BoolType, inspect.NoneType,
)  # fmt: skip


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
def test_a_message_holds_plain_types_only(message_type: type[Message]) -> None:
    """No Any, no extension, no type that a hook would build: upstream's SamplingParams too."""
    for info in field_types(inspect.type_info(message_type)):
        assert isinstance(info, PLAIN_TYPES), info


def _alternatives(info: Any) -> list[Any]:
    """What a field may hold, the items of a tuple of fixed length among it."""
    found = list(info.types) if isinstance(info, inspect.UnionType) else [info]
    tuples = [part for part in found if isinstance(part, inspect.TupleType)]
    return found + [item for part in tuples for item in part.item_types]


@pytest.mark.parametrize("message_type", MESSAGES, ids=lambda c: c.__name__)
def test_numbers_and_lists_of_our_own_have_bounds(message_type: type[Message]) -> None:
    """Except where only the size of the whole message bounds them: the text and the output of
    a request, checked against each other in ``disaggregation/checks.py``."""
    free = {"input_text", "decoded_text", "body", "logprob_start_len", "priority"}
    for info in field_types(inspect.type_info(message_type)):
        if isinstance(info, inspect.StructType) and info.cls is not SamplingParams:
            for f in info.fields:
                for part in _alternatives(f.type):
                    if isinstance(part, inspect.IntType) and f.name not in free:
                        assert part.ge is not None and (part.lt or part.le) is not None, f
                    if isinstance(part, inspect.FloatType):
                        assert part.ge is not None and part.le is not None, f
                    if isinstance(part, inspect.StrType) and f.name not in free:
                        assert part.max_length is not None or part.pattern is not None, f


def test_messages_cannot_be_changed() -> None:
    message = Accept(migration_id=1, worker_id=2, prefix_tokens=3)
    with pytest.raises(AttributeError):
        message.prefix_tokens = 4  # type: ignore[misc]


# --- token ids ------------------------------------------------------------------------------


@given(IDS)
def test_ids_round_trip(ids: list[int]) -> None:
    packed = pack_ids(ids)
    assert len(packed) == 4 * len(ids)
    unpacked = unpack_ids(packed)
    assert list(unpacked) == ids and unpacked.typecode == "q" and unpacked.itemsize == 8
    assert pack_ids(unpacked) == packed


def test_ids_are_little_endian() -> None:
    assert pack_ids(array("q", [1, 256])) == bytes([1, 0, 0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("packed", [b"\x01", b"\x01\x00\x00\x00\x02"])
def test_half_a_token_is_an_error(packed: bytes) -> None:
    with pytest.raises(ValueError):
        unpack_ids(packed)


# --- requests -------------------------------------------------------------------------------


def tokenized(**changes: Any) -> TokenizedGenerateReqInput:
    fields: dict[str, Any] = {
        "rid": "request-1",
        "http_worker_ipc": "ipc:///front",
        "input_text": "a prompt",
        "input_ids": array("q", [5, 6, 7, 8]),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(
            max_new_tokens=77, stop=["\n\n"], temperature=0.7, sampling_seed=12345
        ),
        "return_logprob": True,
        "logprob_start_len": 2,
        "top_logprobs_num": 3,
        "token_ids_logprob": [9, 10],
        "stream": True,
        "return_flat_raw_top_logprobs": True,
        "lora_id": "adapter",
        "routing_key": "user-7",
        "require_reasoning": True,
        "priority": 4,
        "extra_key": "tenant",
        "cache_salt": "salt",
        "no_logs": True,
    }
    return TokenizedGenerateReqInput(**(fields | changes))


def over_the_wire(message: Message) -> Any:
    return Decoder(WorkerInbound).decode(encode(message))


def offer_of(recv_req: TokenizedGenerateReqInput) -> Offer:
    return Offer(
        migration_id=1,
        source=0,
        room=2**61,
        tokens=4,
        headroom=8,
        spec=spec_of(recv_req),
        output_ids=pack_ids([1, 2]),
    )


def test_the_tokenized_request_arrives_unchanged() -> None:
    sent = tokenized()
    offer = over_the_wire(offer_of(sent))
    received = tokenized_input(
        offer.spec, bootstrap_host="10.0.0.1", bootstrap_port=4000, bootstrap_room=offer.room
    )
    assert (received.bootstrap_host, received.bootstrap_port) == ("10.0.0.1", 4000)
    assert received.bootstrap_room == 2**61
    for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
        setattr(received, name, None)
    assert received == sent


@settings(max_examples=60)
@given(SAMPLING)
def test_sampling_parameters_arrive_unchanged(params: SamplingParams) -> None:
    offer = over_the_wire(offer_of(tokenized(sampling_params=params)))
    assert offer.spec.sampling_params == params


def test_normalised_sampling_parameters_arrive_unchanged() -> None:
    """On the source upstream has normalised them already (stop strings, derived lengths)."""
    params = SamplingParams(max_new_tokens=9, stop=["ab", "c"], stop_regex="x+")
    params.normalize(AutoTokenizer.from_pretrained(MODEL_DIR))
    assert params.stop_strs == ["ab", "c"] and params.stop_str_max_len > 0
    assert over_the_wire(offer_of(tokenized(sampling_params=params))).spec.sampling_params == params


def test_a_batched_text_is_left_out() -> None:
    assert spec_of(tokenized(input_text=["a", "b"])).input_text is None


@pytest.mark.parametrize(
    "name, given, made",
    [
        ("max_new_tokens", 10.0, 10),
        ("top_k", 40.0, 40),
        ("ignore_eos", 1, True),
        ("skip_special_tokens", 0, False),
        ("temperature", 1, 1.0),
        ("max_new_tokens", None, None),
    ],
)
def test_what_http_lets_pass_gets_the_type_of_its_message(name: str, given: Any, made: Any) -> None:
    request = tokenized(sampling_params=SamplingParams(**{name: given}))
    text = request.input_text
    assert make_fit_to_travel(request) is None
    value = getattr(request.sampling_params, name)
    assert value == made and type(value) is type(made)
    assert request.input_text == text
    assert over_the_wire(offer_of(request)).spec.sampling_params == request.sampling_params


@pytest.mark.parametrize(
    "name, given", [("max_new_tokens", 10.5), ("custom_params", {"a": {"b": [1]}})]
)
def test_what_cannot_have_that_type_is_named(name: str, given: Any) -> None:
    fault = make_fit_to_travel(tokenized(sampling_params=SamplingParams(**{name: given})))
    assert fault is not None and f"at sampling_params.{name}" in fault, fault


def test_fields_beside_the_sampling_parameters_are_made_to_fit_too() -> None:
    request = tokenized(top_logprobs_num=3.0, token_ids_logprob=[9.0])
    assert make_fit_to_travel(request) is None
    assert over_the_wire(offer_of(request)).spec.token_ids_logprob == [9]
    fault = make_fit_to_travel(tokenized(extra_key="x" * 70_000))
    assert fault is not None and "extra_key" in fault


# What of upstream's request neither moves nor is refused, and why that loses nothing.
NOT_MOVED = {
    "token_type_ids": "cross-encoder models do not decode",
    "bootstrap_host": "set anew for each transfer",
    "bootstrap_port": "set anew for each transfer",
    "bootstrap_room": "set anew for each transfer",
    "bootstrap_pair_key": "set anew for each transfer",
    "decode_tp_size": "all workers of a cluster have one tp size",
    "routed_dp_rank": "a cluster has no DP ranks",
    "disagg_prefill_dp_rank": "a cluster has no DP ranks",
    "routed_experts_start_len": "only with return_routed_experts, which is refused",
    "sampling_logprobs_mode": "only with return_sampling_mask, which is refused",
    "return_bytes": "read by the front only",
    "return_entropy": "read by nobody in this version",
    "need_wait_for_mm_inputs": "multimodal models are refused",
    "num_items_assigned": "multimodal models are refused",
    "encoder_urls": "multimodal models are refused",
    "multi_item_delimiter_indices": "scoring requests do not decode",
    "token_indices_to_pool": "scoring requests do not decode",
    "time_stats": "the worker makes its own",
    "kv_hints": "hints for the prefill worker's cache",
    "pp_prefetch_ticketed": "pipeline parallelism is refused",
}
# What the refusal table must catch: a field, and a value that a client can cause.
REFUSED_FIELDS: dict[str, Any] = {
    "session_id": "s",
    "session_params": object(),
    "mm_inputs": object(),
    "input_embeds": [[0.5]],
    "positional_embed_overrides": object(),
    "custom_logit_processor": "code",
    "return_hidden_states": True,
    "return_routed_experts": True,
    "return_indexer_topk": True,
    "return_sampling_mask": True,
}


def test_every_field_of_upstreams_request_moves_or_is_refused_or_does_not_matter() -> None:
    upstream = {f.name for f in msgspec.structs.fields(TokenizedGenerateReqInput)}
    moved = {f.name for f in msgspec.structs.fields(RequestSpec)}
    assert moved <= upstream
    assert upstream - moved - set(NOT_MOVED) - set(REFUSED_FIELDS) == set(), "new upstream fields"
    assert (set(NOT_MOVED) | set(REFUSED_FIELDS)) - upstream == set(), "gone upstream"
    assert not moved & (set(NOT_MOVED) | set(REFUSED_FIELDS))


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_what_does_not_move_is_refused(name: str) -> None:
    recv_req = tokenized()
    assert first_refusal(REQUEST, recv_req) is None
    setattr(recv_req, name, REFUSED_FIELDS[name])
    row = first_refusal(REQUEST, recv_req)
    assert row is not None and row.key and row.reason


def test_beam_search_is_refused() -> None:
    row = first_refusal(REQUEST, tokenized(sampling_params=SamplingParams(beam_width=4)))
    assert row is not None and row.key == "beam_search"


def new_req(recv_req: TokenizedGenerateReqInput) -> Req:
    return Req(
        recv_req.rid,
        recv_req.input_text,
        recv_req.input_ids,
        recv_req.sampling_params,
        return_logprob=recv_req.return_logprob,
        top_logprobs_num=recv_req.top_logprobs_num,
        token_ids_logprob=recv_req.token_ids_logprob,
        stream=recv_req.stream,
    )


def running_req() -> Req:
    """A request in the middle of its output, every attribute that moves set to a value of its
    own."""
    req = new_req(tokenized())
    req.output_ids = array("q", [11, 12, 13, 14])
    req.surr_offset, req.read_offset = 1, 3
    req.decoded_text = "héllo"
    req.send_token_offset, req.send_decode_id_offset = 4, 3
    req.send_output_token_logprobs_offset = 2
    req.cached_tokens, req.cached_tokens_device = 2, 1
    req.cached_tokens_host, req.cached_tokens_storage = 5, 6
    req.reasoning_tokens, req.retraction_count, req.retracted_stain = 7, 8, True
    req._is_reasoning_over, req._think_end_match_len = True, 9
    req.cur_decode_ids_len = 3
    req.surr_and_decode_ids = req.origin_input_ids_unpadded[1:] + req.output_ids[:3]
    req.logprob.output_token_logprobs_val = [-0.1, -math.inf, -0.3, -1e-30]
    req.logprob.output_token_logprobs_idx = [11, 12, 13, 14]
    req.logprob.output_top_logprobs_val = [[-0.1, -2.0, -3.0]] * 4
    req.logprob.output_top_logprobs_idx = [[11, 4, 5]] * 4
    req.logprob.output_token_ids_logprobs_val = [[-4.0, -5.0]] * 4
    req.logprob.output_token_ids_logprobs_idx = [[9, 10]] * 4
    return req


def moved(req: Req) -> Req:
    """The request on the other side: built from its specification, state restored."""
    commit = over_the_wire(
        Commit(migration_id=1, source=0, tokens=7, state=capture(req), stopped_at=1.5)
    )
    arrived = new_req(
        tokenized_input(
            over_the_wire(offer_of(tokenized())).spec,
            bootstrap_host="",
            bootstrap_port=0,
            bootstrap_room=0,
        )
    )
    restore(arrived, commit.state)
    return arrived


# Attributes that differ between a request and the same one built elsewhere, and why.
DIFFERS = {
    "logprob": "compared by itself",
    "time_stats": "of this worker",
    "cache_request_handle": "of this worker's cache",
    "already_computed": "set on arrival: see restore",
    "prefix_indices": "of this worker's pool",
    "kv": "of this worker's pool",
}


def test_a_real_request_arrives_as_it_left() -> None:
    req = running_req()
    arrived = moved(req)
    for name, value in vars(req).items():
        if name not in DIFFERS:
            assert getattr(arrived, name) == value, name
    assert arrived.logprob == req.logprob
    assert arrived.output_ids.typecode == "q"
    assert arrived.already_computed == arrived.seqlen == 8


@pytest.mark.parametrize("name", request_state._PLAIN_ATTRIBUTES)
def test_every_plain_attribute_is_set_to_something_in_this_test(name: str) -> None:
    """Or the test above would not notice its loss."""
    assert getattr(running_req(), name) != getattr(new_req(tokenized()), name)


@pytest.mark.parametrize("name", request_state._LOGPROB_ATTRIBUTES)
def test_every_logprob_attribute_is_set_to_something_in_this_test(name: str) -> None:
    assert getattr(running_req().logprob, name) != getattr(new_req(tokenized()).logprob, name)


def test_tensors_and_tuples_among_logprobs_become_lists() -> None:
    import torch

    req = running_req()
    req.logprob.output_token_ids_logprobs_val = [torch.tensor([-1.0, -2.0]), (-3.0, -4.0)]
    arrived = moved(req)
    assert [list(v) for v in arrived.logprob.output_token_ids_logprobs_val] == [
        [-1.0, -2.0],
        [-3.0, -4.0],
    ]


def test_a_request_without_logprobs_and_never_detokenized() -> None:
    req = Req("r", "", array("q", [1, 2]), SamplingParams(max_new_tokens=4))
    req.output_ids = array("q", [3])
    arrived = Req("r", "", array("q", [1, 2]), SamplingParams(max_new_tokens=4))
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(capture(req)), type=RequestState)
    restore(arrived, state)
    assert list(arrived.output_ids) == [3]
    assert arrived.logprob.output_token_logprobs_val is None
    assert getattr(arrived, "surr_and_decode_ids", None) == getattr(
        req, "surr_and_decode_ids", None
    )


@pytest.mark.parametrize("steps_before", [1, 2, 5])
def test_incremental_detokenisation_goes_on_where_it_was(steps_before: int) -> None:
    """Upstream's own bookkeeping, one token at a time, with and without a move in between."""
    stays, leaves = new_req(tokenized()), new_req(tokenized())
    for token in range(40, 40 + steps_before):
        for req in (stays, leaves):
            req.output_ids.append(token)
            req.init_incremental_detokenize()
    arrived = moved(leaves)
    for token in range(60, 64):
        for req in (stays, arrived):
            req.output_ids.append(token)
        assert arrived.init_incremental_detokenize() == stays.init_incremental_detokenize()


def test_the_grammar_is_replayed() -> None:
    class Grammar:
        def __init__(self) -> None:
            self.accepted: list[int] = []

        def accept_token(self, token: int) -> None:
            self.accepted.append(token)

    req = running_req()
    arrived = new_req(tokenized())
    arrived.grammar = Grammar()
    restore(arrived, capture(req))
    assert arrived.grammar.accepted == [11, 12, 13, 14]
