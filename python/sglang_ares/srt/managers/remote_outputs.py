"""Outputs of a worker on another host, as they travel to the token ledger: upstream's batch
without anything that would have to be unpickled."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from sglang.srt.managers.io_struct import BatchTokenIDOutput
from sglang.srt.utils.weight_versions import WeightVersionSpan

from sglang_ares.srt.disaggregation.request_state import pack_ids, unpack_ids
from sglang_ares.srt.security.bounds import Count, Label, Rid

_Text = Annotated[str, msgspec.Meta(max_length=1 << 24)]
_Number = Annotated[int, msgspec.Meta(ge=-(2**62), lt=2**62)]
_FinishReason = dict[Label, _Text | _Number | list[_Number] | None]
_Rows = list[list[float | None] | None] | None
_IdRows = list[list[_Number | None] | None] | None
_TopRows = list[list[list[float] | None] | None] | None
_TopIdRows = list[list[list[_Number] | None] | None] | None


class VersionSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens [start, end) were computed with weights ``version``."""

    version: Label
    start: Count
    end: Count


class OutputBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Columns of upstream's ``BatchTokenIDOutput``, one value per request; a column that upstream
    left out is None. Token ids are little-endian int32."""

    rids: list[Rid]
    finished_reasons: list[_FinishReason | None]
    decoded_texts: list[_Text]
    decode_ids: list[bytes]
    read_offsets: list[Count]
    output_ids: list[bytes]
    skip_special_tokens: list[bool]
    spaces_between_special_tokens: list[bool]
    no_stop_trim: list[bool]
    prompt_tokens: list[Count]
    reasoning_tokens: list[Count]
    completion_tokens: list[Count]
    cached_tokens: list[Count]
    cached_tokens_details: list[dict[Label, Count | Label] | None] | None
    retraction_counts: list[Count] | None
    weight_versions: list[list[VersionSpan] | None] | None
    input_token_logprobs_val: _Rows
    input_token_logprobs_idx: _IdRows
    output_token_logprobs_val: _Rows
    output_token_logprobs_idx: _IdRows
    input_top_logprobs_val: _TopRows
    input_top_logprobs_idx: _TopIdRows
    output_top_logprobs_val: _TopRows
    output_top_logprobs_idx: _TopIdRows
    input_token_ids_logprobs_val: _TopRows
    input_token_ids_logprobs_idx: _TopIdRows
    output_token_ids_logprobs_val: _TopRows
    output_token_ids_logprobs_idx: _TopIdRows


_COLUMNS: Final = OutputBatch.__struct_fields__
_ID_COLUMNS: Final = ("decode_ids", "output_ids")
# Columns that stay behind because the front needs none of them: its own latencies stand in for
# the worker's; a cluster has no DP ranks; inputs are text, and nothing is drafted.
NOT_NEEDED: Final = (
    "http_worker_ipcs",
    "time_stats",
    "dp_ranks",
    "token_steps",
    "image_tokens",
    "audio_tokens",
    "video_tokens",
    "placeholder_tokens_idx",
    "placeholder_tokens_val",
    "spec_verify_ct",
    "spec_num_correct_drafts",
    "spec_num_block_accept_tokens",
    "spec_num_cap_tokens",
    "spec_correct_drafts_histogram",
    "spec_cap_lens_histogram",
)
# Columns that cannot travel. Requests that fill them are given to workers of the front's host.
STAY: Final = (
    "output_token_entropy_val",
    "output_token_sampling_mask",
    "output_hidden_states",
    "routed_experts",
    "indexer_topk",
    "beam_search_output",
    "customized_info",
    "input_top_logprobs_val_flat",
    "input_top_logprobs_idx_flat",
    "input_top_logprobs_flat_null_prefix",
)


def pack_batch(batch: BatchTokenIDOutput) -> OutputBatch:
    """What travels of ``batch``. A request with a value in a column that cannot travel ends with
    an error that says so."""
    values = {name: _plain(getattr(batch, name)) for name in _COLUMNS if name not in _ID_COLUMNS}
    empty: list[list[int]] = [[] for _ in batch.rids or ()]
    for name in _ID_COLUMNS:
        values[name] = [pack_ids(ids) for ids in getattr(batch, name) or empty]
    for i, column in _stranded(batch).items():
        values["finished_reasons"] = list(values["finished_reasons"])
        values["finished_reasons"][i] = {
            "type": "abort",
            "message": f"{column} cannot travel from a worker on another host",
            "status_code": 501,
            "err_type": "NotImplementedError",
        }
    return OutputBatch(**values)


def unpack_batch(packed: OutputBatch) -> BatchTokenIDOutput:
    """Upstream's form of what arrived; see :func:`batch_fault`."""
    columns = {name: getattr(packed, name) for name in _COLUMNS}
    for name in _ID_COLUMNS:
        columns[name] = [unpack_ids(ids) for ids in columns[name]]
    if packed.weight_versions is not None:
        columns["weight_versions"] = [
            spans and [WeightVersionSpan(**msgspec.structs.asdict(s)) for s in spans]
            for spans in packed.weight_versions
        ]
    return BatchTokenIDOutput(
        http_worker_ipcs=[None] * len(packed.rids),
        placeholder_tokens_idx=None,
        placeholder_tokens_val=None,
        output_token_entropy_val=None,
        output_token_sampling_mask=None,
        output_hidden_states=None,
        routed_experts=None,
        indexer_topk=None,
        **columns,
    )


def batch_fault(packed: OutputBatch) -> str | None:
    """What is wrong with a batch that decodes, if anything."""
    count = len(packed.rids)
    for name in _COLUMNS:
        column = getattr(packed, name)
        # Upstream leaves columns of log-probabilities empty if nobody asked for them.
        if column is not None and len(column) not in (
            (0, count) if "logprobs" in name else (count,)
        ):
            return f"{name} has {len(column)} values for {count} requests"
    for name in _ID_COLUMNS:
        if any(len(ids) % 4 for ids in getattr(packed, name)):
            return f"{name} has half a token"
    for i in range(count):
        if len(packed.output_ids[i]) // 4 > packed.completion_tokens[i]:
            return f"output_ids has more tokens than the {packed.completion_tokens[i]} there are"
    return None


def _stranded(batch: BatchTokenIDOutput) -> dict[int, str]:
    """Requests, by index, with a value that cannot travel: the column's name."""
    stranded: dict[int, str] = {}
    for name in STAY:
        column = getattr(batch, name)
        for i in range(len(batch.rids or ())):
            value = column[i : i + 1] if isinstance(column, list) else [column]
            if any(v is not None and not _is_empty(v) for v in value):
                stranded[i] = name
    return stranded


def _is_empty(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) and not value


def _plain(value: Any) -> Any:
    """Lists and numbers only; upstream may hold rows of log-probabilities as tensors or tuples,
    and spans of weight versions in a type of its own."""
    if isinstance(value, WeightVersionSpan):
        return VersionSpan(version=value.version, start=value.start, end=value.end)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
