"""What the head is compared with: averages, a survival prior, and a model that reads the prompt."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sglang_ares.srt.policy.types import LEVELS
from sglang_ares.srt.predictor.dataset import Labels
from sglang_ares.srt.predictor.head import Floats
from sglang_ares.srt.predictor.training import OnEpoch

# The published ratio of the prompt-only model's parameters to the head's: 125.2 M to 8.42 M.
PROMPT_ONLY_RATIO: Final = 14.9
_UNIT: Final = 100.0


def request_lengths(labels: Labels) -> NDArray[np.int64]:
    """``(R,)`` the requests' output tokens, one value each."""
    return np.array([labels.requests[n].length for n, _ in labels.by_request()], np.int64)


def mean_arm(train: Labels, test: Labels) -> Floats:
    """``(N,)`` the average remaining length of all training labels."""
    return np.full(len(test), float(train.remaining.mean()))


def survival_arm(train: Labels, test: Labels) -> Floats:
    """``(N, 1 + len(LEVELS))`` expected remaining length of the training requests that had come
    as far, and its quantiles; of the longest where none had."""
    lengths = np.sort(request_lengths(train))
    result = np.zeros((len(test), 1 + len(LEVELS)))
    for generated in np.unique(test.generated):
        beyond = lengths[np.searchsorted(lengths, generated, side="right") :] - generated
        beyond = beyond if len(beyond) else np.array([0])
        rows = test.generated == generated
        result[rows, 0] = beyond.mean()
        result[rows, 1:] = np.quantile(beyond, LEVELS)
    return result


@dataclass(frozen=True)
class PromptModelPlan:
    """``width``, ``blocks``: of the transformer; grown until it has the wanted parameters."""

    least_parameters: int
    seed: int = 0
    epochs: int = 100
    patience: int = 10
    batch: int = 64
    learning_rate: float = 1e-3
    device: str = "cpu"


class PromptModel(nn.Module):
    """A transformer that reads a prompt once and says how long the output will be."""

    def __init__(self, vocabulary: int, width: int, blocks: int, longest: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary + 1, width, padding_idx=vocabulary)
        self.place = nn.Embedding(longest, width)
        block = nn.TransformerEncoderLayer(
            width, nhead=max(1, width // 32), dim_feedforward=4 * width, dropout=0.1,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, T)`` token ids, padded with the last id, to ``(B,)`` lengths in units."""
        pad = ids == self.token.padding_idx
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=pad)
        x = x.masked_fill(pad[..., None], 0.0).sum(1) / (~pad).sum(1, keepdim=True)
        return self.out(x)[:, 0]

    @property
    def parameters_count(self) -> int:
        """All weights."""
        return sum(p.numel() for p in self.parameters())


@dataclass(frozen=True)
class _Requests:
    """Prompts ``(R, T)``, lengths ``(R,)``, and where the labels lie: ``(R, most labels)`` tokens
    generated, and whether there is such a label."""

    ids: Tensor
    lengths: Tensor
    generated: Tensor
    labelled: Tensor

    def to(self, device: str) -> _Requests:
        """On a device."""
        parts = (self.ids, self.lengths, self.generated, self.labelled)
        return _Requests(*(part.to(device) for part in parts))

    def errors(self, rows: Tensor | slice, totals: Tensor) -> Tensor:
        """``(rows, most labels)`` absolute errors of predicted totals; 0 where no label is."""
        generated, lengths = self.generated[rows], self.lengths[rows, None]
        left = (totals[:, None] - generated).relu()
        # At the start a total below 0 must still be pulled up.
        left = torch.where(generated > 0, left, totals[:, None])
        return (left - (lengths - generated)).abs() * self.labelled[rows]


def _requests(labels: Labels, vocabulary: int, longest: int) -> _Requests:
    places = labels.by_request()
    ids = torch.full((len(places), longest), vocabulary)
    most = max(rows.stop - rows.start for _, rows in places)
    generated = torch.zeros(len(places), most)
    labelled = torch.zeros(len(places), most, dtype=torch.bool)
    for i, (number, rows) in enumerate(places):
        prompt = labels.requests[number].prompt_ids[-longest:]
        ids[i, : len(prompt)] = torch.tensor(prompt)
        own = labels.generated[rows]
        generated[i, : len(own)] = torch.from_numpy(own)
        labelled[i, : len(own)] = True
    lengths = torch.from_numpy(request_lengths(labels)).float()
    return _Requests(ids, lengths, generated, labelled)


def train_prompt_model(
    plan: PromptModelPlan,
    train: Labels,
    validation: Labels,
    on_epoch: OnEpoch | None = None,
) -> PromptModel:
    """Trained on what it is judged on: the mean over all labels of the absolute error of the
    predicted length less the tokens generated, not below 0. (L1 on the length, which punishes
    a length that a label has already passed, would leave it far worse than the mean.)"""
    records = [*train.requests.values(), *validation.requests.values()]
    vocabulary = 1 + max(max(r.prompt_ids) for r in records)
    longest = min(512, max(len(r.prompt_ids) for r in records))
    torch.manual_seed(plan.seed)
    width = 64
    while (
        model := PromptModel(vocabulary, width, 2, longest)
    ).parameters_count < plan.least_parameters:
        width += 32
    model = model.to(plan.device)
    data = _requests(train, vocabulary, longest).to(plan.device)
    held_out = _requests(validation, vocabulary, longest).to(plan.device)
    nn.init.constant_(model.out[1].bias, float(data.lengths.median()) / _UNIT)
    labels_each = len(train) / len(data.ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(plan.seed)
    best, best_error, since = copy.deepcopy(model.state_dict()), float("inf"), 0
    for epoch in range(plan.epochs):
        model.train()
        order = torch.randperm(len(data.ids), generator=generator).to(plan.device)
        for rows in order.split(plan.batch):
            errors = data.errors(rows, model(data.ids[rows]) * _UNIT)
            loss = errors.sum() / (labels_each * len(rows) * _UNIT)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            off = held_out.errors(slice(None), _totals(model, held_out.ids))
            error = float(off.sum() / held_out.labelled.sum())
        since += 1
        if error < best_error:
            best, best_error, since = copy.deepcopy(model.state_dict()), error, 0
        if on_epoch is not None:
            on_epoch(epoch, best_error, error)
        if since >= plan.patience:
            break
    model.load_state_dict(best)
    return model.cpu().eval()


def _totals(model: PromptModel, ids: Tensor) -> Tensor:
    """``(R,)`` predicted lengths, tokens."""
    return torch.cat([model(part) for part in ids.split(256)]) * _UNIT


@torch.inference_mode()
def prompt_only_arm(model: PromptModel, test: Labels) -> Floats:
    """``(N,)`` the predicted length less the tokens generated; not below 0."""
    vocabulary, longest = int(model.token.padding_idx or 0), model.place.num_embeddings
    data = _requests(test, vocabulary, longest)
    totals = _totals(model, data.ids).double().numpy()
    spread = np.repeat(totals, data.labelled.sum(1).numpy())
    return np.maximum(spread - test.generated, 0.0)
