"""Single requests within one of upstream's output batches."""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.managers.io_struct import (
    BatchTokenIDOutput,
    PickleWrapper,
    unwrap_from_pickle,
    wrap_as_pickle,
)


def first_token(batch: BatchTokenIDOutput, i: int) -> int:
    """Index of the first output token that item ``i`` carries."""
    carried = len(batch.output_ids[i]) if batch.output_ids is not None else 0
    return int(batch.completion_tokens[i]) - carried


def select(batch: BatchTokenIDOutput, items: list[int]) -> BatchTokenIDOutput:
    """A batch with only these items: every field that has one value per item is cut down."""
    count = len(batch.rids)

    def cut(value: Any) -> Any:
        if isinstance(value, PickleWrapper):
            return wrap_as_pickle(cut(unwrap_from_pickle(value)))
        if isinstance(value, dict):
            return {name: cut(column) for name, column in value.items()}
        if isinstance(value, list) and len(value) == count:
            return [value[i] for i in items]
        return value

    fields = msgspec.structs.asdict(batch)
    return type(batch)(**{name: cut(value) for name, value in fields.items()})
