"""What of a request travels with a migration: its specification, and its state so far.

``RequestSpec`` is the request as the front sent it (it never changes). ``RequestState`` is all
that decides or accounts for the next token: output so far, the incremental detokenizer's
position, log-probabilities, usage counters; and what is predicted of its length. What follows
from these is rebuilt on the target: the grammar by replaying the output, the penalties from the
output's token counts.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.predictor.state import (
    PredictionState,
    capture_prediction,
    restore_prediction,
)
from sglang_ares.srt.security.bounds import Address, Count, Label, Rid, TokenId

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

# Fields of the tokenized request that move as they are.
_SPEC_FIELDS = (
    "rid",
    "http_worker_ipc",
    "input_text",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "stream",
    "return_flat_raw_top_logprobs",
    "lora_id",
    "routing_key",
    "require_reasoning",
    "priority",
    "extra_key",
    "cache_salt",
    "no_logs",
)


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The request as the front sent it. ``input_ids``: the prompt, little-endian int32."""

    rid: Rid
    http_worker_ipc: Address | None
    input_text: str | None
    input_ids: bytes
    sampling_params: SamplingParams
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: Count
    token_ids_logprob: list[TokenId] | None
    stream: bool
    return_flat_raw_top_logprobs: bool
    lora_id: Label | None
    routing_key: Label | None
    require_reasoning: bool
    priority: int | None
    extra_key: Label | None
    cache_salt: Label | None
    no_logs: bool


