"""Measures the demo model: lengths of sampled answers, accuracy of its steps, ``card.json``.

``python -m sglang_ares.demo_model.evaluate [--prompts 1000 --seed 1 --max-new-tokens 8192]``
samples the default workload at temperature 1 and writes what it found beside the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from . import MODEL_DIR, tasks
from .decode import Generation, generate, prompt_ids
from .tokenizer import BOS_ID, encode_bytes

LONG_CONTEXTS = (4000, 8000, 16000)
LONG_ROWS = 8
LONG_NEW = 400
HALF_PRECISION_PROMPTS = 200


def length_statistics(answers: Sequence[Generation]) -> dict[str, float]:
    """The figures that say how heavy the tail of the lengths is."""
    lengths = np.array([a.length for a in answers], dtype=float)
    p50, p90, p99 = np.percentile(lengths, [50, 90, 99])
    return {
        "mean": round(float(lengths.mean()), 1),
        "cv": round(float(lengths.std() / lengths.mean()), 3),
        "p50": float(p50),
        "p90": round(float(p90), 1),
        "p99": round(float(p99), 1),
        "p99_over_p50": round(float(p99 / p50), 2),
        "max": int(lengths.max()),
        "share_ended_by_eos": round(float(np.mean([a.ended for a in answers])), 4),
    }


def step_accuracy(prompts: Sequence[str], answers: Sequence[Generation]) -> dict[str, Any]:
    """Steps and right steps per task and over all, and the share of answers without a slip."""
    counts: dict[str, list[int]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        steps, correct = tasks.check_steps(prompt, answer.text, answer.ended)
        for name in (tasks.task_of(prompt), "all"):
            entry = counts.setdefault(name, [0, 0, 0, 0])
            for i, value in enumerate((steps, correct, 1, int(steps == correct))):
                entry[i] += value
    return {
        name: {
            "steps": steps,
            "correct": correct,
            "accuracy": round(correct / max(steps, 1), 5),
            "answers": total,
            "answers_without_slip": round(clean / total, 4),
        }
        for name, (steps, correct, total, clean) in sorted(counts.items())
    }


def walk_accuracy_by_position(
    prompts: Sequence[str], answers: Sequence[Generation]
) -> dict[str, Any]:
    """Accuracy of the walks' moves by how many tokens had been written before them."""
    limits = {"0-999": 1000, "1000-3999": 4000, "4000-": 1 << 30}
    counts = {name: [0, 0] for name in limits}
    for prompt, answer in zip(prompts, answers, strict=True):
        if tasks.task_of(prompt) != "walk":
            continue
        written, place = answer.text.lstrip("\n").split(" "), 0
        for before, after in pairwise(written):
            place += len(before) + 1
            name = next(n for n, limit in limits.items() if place < limit)
            steps, correct = tasks.judge_walk([before, after])
            counts[name][0] += steps
            counts[name][1] += correct
    return {
        name: {"moves": steps, "accuracy": round(correct / steps, 5)}
        for name, (steps, correct) in counts.items()
        if steps
    }


