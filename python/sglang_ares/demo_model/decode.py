"""Batched sampling from the demo model in plain torch, without an inference engine.

``model.generate`` keeps finished sequences in the batch and copies its whole cache at every
token; with lengths this uneven that costs more than the few lines here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from .tokenizer import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID, encode_bytes

COMPACT_EVERY = 32
GROW = 512


@dataclass(frozen=True)
class Generation:
    """A sampled answer: its tokens without EOS, and whether EOS ended it."""

    tokens: tuple[int, ...]
    ended: bool

    @property
    def text(self) -> str:
        """The tokens as text, special ones left out."""
        values = bytes(token - BYTE_OFFSET for token in self.tokens if token >= BYTE_OFFSET)
        return values.decode(errors="replace")

    @property
    def length(self) -> int:
        """Generated tokens, the EOS among them, as a server counts them."""
        return len(self.tokens) + int(self.ended)


def prompt_ids(prompt: str) -> list[int]:
    """The token ids of a prompt, as the tokenizer gives them."""
    return [BOS_ID, *encode_bytes(prompt).tolist()]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class BatchDecoder:
    """A left-padded batch with its key-value cache; rows can be dropped as they finish."""

    def __init__(self, model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
        config = model.config
        self.model = model.model
        self.eps: float = config.rms_norm_eps
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.output = model.lm_head.weight
        self.inverse_frequency: Tensor = self.model.rotary_emb.inv_freq
        width = max(len(p) for p in prompts)
        self.pad = torch.tensor([width - len(p) for p in prompts])
        self.size = 0
        shape = (len(prompts), self.kv_heads, 0, self.head_dim)
        empty = torch.zeros(shape, dtype=self.output.dtype)
        self.keys = [empty for _ in range(config.num_hidden_layers)]
        self.values = [empty for _ in range(config.num_hidden_layers)]
        self.pending = torch.tensor([[PAD_ID] * (width - len(p)) + p for p in prompts])

    def _reserve(self, size: int) -> None:
        missing = size - self.keys[0].shape[2]
        if missing > 0:
            extra = -(-missing // GROW) * GROW
            self.keys = [functional.pad(k, (0, 0, 0, extra)) for k in self.keys]
            self.values = [functional.pad(v, (0, 0, 0, extra)) for v in self.values]

    def _heads_of(self, x: Tensor, weight: Tensor, heads: int) -> Tensor:
        rows, new, _ = x.shape
        return functional.linear(x, weight).view(rows, new, heads, self.head_dim).transpose(1, 2)

    def logits(self, ids: Tensor) -> Tensor:
        """Feed ``ids`` of shape (rows, new); returns the logits after the last of them."""
        return self.logits_of(self.states(ids))

    @torch.inference_mode()
    def logits_of(self, states: Tensor) -> Tensor:
        """The logits of last-layer ``states`` of shape (rows, hidden size)."""
        return functional.linear(states, self.output).float()

    @torch.inference_mode()
    def states(self, ids: Tensor) -> Tensor:
        """Feed ``ids`` of shape (rows, new); returns the normed states after the last of them."""
        rows, new = ids.shape
        start, end = self.size, self.size + new
        self._reserve(end)
        places = torch.arange(start, end)
        positions = (places[None] - self.pad[:, None]).clamp(min=0)
        angles = positions[:, None, :, None].float() * self.inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(self.output.dtype), angles.sin().to(self.output.dtype)
        mask = self._mask(places)
        x = self.model.embed_tokens.weight[ids]
        for i, layer in enumerate(self.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            h = _rms_norm(x, layer.input_layernorm.weight, self.eps)
            query = _rotate(self._heads_of(h, attention.q_proj.weight, self.heads), cos, sin)
            key = _rotate(self._heads_of(h, attention.k_proj.weight, self.kv_heads), cos, sin)
            self.keys[i][:, :, start:end] = key
            value = self._heads_of(h, attention.v_proj.weight, self.kv_heads)
            self.values[i][:, :, start:end] = value
            mixed = self._attend(query, self.keys[i][:, :, :end], self.values[i][:, :, :end], mask)
            mixed = mixed.transpose(1, 2).reshape(rows, new, -1)
            x = x + functional.linear(mixed, attention.o_proj.weight)
            h = _rms_norm(x, layer.post_attention_layernorm.weight, self.eps)
            gate = functional.silu(functional.linear(h, mlp.gate_proj.weight))
            up = functional.linear(h, mlp.up_proj.weight)
            x = x + functional.linear(gate * up, mlp.down_proj.weight)
        self.size = end
        return _rms_norm(x[:, -1], self.model.norm.weight, self.eps)

    def _mask(self, places: Tensor) -> Tensor:
        """What the tokens at ``places`` see: (rows, 1, new, columns) up to the last of them, or of
        one new token only the columns that may be padding."""
        if len(places) == 1:
            return (
                torch.arange(int(self.pad.max()))[None, None, None] >= self.pad[:, None, None, None]
            )
        columns = torch.arange(int(places[-1]) + 1)
        seen = columns[None, None] <= places[None, :, None]
        seen = seen & (columns[None, None] >= self.pad[:, None, None])
        # A padding row attends to itself; its result is never used but must not become NaN.
        return (seen | (columns[None, None] == places[None, :, None]))[:, None]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of (rows, heads, new, head size) queries, masked as :meth:`_mask` says."""
        rows, _, new, size = query.shape
        if new > 1:
            return functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, enable_gqa=True
            )
        # Nothing is copied for heads that share keys, nor for a mask as long as the context.
        scores = (query.view(rows, self.kv_heads, -1, size) * size**-0.5) @ keys.transpose(2, 3)
        scores[..., : mask.shape[-1]].masked_fill_(~mask, float("-inf"))
        return (scores.softmax(-1) @ values).view(rows, self.heads, 1, size)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.pad = self.pad[rows]
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    seed: int,
    greedy: bool = False,
    chunk: int = 512,
    report: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Sample an answer to each prompt at temperature 1 (or take the likeliest tokens).

    ``report`` is called now and then with the number of rows still running.
    """
    random = torch.Generator().manual_seed(seed)
    decoder = BatchDecoder(model, prompts)
    for part in decoder.pending.split(chunk, dim=1):
        logits = decoder.logits(part)
    rows = torch.arange(len(prompts))
    running = torch.ones(len(prompts), dtype=torch.bool)
    written: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step in range(max_new_tokens):
        if greedy:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
        stopped = tokens == EOS_ID
        for row, token in zip(rows[running].tolist(), tokens[running].tolist(), strict=True):
            if token == EOS_ID:
                ended[row] = True
            else:
                written[row].append(token)
        running &= ~stopped
        left = int(running.sum())
        if not left:
            break
        # Finished rows are carried along until a share of the batch can be dropped at once.
        if left < (0.95 if step % COMPACT_EVERY == 0 else 0.5) * len(rows):
            decoder.keep(running)
            rows, tokens = rows[running], tokens[running]
            running = running[running]
        if report and step % 100 == 0:
            report(left)
        logits = decoder.logits(tokens[:, None])
    return [Generation(tuple(t), e) for t, e in zip(written, ended, strict=True)]