class PlainState(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes of upstream's ``Req`` that are plain values and move as they are."""

    # incremental detokenizer and streaming position
    surr_offset: Count | None
    read_offset: Count | None
    decoded_text: str
    send_token_offset: Count
    send_decode_id_offset: Count
    send_output_token_logprobs_offset: Count
    # usage
    cached_tokens: Count
    cached_tokens_device: Count
    cached_tokens_host: Count
    cached_tokens_storage: Count
    reasoning_tokens: Count
    retraction_count: Count
    retracted_stain: bool
    # reasoning
    _is_reasoning_over: bool
    _think_end_match_len: Count


class LogprobState(msgspec.Struct, frozen=True, kw_only=True):
    """The log-probabilities of the output so far, as upstream's ``ReqLogprob`` holds them."""

    output_token_logprobs_val: list[float] | None
    output_token_logprobs_idx: list[TokenId] | None
    output_top_logprobs_val: list[list[float] | None] | None
    output_top_logprobs_idx: list[list[TokenId] | None] | None
    output_token_ids_logprobs_val: list[list[float] | None] | None
    output_token_ids_logprobs_idx: list[list[TokenId] | None] | None


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """The request's state at hand-over. ``output_ids``: all output, little-endian int32;
    ``detokenized``: output tokens the detokenizer has been given; ``prediction``: of its remaining
    length, if there is one."""

    output_ids: bytes
    plain: PlainState
    detokenized: Count | None
    logprobs: LogprobState
    prediction: PredictionState | None = None


_PLAIN_ATTRIBUTES = PlainState.__struct_fields__
_LOGPROB_ATTRIBUTES = LogprobState.__struct_fields__


def pack_ids(ids: Any) -> bytes:
    """Token ids as little-endian int32."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(packed: bytes) -> array[int]:
    """The inverse of :func:`pack_ids`, in upstream's type (``array`` of signed 64-bit)."""
    return array("q", np.frombuffer(packed, dtype="<i4").astype(np.int64).tobytes())


def spec_of(recv_req: TokenizedGenerateReqInput, max_new_tokens: int | None = None) -> RequestSpec:
    """The specification of a request that the refusal table lets move. ``max_new_tokens``: how
    long the worker it runs on lets it become, if nobody else has said."""
    values = {name: getattr(recv_req, name) for name in _SPEC_FIELDS}
    if not isinstance(values["input_text"], str):
        values["input_text"] = None
    params = recv_req.sampling_params
    if params.max_new_tokens is None:
        values["sampling_params"] = msgspec.structs.replace(params, max_new_tokens=max_new_tokens)
    return RequestSpec(input_ids=pack_ids(recv_req.input_ids), **values)


def make_fit_to_travel(recv_req: TokenizedGenerateReqInput) -> str | None:
    """Give a request's fields the types of our messages, or say why that cannot be.

    Upstream's HTTP layer lets ``"max_new_tokens": 10.0`` pass, and so does the pickle between
    processes of one host; our messages would not be understood.
    """
    values = {name: getattr(recv_req, name) for name in _SPEC_FIELDS if name != "input_text"}
    try:
        wire = msgspec.msgpack.encode({**values, "input_text": None, "input_ids": b""})
        spec = msgspec.msgpack.decode(wire, type=RequestSpec, strict=False)
    except (TypeError, ValueError, OverflowError) as error:  # msgspec's own are ValueErrors
        return re.sub(r"`\$\.sampling_params\[(\d+)\][^`]*`", _parameter_name, str(error))
    for name in values:
        setattr(recv_req, name, getattr(spec, name))
    return None


def _parameter_name(path: re.Match[str]) -> str:
    return f"sampling_params.{SamplingParams.__struct_fields__[int(path[1])]}"


def tokenized_input(
    spec: RequestSpec, *, bootstrap_host: str, bootstrap_port: int, bootstrap_room: int
) -> TokenizedGenerateReqInput:
    """The request in upstream's form, to be received on the target like any other."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    return TokenizedGenerateReqInput(
        input_ids=unpack_ids(spec.input_ids),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        bootstrap_host=bootstrap_host,
        bootstrap_port=bootstrap_port,
        bootstrap_room=bootstrap_room,
        **{name: getattr(spec, name) for name in _SPEC_FIELDS},
    )


def recompute_input(
    attempt: TokenizedGenerateReqInput, emitted: array[int]
) -> TokenizedGenerateReqInput:
    """What the prefill worker of a request with output is sent: a prompt to compute the KV of.
    The token it samples is thrown away."""
    one_token = SamplingParams(
        max_new_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        sampling_seed=attempt.sampling_params.sampling_seed,
    )
    one_token.normalize(None)
    return msgspec.structs.replace(
        attempt,
        input_ids=array("q", attempt.input_ids) + emitted[:-1],
        input_text=None,
        sampling_params=one_token,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


def capture(req: Req) -> RequestState:
    """The state of a request that has stopped between two steps."""
    return RequestState(
        output_ids=pack_ids(req.output_ids),
        plain=PlainState(**{name: getattr(req, name) for name in _PLAIN_ATTRIBUTES}),
        detokenized=getattr(req, "cur_decode_ids_len", None),
        logprobs=LogprobState(
            **{name: _plain_list(getattr(req.logprob, name)) for name in _LOGPROB_ATTRIBUTES}
        ),
        prediction=capture_prediction(req),
    )


def replay(req: Req, output_ids: Sequence[int]) -> None:
    """Bring the request's grammar past these tokens of its output."""
    if req.grammar is not None:
        for token in output_ids:
            req.grammar.accept_token(token)
            note_fed(req, token)


def note_fed(req: Req, token: int) -> None:
    """The request's grammar has seen its output up to ``token``. When the request enters a batch,
    upstream feeds the last token to a grammar that names none; few kinds name it by themselves."""
    if req.grammar is not None:
        req.grammar.current_token = token


def restore(req: Req, state: RequestState, replayed: int = 0) -> None:
    """Put ``state`` on a request that was built from its specification, and whose grammar has seen
    the first ``replayed`` tokens of the output."""
    req.output_ids = unpack_ids(state.output_ids)
    for name in _PLAIN_ATTRIBUTES:
        setattr(req, name, getattr(state.plain, name))
    if req.surr_offset is not None and state.detokenized is not None:
        req.cur_decode_ids_len = state.detokenized
        req.surr_and_decode_ids = (
            req.origin_input_ids_unpadded[req.surr_offset :] + req.output_ids[: state.detokenized]
        )
    for name in _LOGPROB_ATTRIBUTES:
        setattr(req.logprob, name, getattr(state.logprobs, name))
    restore_prediction(req, state.prediction)
    replay(req, req.output_ids[replayed:])
    # Upstream adds a cached prefix to `cached_tokens` unless it was counted already.
    req.already_computed = req.seqlen
    req.pd_rebootstrap_in_progress = False


def rewind(req: Req, packed: bytes) -> None:
    """Put a request that was built from its specification where it was after the output in
    ``packed``, all of which the client has; the KV of all but the last token is to come.

    Log-probabilities that went out already are stood in for by zeros: upstream only looks at
    what lies behind the position it has streamed.
    """
    output = unpack_ids(packed)
    req.output_ids = output
    decode_ids, _ = req.init_incremental_detokenize()
    req.send_decode_id_offset = len(decode_ids)
    req.send_token_offset = len(output)
    req.send_output_token_logprobs_offset = len(output)
    if req.return_logprob:
        for name in _LOGPROB_ATTRIBUTES:
            filler: Any = 0.0 if name == "output_token_logprobs_val" else []
            filler = 0 if name == "output_token_logprobs_idx" else filler
            setattr(req.logprob, name, [filler] * len(output))
    replay(req, output)
    # Upstream appends the last token when the KV has arrived.
    req.pd_rebootstrap_forced_output_id = output[-1]
    req.output_ids = output[:-1]
    req.pd_rebootstrap_in_progress = True


def _plain_list(values: Any) -> list[Any] | None:
    """Lists of numbers only; upstream may hold rows as tensors or tuples."""
    if values is None:
        return None
    return [v.tolist() if hasattr(v, "tolist") else v for v in values]
