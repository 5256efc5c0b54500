"""Trains the embedded default model; ``python -m sglang_ares.demo_model.train --out DIR --seed 0``.

The budget is a number of steps, so that the seed determines the weights (on one kind of CPU and
torch build).  On two cores without other work a step takes a third of a second, all of the default
budget about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from . import MODEL_DIR
from .corpus import IGNORE, MAX_POSITION, make_batch
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, save_tokenizer

BATCH_TOKENS = 8192
SHORT, LONG, LONGER, LONGEST = 256, 2048, 4096, 8192
"""Row lengths: most batches are short, some long ones teach not to mind what is far behind."""


@dataclass(frozen=True)
class TrainingPlan:
    """What determines the weights."""

    seed: int = 0
    steps: int = 2500
    learning_rate: float = 3e-3
    warmup: int = 60


def model_config() -> LlamaConfig:
    """The architecture.  Heads of 64 are the smallest that all usual attention kernels take."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITION,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config())
    with torch.no_grad():  # the default of 0.02 starts a model this narrow too slowly
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.05)
    return model


def row_length(step: int, plan: TrainingPlan) -> int:
    """The row length of a step: short ones first, then every sixth step longer ones."""
    if step < plan.steps // 5 or step % 6:
        return SHORT
    if step % 36 == 0:
        return LONGEST
    return LONGER if step % 36 == 18 else LONG


def learning_rate_factor(step: int, plan: TrainingPlan) -> float:
    """Warm-up, then a cosine down to nothing."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / (plan.steps - plan.warmup)))


def make_optimizer(model: LlamaForCausalLM, plan: TrainingPlan) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)


def batch_loss(model: LlamaForCausalLM, length: int, rng: random.Random) -> torch.Tensor:
    """The loss of a fresh batch of rows of the given length."""
    batch = make_batch(BATCH_TOKENS // length, length, rng)
    ids = torch.from_numpy(batch.ids)
    # The mask of ones says that the jumps in the positions do not part packed sequences.
    # Servers run the model in half precision, so it is trained with bfloat16 arithmetic as well.
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(
            input_ids=ids,
            position_ids=torch.from_numpy(batch.positions),
            attention_mask=torch.ones_like(ids),
            use_cache=False,
        ).logits
    labels = torch.from_numpy(batch.labels)
    return functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE
    )


def train(plan: TrainingPlan, progress: bool = True) -> tuple[LlamaForCausalLM, float]:
    """Train a model; returns it with its final loss (mean of the last 50 short batches)."""
    model = new_model(plan.seed)
    optimizer = make_optimizer(model, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, plan)
    )
    rng = random.Random(plan.seed)
    losses: list[float] = []
    bar = tqdm(range(plan.steps), disable=not progress, mininterval=5)
    for step in bar:
        length = row_length(step, plan)
        loss = batch_loss(model, length, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if length == SHORT:
            losses.append(loss.item())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
    tail = losses[-50:]
    return model, sum(tail) / len(tail)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights, configurations and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "model.safetensors").chmod(0o644)  # written as private; the package is not


def main() -> None:
    """Command line."""
    defaults = TrainingPlan()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="the training budget")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = TrainingPlan(seed=args.seed, steps=args.steps)
    started, used = time.perf_counter(), time.process_time()
    model, final_loss = train(plan)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    save(model, args.out)
    card = {
        "parameters": model.num_parameters(),
        "training": {
            "command": f"python -m sglang_ares.demo_model.train --seed {plan.seed} "
            f"--steps {plan.steps}",
            "seed": plan.seed,
            "steps": plan.steps,
            "tokens": plan.steps * BATCH_TOKENS,
            "final_loss": round(final_loss, 4),
            "seconds": round(seconds),
            "cpu_seconds": round(used),
            "machine": f"{len(os.sched_getaffinity(0))} cores",
            "torch": torch.__version__,
        },
    }
    # A new card: figures of earlier weights must not stay beside these ones.
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
