"""What stands in for the model's forward: a step of the emulated device, and tokens that follow
from the tokens before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    from sglang_ares.srt.emulation.device import EmulatedDevice


class EmulatedForward:
    """Replaces ``TpModelWorker.forward_batch_generation`` in the workers of one process.

    A token is a function of the token before it and of its position, so that an answer is the
    same wherever, and on however many workers, it is produced, and shows a token that was lost,
    repeated or swapped on the way.
    """

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device

    def __call__(
        self, tp_worker: Any, batch: ScheduleBatch, **kwargs: Any
    ) -> GenerationBatchResult:
        """One step; logits, and all that is made from them, do not exist."""
        if batch.forward_mode.is_extend():
            ends = [a + b for a, b in zip(batch.prefix_lens, batch.extend_lens, strict=True)]
            self._device.prefill(zip(batch.prefix_lens, ends, strict=True))
            last = batch.input_ids[torch.tensor(batch.extend_lens).cumsum(0) - 1]
        else:
            self._device.decode(len(batch.reqs), int(batch.seq_lens.sum()))
            last = batch.input_ids
        return GenerationBatchResult(
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            next_token_ids=next_tokens(last, batch.seq_lens, tp_worker.model_config.vocab_size),
        )


def next_tokens(last: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``(N,)`` int64 tokens after ``last`` ``(N,)`` at ``positions`` ``(N,)``, from the second
    quarter of the vocabulary, where common tokenizers have neither special tokens nor, for the
    demo model's bytes, anything but printable characters."""
    quarter = vocab_size // 4
    return quarter + (31 * last.to(torch.int64) + 17 * positions.to(torch.int64)) % quarter
