"""Trains a head on collected states; seeded, with early stopping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_ares.srt.policy.types import LEVELS
from sglang_ares.srt.predictor.dataset import Labels
from sglang_ares.srt.predictor.head import L1_UNIT, Floats, Kind, LengthHead, new_head

_MEDIAN: Final = LEVELS.index(0.5)

# Reports an epoch: its number, and the validation MAE in tokens so far and now.
OnEpoch = Callable[[int, float, float], None]


@dataclass(frozen=True)
class TrainingPlan:
    """What determines a head. ``tokens_share``: weight of the loss in tokens beside the one in
    logarithms; ``median_weight``: of the median's loss beside another quantile's. ``averaging``: of
    the weights over the steps (the head is the average)."""

    kind: Kind = "quantile"
    seed: int = 0
    epochs: int = 300
    patience: int = 30
    batch: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    tokens_share: float = 0.95
    median_weight: float = 8.0
    averaging: float = 0.98
    device: str = "cpu"


def median_error(predicted: Floats, labels: Labels) -> float:
    """MAE in tokens of medians ``(N, len(LEVELS))``."""
    return float(np.abs(predicted[:, _MEDIAN] - labels.remaining).mean())


def cap(predicted: Floats, labels: Labels, limit: int) -> Floats:
    """No length exceeds what the request may still produce, of ``limit`` tokens."""
    most: Floats = np.maximum(limit - labels.generated, 0).astype(np.float64)
    return np.minimum(predicted, most[:, None])


def quantile_logs(raw: Tensor) -> Tensor:
    """Raw outputs to the logarithms of the quantiles, ``(B, len(LEVELS))``."""
    gaps = torch.nn.functional.softplus(raw[:, 1:])
    return torch.cat([raw[:, :1], gaps], dim=1).cumsum(dim=1)


def pinball(error: Tensor, median_weight: float) -> Tensor:
    """Mean pinball loss of ``error = actual - predicted``, ``(B, len(LEVELS))``."""
    levels = torch.tensor(LEVELS, device=error.device)
    weights = torch.where(levels == 0.5, median_weight, 1.0)
    losses = torch.maximum(levels * error, (levels - 1) * error)
    return (losses * (weights / weights.mean())).mean()


def loss_of(raw: Tensor, remaining: Tensor, censored: Tensor, plan: TrainingPlan) -> Tensor:
    """The loss of a batch. A length that was cut off is only known to be no shorter: predictions
    above it are right as far as anyone can tell (Powell's censored quantile regression, 1986)."""
    if plan.kind == "l1":
        tokens = raw[:, 0] * L1_UNIT
        tokens = torch.where(censored, torch.minimum(tokens, remaining), tokens)
        return (tokens - remaining).abs().mean() / L1_UNIT
    logs, actual = quantile_logs(raw), torch.log1p(remaining)[:, None]
    logs = torch.where(censored[:, None], torch.minimum(logs, actual), logs)
    in_logs = pinball(actual - logs, plan.median_weight)
    tokens = torch.expm1(logs.clamp(max=12.0))
    in_tokens = pinball(remaining[:, None] - tokens, plan.median_weight) / L1_UNIT
    return (1 - plan.tokens_share) * in_logs + plan.tokens_share * in_tokens


def train_head(
    plan: TrainingPlan,
    train: Labels,
    validation: Labels,
    limit: int,
    on_epoch: OnEpoch | None = None,
) -> LengthHead:
    """The head with the lowest validation MAE; early stop after ``plan.patience`` epochs."""
    device = torch.device(plan.device)
    generator = torch.Generator().manual_seed(plan.seed)
    states = torch.from_numpy(train.states.astype(np.float32)).to(device)
    mean, scale = states.mean(dim=0), states.std(dim=0).clamp(min=1e-3)
    states = (states - mean) / scale
    remaining = torch.from_numpy(train.remaining.astype(np.float32)).to(device)
    censored = torch.from_numpy(train.censored).to(device)
    head = new_head(states.shape[1], plan.kind, generator).to(device, torch.float32)
    if plan.kind == "quantile":
        _start_near(head, train.remaining)
    else:
        head.layers[-1][1].fill_(float(np.median(train.remaining)) / L1_UNIT)
    average = head.to(device, torch.float32)
    average.layers = [(w.clone(), b.clone()) for w, b in head.layers]
    parameters = [t.requires_grad_() for layer in head.layers for t in layer]
    averages = [t for layer in average.layers for t in layer]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    steps = plan.epochs * -(-len(train) // plan.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_error, since = head, float("inf"), 0
    for epoch in range(plan.epochs):
        order = torch.randperm(len(train), generator=generator).to(device)
        for rows in order.split(plan.batch):
            loss = loss_of(_forward(head, states[rows]), remaining[rows], censored[rows], plan)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - plan.averaging)
        candidate = _folded(average, mean, scale)
        predicted = cap(predict(candidate, validation.states), validation, limit)
        error = median_error(predicted, validation)
        since += 1
        if error < best_error:
            best, best_error, since = candidate, error, 0
        if on_epoch is not None:
            on_epoch(epoch, best_error, error)
        if since >= plan.patience:
            break
    return best


def _forward(head: LengthHead, x: Tensor) -> Tensor:
    for weight, bias in head.layers[:-1]:
        x = torch.nn.functional.linear(x, weight, bias).relu()
    return torch.nn.functional.linear(x, *head.layers[-1])


def _start_near(head: LengthHead, remaining: NDArray[np.int64]) -> None:
    """Begin at the quantiles of all lengths, whatever the state."""
    logs = np.log1p(np.quantile(remaining, LEVELS))
    gaps = np.log(np.expm1(np.maximum(np.diff(logs), 1e-2)))
    head.layers[-1][0].mul_(0.1)
    head.layers[-1][1].copy_(torch.tensor([logs[0], *gaps], dtype=torch.float32))


def _folded(head: LengthHead, mean: Tensor, scale: Tensor) -> LengthHead:
    """The same head on states that are not standardised."""
    layers = copy.deepcopy([(w.detach().cpu(), b.detach().cpu()) for w, b in head.layers])
    weight, bias = layers[0]
    weight = weight / scale.cpu()
    layers[0] = (weight, bias - weight @ mean.cpu())
    return LengthHead(head.kind, layers)


@torch.inference_mode()
def predict(head: LengthHead, states: NDArray[Any]) -> Floats:
    """Quantiles ``(N, len(LEVELS))`` of all ``(N, d)`` states."""
    parts = [
        head(torch.from_numpy(np.asarray(states[i : i + 8192], np.float32))).numpy()
        for i in range(0, len(states), 8192)
    ]
    return head.remaining(np.concatenate(parts))
