"""Collects without a cluster: a small Llama decoded in plain torch, many requests at a time.

A token is drawn as a worker draws it, from the request's seed and the token's position. So the
outputs are those that a cluster would give, except where two tokens are so near that rounding
decides; and ``collect`` may go on this way where a cluster has stopped, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_ares.demo_model.decode import BatchDecoder
from sglang_ares.srt.predictor.collection import Collection
from sglang_ares.srt.predictor.recorder import INTERVAL
from sglang_ares.srt.sampling.seeded import multinomial_with_seed

# Rows that have ended are carried along until they are this share of the batch.
_ENDED_SHARE: Final = 0.1
# Upstream leaves so many positions of the context window unused.
_SPARE_POSITIONS: Final = 2


class OfflineError(ValueError):
    """A model that cannot be decoded this way; names the remedy."""


@dataclass
class Decoded:
    """One request. ``states``: ``(labels, d)``, before every ``INTERVAL``-th output token."""

    length: int = 0
    ended: bool = False
    states: list[NDArray[Any]] = field(default_factory=list)


def load_model(path: str, device: str = "cpu") -> Any:
    """The model in float32; raises :class:`OfflineError`."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(path)
    plain = config.model_type == "llama" and not (config.attention_bias or config.mlp_bias)
    rope = getattr(config, "rope_parameters", None) or {}
    if not plain or rope.get("rope_type", "default") != "default":
        raise OfflineError(
            f"--offline decodes plain Llama models only; {path} is {config.model_type!r}, or has "
            "biases or scaled positions. Leave --offline out: a cluster runs any model."
        )
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()


def decode(
    model: Any,
    prompts: list[list[int]],
    seeds: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[Decoded]:
    """Sample an answer to each prompt, with its own seed, and keep hidden states on the way; on the
    model's device."""
    with torch.device(model.device), torch.inference_mode():
        return _decode(model, prompts, seeds, max_new_tokens, temperature)


def _decode(
    model: Any, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
) -> list[Decoded]:
    config = model.config
    stops = torch.tensor(np.atleast_1d(config.eos_token_id))
    lengths = torch.tensor([len(p) for p in prompts])
    limits = (config.max_position_embeddings - _SPARE_POSITIONS - lengths).clamp(max=max_new_tokens)
    all_seeds, result = torch.tensor(seeds), [Decoded() for _ in prompts]
    rows, ended = torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
    decoder = BatchDecoder(model, prompts)
    states = decoder.states(decoder.pending)
    for produced in range(max_new_tokens):
        if produced % INTERVAL == 0:
            _keep(result, rows, ended, states)
        logs = torch.log((decoder.logits_of(states) / temperature).softmax(-1))
        tokens = multinomial_with_seed(logs, all_seeds[rows], lengths[rows] + produced - 1).view(-1)
        by_itself = torch.isin(tokens, stops)
        ending = (by_itself | (produced + 1 >= limits[rows])) & ~ended
        for place in ending.nonzero().view(-1).tolist():
            answer = result[int(rows[place])]
            answer.length, answer.ended = produced + 1, bool(by_itself[place])
        ended |= ending
        if ended.all():
            break
        if ended.sum() >= _ENDED_SHARE * len(rows):
            decoder.keep(~ended)
            rows, tokens = rows[~ended], tokens[~ended]
            ended = torch.zeros(len(rows), dtype=torch.bool)
        states = decoder.states(tokens[:, None])
    return result


def _keep(result: list[Decoded], rows: Tensor, ended: Tensor, states: Tensor) -> None:
    for row, state in zip(rows[~ended].tolist(), states[~ended].half().cpu().numpy(), strict=True):
        result[row].states.append(state)


class OfflineCollection(Collection):
    """Decodes the prompts in this process; plain Llama models."""

    def run(self, device: str = "cpu") -> None:
        """Collect what is missing, ``at_once`` requests a shard."""
        from transformers import AutoTokenizer

        model = load_model(self.model_path, device)
        encode = AutoTokenizer.from_pretrained(self.model_path).encode
        with self.progress():
            for start in range(0, len(self.missing), self.at_once):
                numbers = self.missing[start : start + self.at_once]
                prompts = [encode(self.prompts[n]) for n in numbers]
                seeds = [self.sampling_seed(n) for n in numbers]
                answers = decode(model, prompts, seeds, self.max_new_tokens, self.temperature)
                self._write(numbers, prompts, answers)

    def _write(self, numbers: list[int], prompts: list[list[int]], answers: list[Decoded]) -> None:
        states, rows, records = [], [], []
        for number, prompt, answer in zip(numbers, prompts, answers, strict=True):
            records.append(self.record(number, prompt, answer.length, not answer.ended))
            for i, state in enumerate(answer.states):
                states.append(state)
                rows.append((number, INTERVAL * i, answer.length - INTERVAL * i))
        self.writer.add(np.stack(states), rows, records)
