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


def train_arms(folder: Path, out: Path, plan: TrainingPlan, report: Report) -> HeadCard:
    """Train head and baselines on a data set and write them to ``out``. Parts that an interrupted
    run has finished are read from there."""
    info = load_info(folder)
    train, validation, test = (load_split(folder, split) for split in SPLITS)
    limit = info.max_new_tokens
    data: dict[str, Any] = {
        "prompts": info.prompts,
        "seed": info.seed,
        "temperature": info.temperature,
        "max_new_tokens": limit,
        "requests": {s: len(x.requests) for s, x in zip(SPLITS, (train, validation, test))},
        "labels": {s: len(x) for s, x in zip(SPLITS, (train, validation, test))},
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

    l1, head = trained("l1"), trained("quantile")
    weight, by_weight = choose_weight(predict(head, validation.states), validation, limit)
    head = calibrated(head, validation, weight, limit)
    arms: dict[str, NDArray[np.float64]] = {
        "mean": mean_arm(train, test),
        "survival": survival_arm(train, test),
    }
    prompt_path = out / "parts" / "prompt_only.npz"
    if prompt_path.exists() and np.load(prompt_path)["of"].tobytes().decode() == str(data):
        kept = np.load(prompt_path)
        arms["prompt_only"], parameters = kept["predicted"], int(kept["parameters"])
    else:
        wanted = PromptModelPlan(int(np.ceil(PROMPT_ONLY_RATIO * head.parameters)), plan.seed)
        model = train_prompt_model(wanted, train, validation, report("prompt_only"))
        arms["prompt_only"], parameters = prompt_only_arm(model, test), model.parameters_count
        np.savez(
            prompt_path,
            predicted=arms["prompt_only"],
            parameters=parameters,
            of=np.frombuffer(str(data).encode(), np.uint8),
        )
    arms["l1"] = predict(l1, test.states)[:, 0]
    estimate = cap(smoothed(predict(head, test.states), test, weight), test, limit)
    card = save_head(
        out,
        head,
        info.model,
        smoothing=weight,
        data=data,
        metrics={
            "test_mae": round(median_error(estimate, test), 2),
            "validation_mae_by_smoothing": by_weight,
            "parameters": {"ours": head.parameters, "l1": l1.parameters, "prompt_only": parameters},
        },
    )
    columns: dict[str, Any] = {name: v.astype(np.float32) for name, v in arms.items()}
    np.savez_compressed(out / ARMS_FILE, rows=test.rows, **columns)
    return card


def our_arm(head: LengthHead, card: HeadCard, test: Labels, limit: int) -> NDArray[np.float64]:
    """``(N, len(LEVELS))`` estimates: predicted, smoothed, capped."""
    return cap(smoothed(predict(head, test.states), test, card.smoothing), test, limit)
