"""Whether a message that decodes can be true: sizes that fit each other and the worker.

Pure functions; each returns what is wrong, or None. A message with a fault is not acted on, so
whatever a peer sends, no request is built or restored that upstream would stumble over.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.sampling.sampling_params import (
    MAX_STOP_COUNT,
    MAX_STOP_REGEX_COUNT,
    MAX_STOP_REGEX_LEN,
    SamplingParams,
)

from sglang_ares.srt.predictor.state import prediction_fault

if TYPE_CHECKING:
    from sglang_ares.srt.disaggregation.request_state import LogprobState, RequestSpec
    from sglang_ares.srt.managers.io_struct import Accept, Commit, Generate, Offer, Peer, Resume

_SMALLEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker can hold. ``max_tokens``: of one request, prompt and output together."""

    vocab_size: int
    max_tokens: int


def peers_fault(peers: list[Peer], worker_id: int) -> str | None:
    """What is wrong with a list of the cluster's workers, from the view of one of them."""
    if len({p.worker_id for p in peers}) != len(peers):
        return "a worker is listed twice"
    if not any(p.worker_id == worker_id for p in peers):
        return "this worker is not listed"
    for peer in peers:
        if not peer.control_endpoint.startswith(("ipc://", "tcp://")):
            return f"the endpoint of worker {peer.worker_id} is neither ipc nor tcp"
    return None


def offer_fault(offer: Offer, facts: WorkerFacts) -> str | None:
    """What is wrong with an offer."""
    spec = offer.spec
    fault = (
        ids_fault("input_ids", spec.input_ids, facts.vocab_size)
        or ids_fault("output_ids", offer.output_ids, facts.vocab_size)
        or spec_fault(spec, facts)
        or sampling_fault(spec.sampling_params, facts.vocab_size)
    )
    if fault is not None:
        return fault
    held = (len(spec.input_ids) + len(offer.output_ids)) // 4
    # Under overlap scheduling the KV is one token ahead of the output.
    if not held - 1 <= offer.tokens <= held:
        return f"tokens is {offer.tokens}, the prompt and the output have {held}"
    if offer.tokens + offer.headroom > facts.max_tokens:
        return f"tokens and headroom are {offer.tokens + offer.headroom} > {facts.max_tokens}"
    return None


def spec_fault(spec: RequestSpec, facts: WorkerFacts) -> str | None:
    """What is wrong with a request's own fields."""
    if spec.http_worker_ipc is not None:
        return "http_worker_ipc is set: a cluster has one front"
    if not -1 <= spec.logprob_start_len <= len(spec.input_ids) // 4:
        return f"logprob_start_len is {spec.logprob_start_len}"
    if spec.top_logprobs_num > facts.vocab_size:
        return f"top_logprobs_num is {spec.top_logprobs_num}"
    wanted = spec.token_ids_logprob or [0]
    if max(wanted) >= facts.vocab_size:
        return f"token_ids_logprob has token {max(wanted)} of {facts.vocab_size}"
    if spec.priority is not None and abs(spec.priority) >= 2**31:
        return f"priority is {spec.priority}"
    return None


def sampling_fault(params: SamplingParams, vocab_size: int, *, begun: bool = True) -> str | None:
    """What is wrong with sampling parameters, which the front has normalised and verified.
    ``begun``: as a worker knows them that runs the request and sets its length if nobody did."""
    if not params.is_normalized or params.stop is not None or params.stop_regex is not None:
        return "sampling_params are not normalised"
    try:
        params.verify(vocab_size)
    except (ValueError, TypeError, OverflowError) as error:
        return f"sampling_params: {error}"
    if params.temperature < _SMALLEST_TEMPERATURE:
        return f"sampling_params: temperature is {params.temperature}"
    if (begun and params.max_new_tokens is None) or (params.beam_width or 1) > 1:
        return "sampling_params: no max_new_tokens, or beam search"
    if params.stream_interval is not None and params.stream_interval < 1:
        return f"sampling_params: stream_interval is {params.stream_interval}"
    stops, regexes = params.stop_strs, params.stop_regex_strs
    if not isinstance(stops, list) or not isinstance(regexes, list):
        return "sampling_params: stop_strs and stop_regex_strs must be lists"
    if len(stops) > MAX_STOP_COUNT or not 0 <= params.stop_str_max_len <= 2**20:
        return "sampling_params: too many or too long stop strings"
    if len(regexes) > MAX_STOP_REGEX_COUNT or not 0 <= params.stop_regex_max_len <= 2**62:
        return "sampling_params: too many or too long stop regexes"
    for regex in regexes:
        try:
            if len(regex.encode()) > MAX_STOP_REGEX_LEN:
                return "sampling_params: too long a stop regex"
            re.compile(regex)
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            return f"sampling_params: stop regex: {error}"
    if any(not math.isfinite(bias) for bias in (params.logit_bias or {}).values()):
        return "sampling_params: logit_bias is not finite"
    return None


