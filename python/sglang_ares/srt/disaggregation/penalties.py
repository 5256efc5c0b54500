"""Rebuilds the sampling penalties of a request that arrives with output.

Upstream feeds its penalizers one output token per step. For a moved request the same state is
computed from the token counts of its output. Sums of equal float32 terms are accumulated one by
one, as upstream does, so that not even rounding tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


def fed_tokens(output_ids: Sequence[int], *, overlap: bool) -> Sequence[int]:
    """The tokens upstream's penalizers have been fed before the next step is prepared.

    Preparing a step feeds the newest output token. Under overlap scheduling the newest token is
    not known yet at that point: the first token is fed twice and all later ones a step late.
    """
    if not overlap:
        return output_ids[:-1]
    if len(output_ids) < 2:
        return output_ids[:0]
    return list(output_ids[:1]) + list(output_ids[:-2])


def seed_penalties(batch: ScheduleBatch, moved: Sequence[Req], *, overlap: bool) -> None:
    """Bring the penalizers of a just prepared batch to where ``moved`` requests left off."""
    orchestrator = batch.sampling_info.penalizer_orchestrator
    if not orchestrator.is_required:
        return
    for row, req in enumerate(batch.reqs):
        if req in moved:
            tokens = np.asarray(fed_tokens(req.output_ids, overlap=overlap), dtype=np.int64)
            for penalizer in orchestrator.penalizers.values():
                _seed_row(penalizer, row, tokens)


def _seed_row(penalizer: Any, row: int, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    if not penalizer._is_prepared or len(tokens) == 0:
        return
    unique, counts = np.unique(tokens, return_counts=True)
    index = torch.from_numpy(unique)
    kind = type(penalizer).__name__
    if kind == "BatchedFrequencyPenalizer":
        state = penalizer.cumulated_frequency_penalties
        term = penalizer.frequency_penalties[row, 0].item()
        sums = np.cumsum(np.full(int(counts.max()), term, dtype=np.float32), dtype=np.float32)
        state[row, index.to(state.device)] = torch.from_numpy(sums[counts - 1]).to(state.device)
    elif kind == "BatchedPresencePenalizer":
        state = penalizer.cumulated_presence_penalties
        state[row, index.to(state.device)] = penalizer.presence_penalties[row, 0]
    elif kind == "BatchedRepetitionPenalizer":
        state = penalizer.cumulated_repetition_penalties
        state[row, index.to(state.device)] = penalizer.repetition_penalties[row, 0]
    elif kind == "BatchedMinNewTokensPenalizer":
        penalizer.len_output_tokens[row] = len(tokens)
    else:
        raise TypeError(f"unknown penalizer {kind}: upstream has one that cannot be rebuilt yet")
