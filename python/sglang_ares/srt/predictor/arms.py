"""The arms of the evaluation: trained once, then kept beside the head as predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sglang_ares.srt.predictor.baselines import (
    PROMPT_ONLY_RATIO,
    PromptModelPlan,
    mean_arm,
    prompt_only_arm,
    survival_arm,
    train_prompt_model,
)
from sglang_ares.srt.predictor.card import HeadCard, load_head, save_head
from sglang_ares.srt.predictor.dataset import SPLITS, Labels, load_info, load_split
from sglang_ares.srt.predictor.head import LengthHead
from sglang_ares.srt.predictor.smoothing import calibrated, choose_weight, smoothed
from sglang_ares.srt.predictor.training import (
    OnEpoch,
    TrainingPlan,
    cap,
    median_error,
    predict,
    train_head,
)

ARMS: Final = ("mean", "survival", "prompt_only", "l1", "ours")
ARMS_FILE: Final = "arms.npz"

# Called with an arm's name at its start; returns what is told of its epochs.
Report = Callable[[str], OnEpoch]


def train_arms(
    folder: Path, out: Path, plan: TrainingPlan, report: Report, compared: bool = True
) -> HeadCard:
    """Train a head on a data set and write it to ``out``, with the arms that it is ``compared``
    with. Parts that an interrupted run has finished are read from there."""
    info = load_info(folder)
    train, validation, test = (load_split(folder, split) for split in SPLITS)
    limit = info.max_new_tokens
    labels: dict[str, Any] = {
        "prompts": info.prompts,
        "seed": info.seed,
        "temperature": info.temperature,
        "max_new_tokens": limit,
        "requests": {s: len(x.requests) for s, x in zip(SPLITS, (train, validation, test))},
        "labels": {s: len(x) for s, x in zip(SPLITS, (train, validation, test))},
    }
    data: dict[str, Any] = {
        **labels,
        "training": msgspec.to_builtins(plan),
        "torch": str(torch.__version__),
    }

    def trained(kind: Any) -> LengthHead:
        part = out / "parts" / kind
        if (part / "card.json").exists() and load_head(part)[1].data == data:
            return load_head(part)[0]
        head = train_head(replace(plan, kind=kind), train, validation, limit, report(kind))
        save_head(part, head, info.model, smoothing=1.0, data=data, metrics={})
        return head

    head = trained("quantile")
    weight, by_weight = choose_weight(predict(head, validation.states), validation, limit)
    head = calibrated(head, validation, weight, limit)
    parameters = {"ours": head.parameters}
    if compared:
        l1 = trained("l1")
        least = int(np.ceil(PROMPT_ONLY_RATIO * head.parameters))
        wanted = PromptModelPlan(least, plan.seed, device=plan.device)
        part = out / "parts" / "prompt_only.npz"
        prompt_only, parameters["prompt_only"] = _prompt_only(
            part, wanted, f"{labels} {replace(wanted, device='')}", train, validation, test, report
        )
        parameters["l1"] = l1.parameters
        arms = {
            "mean": mean_arm(train, test),
            "survival": survival_arm(train, test),
            "prompt_only": prompt_only,
            "l1": predict(l1, test.states)[:, 0],
        }
        columns: dict[str, Any] = {name: v.astype(np.float32) for name, v in arms.items()}
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / ARMS_FILE, rows=test.rows, **columns)
    else:
        (out / ARMS_FILE).unlink(missing_ok=True)
    estimate = cap(smoothed(predict(head, test.states), test, weight), test, limit)
    return save_head(
        out,
        head,
        info.model,
        smoothing=weight,
        data=data,
        metrics={
            "test_mae": round(median_error(estimate, test), 2),
            "validation_mae_by_smoothing": by_weight,
            "parameters": parameters,
        },
    )


def _prompt_only(
    path: Path,
    plan: PromptModelPlan,
    of: str,
    train: Labels,
    validation: Labels,
    test: Labels,
    report: Report,
) -> tuple[NDArray[np.float64], int]:
    """Its predictions and parameters; read from ``path`` if they were made ``of`` the same."""
    if path.exists():
        with np.load(path) as kept:
            if kept["of"].tobytes().decode() == of:
                return kept["predicted"], int(kept["parameters"])
    model = train_prompt_model(plan, train, validation, report("prompt_only"))
    predicted = prompt_only_arm(model, test)
    count = model.parameters_count
    np.savez(path, predicted=predicted, parameters=count, of=np.frombuffer(of.encode(), np.uint8))
    return predicted, count


def our_arm(head: LengthHead, card: HeadCard, test: Labels, limit: int) -> NDArray[np.float64]:
    """``(N, len(LEVELS))`` estimates: predicted, smoothed, capped."""
    return cap(smoothed(predict(head, test.states), test, card.smoothing), test, limit)