def explained_share(groups: Sequence[Hashable], values: Sequence[float]) -> float:
    """Share of the variance of ``values`` that knowing the group explains (adjusted R squared)."""
    members: dict[Hashable, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    n, k = len(values), len(members)
    within = sum(float(np.var(v)) * len(v) for v in members.values())
    total = float(np.var(values)) * n
    return round(1 - (within / (n - k)) / (total / (n - 1)), 4)


def prompt_group(prompt: str) -> Hashable:
    """All that a prompt tells of its length: a walk's start, else the length of the answer."""
    if tasks.task_of(prompt) == "walk":
        return prompt
    return len(tasks.reference_answer(prompt, random.Random(0)))


def predictability(prompts: Sequence[str], answers: Sequence[Generation]) -> dict[str, float]:
    """How much of the lengths the prompt explains, and of what remains of a walk, its height."""
    starts: list[Hashable] = []
    heights: list[Hashable] = []
    remaining: list[float] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if tasks.task_of(prompt) != "walk" or not answer.ended:
            continue
        written, place = answer.text.lstrip("\n").split(" "), 0
        for i, number in enumerate(written):
            place += len(number) + 1
            if i % 20 == 10 and number.isdecimal():
                # Bands of a tenth or so: single heights would be too many groups.
                heights.append(int(10 * np.log(int(number) + 1)))
                starts.append(prompt)
                remaining.append(answer.length - place)
    lengths = [float(a.length) for a in answers]
    walks = [i for i, p in enumerate(prompts) if tasks.task_of(p) == "walk"]
    return {
        "length_by_prompt": explained_share([prompt_group(p) for p in prompts], lengths),
        "walk_length_by_prompt": explained_share(
            [prompts[i] for i in walks], [lengths[i] for i in walks]
        ),
        "walk_remaining_by_prompt": explained_share(starts, remaining),
        "walk_remaining_by_height": explained_share(heights, remaining),
    }


def long_walk(tokens: int, rng: random.Random) -> str:
    """A legal walk of about ``tokens`` characters that stays high enough to go on for long."""
    height = rng.randint(300, 800)
    parts, size = [str(height)], len(str(height))
    while size < tokens:
        height += rng.choice((-1, 1)) if 300 < height < 800 else (1 if height <= 300 else -1)
        parts.append(str(height))
        size += 4
    return " ".join(parts)


def long_context_accuracy(model: LlamaForCausalLM, seed: int) -> dict[str, float]:
    """Accuracy of a walk's moves after given walks of several thousand tokens."""
    result = {}
    for context in LONG_CONTEXTS:
        rng = random.Random(seed)
        walks = [long_walk(context, rng) for _ in range(LONG_ROWS)]
        ids = [[BOS_ID, *encode_bytes(f"walk {w.split()[0]}\n{w}").tolist()] for w in walks]
        steps = correct = 0
        for walk, answer in zip(walks, generate(model, ids, LONG_NEW, seed), strict=True):
            numbers = [walk.split()[-1], *answer.text.split(" ")[1:]]
            judged = tasks.judge_walk(numbers if answer.ended else numbers[:-1])
            steps, correct = steps + judged[0], correct + judged[1]
        result[str(context)] = round(correct / max(steps, 1), 5)
    return result


def sample(
    model: LlamaForCausalLM, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[Generation]:
    """Sample the answers with a progress bar."""
    ids = [prompt_ids(p) for p in prompts]
    with tqdm(total=len(prompts), desc="answers ended") as bar:

        def report(left: int) -> None:
            bar.update(len(prompts) - left - bar.n)

        return generate(model, ids, max_new_tokens, seed, report=report)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = tasks.sample_prompts(args.prompts, args.seed)
    started = time.perf_counter()
    answers = sample(model, prompts, args.max_new_tokens, args.seed)
    seconds = time.perf_counter() - started
    evaluation: dict[str, Any] = {
        "command": f"python -m sglang_ares.demo_model.evaluate --prompts {args.prompts} "
        f"--seed {args.seed} --max-new-tokens {args.max_new_tokens}",
        "temperature": 1.0,
        "machine": f"{len(os.sched_getaffinity(0))} cores",
        "sampling_seconds": round(seconds, 1),
        "lengths": length_statistics(answers),
        "steps": step_accuracy(prompts, answers),
        "walk_accuracy_by_tokens_written": walk_accuracy_by_position(prompts, answers),
        "explained_variance": predictability(prompts, answers),
        "walk_accuracy_after_context": long_context_accuracy(model, args.seed),
    }
    few = prompts[:HALF_PRECISION_PROMPTS]
    half = sample(model.to(torch.bfloat16), few, args.max_new_tokens, args.seed)
    evaluation["bfloat16"] = {
        "prompts": len(few),
        "lengths": length_statistics(half),
        "accuracy": step_accuracy(few, half)["all"]["accuracy"],
    }
    path = args.model / "card.json"
    card: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    card["evaluation"] = evaluation
    path.write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(evaluation, indent=2))


if __name__ == "__main__":
    main()
