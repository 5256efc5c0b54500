"""Builds the training rows of the demo model: packed tasks and pieces of long walks.

Only the last number (and, for the short tasks, the task line) matters for the next one, and
answers are much longer than most training rows.  So a part of the rows starts in the middle of a
walk, and positions jump ahead at random places: far tokens then lie at distances up to the whole
context window and the model learns not to mind them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import tasks
from .tokenizer import BOS_ID, EOS_ID, encode_bytes

IGNORE = -100
MAX_POSITION = 32768
TASK_SHARES = {"walk": 0.28, "collatz": 0.15, "count": 0.25, "sort": 0.22, "json": 0.10}
"""Share of the tasks among the packed documents (the short ones need more than in the workload)."""
SLIP = 0.002
"""Chance that a number of a walk is replaced by a random one, so that slips do not carry on."""
SETTLE = 8
"""Tokens without loss after a cut or a jump: what they depend on may be out of sight."""


@dataclass
class Batch:
    """Input ids, positions and shifted labels, each of shape (rows, length)."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    labels: NDArray[np.int64]


class RowBuilder:
    """Collects tokens, and whether each is learnt, until a row is full."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.ids: list[NDArray[np.int64]] = []
        self.learn: list[NDArray[np.bool_]] = []
        self.size = 0

    @property
    def full(self) -> bool:
        return self.size >= self.length

    @property
    def last(self) -> int:
        """The last token, -1 in an empty row."""
        return int(self.ids[-1][-1]) if self.ids else -1

    def add(self, ids: NDArray[np.int64], learn: NDArray[np.bool_] | bool) -> None:
        self.ids.append(ids)
        self.learn.append(np.full(len(ids), learn) if isinstance(learn, bool) else learn)
        self.size += len(ids)

    def add_special(self, token: int, learn: bool) -> None:
        self.add(np.array([token], dtype=np.int64), learn)

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return np.concatenate(self.ids)[: self.length], np.concatenate(self.learn)[: self.length]


def walk_text(height: int, limit: int, rng: random.Random) -> tuple[str, list[tuple[int, int]]]:
    """A walk with slips, at least ``limit`` characters or down to 0, and where the slips stand."""
    parts: list[str] = []
    slips: list[tuple[int, int]] = []
    size = 0
    while True:
        text = str(height)
        parts.append(text)
        size += len(text) + 1
        if height == 0 or size >= limit:
            return " ".join(parts), slips
        height = tasks.walk_next(height, rng)
        if rng.random() < SLIP:
            height = rng.randint(1000, 9999) if rng.random() < 0.1 else rng.randint(1, 999)
            slips.append((size, size + len(str(height))))


def _add_prompt(row: RowBuilder, prompt: str, rng: random.Random) -> None:
    # A missing or doubled BOS is what clients with templates of their own sometimes send.
    after_eos = row.last == EOS_ID  # an answer cut at its limit must not teach to stop there
    draw = rng.random()
    for i in range(0 if draw < 0.05 else 2 if draw < 0.10 else 1):
        row.add_special(BOS_ID, learn=after_eos and i == 0)
    # After a number the model shall always write the newline (a client may leave it out), so
    # what else may follow the first digit is not learnt.
    first_digit = next(i for i, character in enumerate(prompt) if character.isdecimal())
    learn = np.ones(len(prompt), dtype=np.bool_)
    learn[first_digit + 1 : -1] = False
    learn[0] = row.last in (BOS_ID, EOS_ID)
    row.add(encode_bytes(prompt), learn)


def _add_walk(row: RowBuilder, height: int, limit: int, rng: random.Random, cut: bool) -> None:
    """A walk from ``height``; ``cut`` says that it starts in the middle, unprompted."""
    text, slips = walk_text(height, limit, rng)
    learn = np.ones(len(text), dtype=np.bool_)
    for start, stop in slips:
        learn[start:stop] = False
    if cut:
        learn[:SETTLE] = False
    row.add(encode_bytes(text), learn)
    if text.endswith(" 0"):
        row.add_special(EOS_ID, learn=True)


def _random_height(rng: random.Random) -> int:
    """Heights as a cut meets them: all magnitudes, the low ones more often."""
    if rng.random() < 0.3:
        return rng.randint(1, tasks.HEIGHT_MAX)
    return min(tasks.HEIGHT_MAX, int(10 ** rng.uniform(0.3, 2.6)))


def _add_document(row: RowBuilder, rng: random.Random, walk_limit: int) -> None:
    task = rng.choices(list(TASK_SHARES), list(TASK_SHARES.values()))[0]
    prompt = tasks.sample_prompt(task, rng)
    if task == "walk":
        if rng.random() < 0.2:  # starts outside the workload's range are answered as well
            prompt = f"walk {_random_height(rng)}\n"
        _add_prompt(row, prompt, rng)
        _add_walk(row, int(prompt.split()[1]), walk_limit, rng, cut=False)
        return
    if task == "count" and rng.random() < 0.7:  # short counts: more task lines per row
        first = rng.randint(0, 120)
        prompt = f"count {first} {first + rng.randint(0, 12)}\n"
    _add_prompt(row, prompt, rng)
    row.add(encode_bytes(tasks.reference_answer(prompt, rng)), True)
    row.add_special(EOS_ID, learn=True)


def _row(length: int, rng: random.Random) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    row = RowBuilder(length)
    if rng.random() < (0.3 if length < 1024 else 0.6):
        # Long rows keep one walk going for most of their length, as long answers do.
        low = 1 if length < 1024 else min(length // 8, 700)
        _add_walk(row, max(low, _random_height(rng)), length, rng, cut=True)
    walk_limit = 120 if length < 1024 else length
    while not row.full:
        _add_document(row, rng, walk_limit)
    return row.finish()


def _positions(length: int, learn: NDArray[np.bool_], rng: random.Random) -> NDArray[np.int64]:
    """Positions with random jumps ahead; what follows a jump directly is taken from the loss."""
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    if rng.random() < (0.25 if length < 1024 else 0.5):
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(1, length)
            steps[place] += int(10 ** rng.uniform(1, 4.1))
            learn[place : place + SETTLE] = False
    positions: NDArray[np.int64] = np.cumsum(steps)
    return np.minimum(positions, MAX_POSITION - 1)


def make_batch(rows: int, length: int, rng: random.Random) -> Batch:
    """A batch of ``rows`` rows of ``length`` tokens."""
    ids = np.empty((rows, length), dtype=np.int64)
    positions = np.empty((rows, length), dtype=np.int64)
    labels = np.empty((rows, length), dtype=np.int64)
    for i in range(rows):
        tokens, learn = _row(length + 1, rng)
        learn = learn[1:].copy()
        positions[i] = _positions(length, learn, rng)
        ids[i] = tokens[:-1]
        labels[i] = np.where(learn, tokens[1:], IGNORE)
    return Batch(ids, positions, labels)
