"""Prompts to collect hidden states on, by name or from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sglang_ares.demo_model import tasks

# Task mixes of the demo model; ``demo`` is its default workload, the others are for drift.
MIXES: Final[dict[str, tuple[tuple[str, float], ...]]] = {
    "demo": tasks.MIX,
    "demo-short": (("collatz", 0.35), ("count", 0.35), ("sort", 0.2), ("json", 0.1)),
    "demo-walks": (("walk", 1.0),),
}
_NAMES: Final = ("Lily", "Tom", "Ben", "Sue", "Max", "Mia", "Sam", "Anna", "Tim", "Lucy", "Jack")
_BEINGS: Final = ("cat", "dog", "bird", "bear", "frog", "boy", "girl", "bunny", "fish", "mouse")
_TRAITS: Final = ("little", "big", "happy", "sad", "brave", "kind", "funny", "shy", "old", "red")
_PLACES: Final = ("park", "forest", "garden", "house", "zoo", "beach", "farm", "school", "store")
_OPENINGS: Final = (
    "",
    "Once upon a time",
    "Once upon a time, there was a {trait} {being} named {name}.",
    "One day, {name} went to the {place}.",
    "{name} and {other} were best friends.",
    "{name} was a {trait} {being} who lived in the {place}.",
    "The {trait} {being} was",
    "One day, a {trait} {being}",
    "{name} liked to play in the {place} with {other}. They",
)


class PromptError(ValueError):
    """No such prompts; names the remedy."""


def prompts(source: str, count: int, seed: int) -> list[str]:
    """``count`` prompts: of a task mix in ``MIXES``, ``stories`` (openings for models of small
    stories), or from a file: one a line, plain or as JSON with the field ``prompt``."""
    if source in MIXES:
        return _tasks(MIXES[source], count, seed)
    if source == "stories":
        return _stories(count, seed)
    path = Path(source)
    if not path.is_file():
        raise PromptError(
            f"--prompts {source!r} is neither a file nor one of: {', '.join(MIXES)}, stories."
        )
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < count:
        raise PromptError(f"{path} has {len(lines)} prompts, --requests asks for {count}.")
    chosen = random.Random(seed).sample(lines, count)
    return [_prompt_of(line) for line in chosen]


def _prompt_of(line: str) -> str:
    if not line.startswith("{"):
        return line
    prompt = json.loads(line).get("prompt")
    if not isinstance(prompt, str):
        raise PromptError(f"a line has no text in its field 'prompt': {line[:80]}")
    return prompt


def _tasks(mix: Sequence[tuple[str, float]], count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    names, shares = [name for name, _ in mix], [share for _, share in mix]
    return [tasks.sample_prompt(rng.choices(names, shares)[0], rng) for _ in range(count)]


def _stories(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        rng.choice(_OPENINGS).format(
            name=rng.choice(_NAMES),
            other=rng.choice(_NAMES),
            being=rng.choice(_BEINGS),
            trait=rng.choice(_TRAITS),
            place=rng.choice(_PLACES),
        )
        for _ in range(count)
    ]