def accept_fault(accept: Accept, tokens: int, page_size: int) -> str | None:
    """What is wrong with an answer to an offer of ``tokens`` tokens."""
    if accept.prefix_tokens >= tokens:
        return f"prefix_tokens is {accept.prefix_tokens} of {tokens} tokens"
    if accept.prefix_tokens % page_size:
        return f"prefix_tokens is {accept.prefix_tokens}, no multiple of {page_size}"
    return None


def generate_fault(generate: Generate, facts: WorkerFacts) -> str | None:
    """What is wrong with a request from the controller of another host."""
    spec = generate.spec
    return (
        ids_fault("input_ids", spec.input_ids, facts.vocab_size)
        or spec_fault(spec, facts)
        or sampling_fault(spec.sampling_params, facts.vocab_size, begun=False)
    )


def resume_fault(resume: Resume, facts: WorkerFacts) -> str | None:
    """What is wrong with a request that is to go on here."""
    spec = resume.spec
    if not resume.output_ids:
        return "there is no output to go on from"
    return (
        ids_fault("input_ids", spec.input_ids, facts.vocab_size)
        or ids_fault("output_ids", resume.output_ids, facts.vocab_size)
        or spec_fault(spec, facts)
        or sampling_fault(spec.sampling_params, facts.vocab_size, begun=False)
    )


def commit_fault(commit: Commit, offer: Offer, facts: WorkerFacts) -> str | None:
    """What is wrong with the final state of a request that was offered."""
    state, plain = commit.state, commit.state.plain
    fault = ids_fault("output_ids", state.output_ids, facts.vocab_size)
    if fault is not None:
        return fault
    if not state.output_ids.startswith(offer.output_ids):
        return "the output does not begin with the offered one"
    prompt, output = len(offer.spec.input_ids) // 4, len(state.output_ids) // 4
    if commit.tokens != prompt + output - 1:
        return f"tokens is {commit.tokens}, the request holds {prompt + output - 1}"
    reserved = prompt + len(offer.output_ids) // 4 - 1 + offer.headroom
    if not offer.tokens <= commit.tokens <= reserved:
        return f"tokens is {commit.tokens}, between {offer.tokens} and {reserved} were offered"
    if (plain.surr_offset is None) != (plain.read_offset is None):
        return "surr_offset without read_offset"
    bounds = (
        ("surr_offset", plain.surr_offset, plain.read_offset),
        ("read_offset", plain.read_offset, prompt + output),
        ("send_token_offset", plain.send_token_offset, output),
        ("send_decode_id_offset", plain.send_decode_id_offset, prompt + output),
        ("send_output_token_logprobs_offset", plain.send_output_token_logprobs_offset, output),
        ("detokenized", state.detokenized, output),
        ("reasoning_tokens", plain.reasoning_tokens, output),
    )
    for name, value, most in bounds:
        if value is not None and most is not None and value > most:
            return f"{name} is {value}, at most {most} is possible"
    return prediction_fault(state.prediction, output) or logprob_fault(
        state.logprobs, offer.spec, output, facts.vocab_size
    )


def logprob_fault(
    logprobs: LogprobState, spec: RequestSpec, output: int, vocab_size: int
) -> str | None:
    """What is wrong with log-probabilities of ``output`` output tokens."""
    if spec.return_logprob and logprobs.output_token_logprobs_val is None:
        return "logprobs are missing"
    pairs = (
        ("token", logprobs.output_token_logprobs_val, logprobs.output_token_logprobs_idx),
        ("top", logprobs.output_top_logprobs_val, logprobs.output_top_logprobs_idx),
        (
            "token_ids",
            logprobs.output_token_ids_logprobs_val,
            logprobs.output_token_ids_logprobs_idx,
        ),
    )
    for name, values, ids in pairs:
        if (values is None) != (ids is None):
            return f"{name} logprobs and their ids do not belong together"
        if values is None or ids is None:
            continue
        if not spec.return_logprob and values:
            return f"{name} logprobs of a request that asked for none"
        if len(values) != len(ids) or len(values) > output:
            return f"{len(values)} {name} logprobs, {len(ids)} ids, {output} output tokens"
        for row, row_ids in zip(values, ids, strict=True):
            if isinstance(row_ids, int):
                row_ids = [row_ids]
            elif len(row or ()) != len(row_ids or ()):  # type: ignore[arg-type]
                return f"{name} logprobs: a row and its ids differ in length"
            if max(row_ids or (0,)) >= vocab_size:
                return f"{name} logprobs: a token outside the vocabulary"
    return None


def ids_fault(name: str, packed: bytes, vocab_size: int) -> str | None:
    """What is wrong with packed token ids, of which there must be at least one."""
    if not packed or len(packed) % 4:
        return f"{name} has {len(packed)} bytes, no multiple of 4 above 0"
    ids = np.frombuffer(packed, dtype="<i4")
    if ids.min() < 0 or ids.max() >= vocab_size:
        return f"{name} has a token outside the vocabulary of {vocab_size}"
    return None
