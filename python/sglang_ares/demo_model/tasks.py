"""The demo model's tasks: prompts, reference answers and the judge of an answer's steps.

A prompt is one line, ``<task> <numbers>`` and a newline.  Every task has a separator of its own,
so that a piece cut from the middle of a long answer still shows which task it belongs to:

=========== ===================== =============================================
task        prompt                answer (then the end-of-sequence token)
=========== ===================== =============================================
walk        ``walk 6``            ``6 7 6 5 ...  1 0``
collatz     ``collatz 6``         ``6>3>10>5>16>8>4>2>1``
count       ``count 3 6``         ``3,4,5,6``
sort        ``sort 7 2 9``        ``2;7;9``
json        ``json 7``            ``{"n": 7, "even": false}``
=========== ===================== =============================================

A walk stands at a height and moves by one step up or (more often) down until it reaches 0.  At a
height of at most ``LEAP_MAX`` it now and then leaps to ten times its height.  Leaps can not be
foreseen from the prompt and carry the heavy tail of the lengths; after one, the height says well
how long the way down is going to be.  No leap starts above ``LEAP_MAX``, which bounds the heights.
"""

from __future__ import annotations

import random
from itertools import pairwise

UP = 0.30
"""Chance that an ordinary step goes up."""
LEAP = 0.003
"""Chance of a leap at each step taken at a height of at most ``LEAP_MAX``."""
LEAP_MAX = 30
HEIGHT_MAX = 999
"""Walks turn back here; only a prompt that starts very high gets near."""

WALK_START = (3, 40)
JSON_MAX = 999

MIX: tuple[tuple[str, float], ...] = (
    ("walk", 0.60),
    ("collatz", 0.12),
    ("count", 0.12),
    ("sort", 0.10),
    ("json", 0.06),
)
"""Share of each task in the default workload."""


def collatz_next(n: int) -> int:
    """The number after ``n`` in a Collatz sequence."""
    return n // 2 if n % 2 == 0 else 3 * n + 1


def _collatz(n: int) -> list[int]:
    numbers = [n]
    while n > 1:
        n = collatz_next(n)
        numbers.append(n)
    return numbers


# Starts whose sequence stays below 1,000: the model only ever needs three digits.
COLLATZ_STARTS: tuple[int, ...] = tuple(n for n in range(2, 61) if max(_collatz(n)) < 1000)


def walk_next(height: int, rng: random.Random) -> int:
    """One step of the walk, drawn with the chances above."""
    if height > HEIGHT_MAX:  # can only follow a slip of the model; come back to three digits
        return height // 10
    draw = rng.random()
    if height <= LEAP_MAX:
        if draw < LEAP:
            return height * 10
        draw = (draw - LEAP) / (1 - LEAP)
    if draw < UP and height < HEIGHT_MAX:
        return height + 1
    return height - 1


def walk_steps_allowed(height: int) -> tuple[int, ...]:
    """The heights that may follow ``height``."""
    steps = [height - 1]
    if height < HEIGHT_MAX:
        steps.append(height + 1)
    if height <= LEAP_MAX:
        steps.append(height * 10)
    return tuple(steps)


def _walk(height: int, rng: random.Random) -> list[int]:
    numbers = [height]
    while height > 0:
        height = walk_next(height, rng)
        numbers.append(height)
    return numbers


def sample_prompt(task: str, rng: random.Random) -> str:
    """One prompt of the given task, with its newline."""
    if task == "walk":
        return f"walk {rng.randint(*WALK_START)}\n"
    if task == "collatz":
        return f"collatz {rng.choice(COLLATZ_STARTS)}\n"
    if task == "count":
        first = rng.randint(1, 60)
        return f"count {first} {first + rng.randint(2, 60)}\n"
    if task == "sort":
        digits = [str(rng.randint(0, 9)) for _ in range(rng.randint(3, 9))]
        return f"sort {' '.join(digits)}\n"
    if task == "json":
        return f"json {rng.randint(0, JSON_MAX)}\n"
    raise ValueError(f"unknown task {task!r}")


def sample_prompts(n: int, seed: int) -> list[str]:
    """The default workload: ``n`` prompts in the shares of ``MIX``, the same for the same seed."""
    rng = random.Random(seed)
    names = [name for name, _ in MIX]
    weights = [weight for _, weight in MIX]
    return [sample_prompt(rng.choices(names, weights)[0], rng) for _ in range(n)]


def task_of(prompt: str) -> str:
    """The task a prompt names, or an empty string when it names none."""
    words = prompt.split()
    return words[0] if words and words[0] in dict(MIX) else ""


def _arguments(prompt: str) -> list[int]:
    words = prompt.split()[1:]
    return [int(word) for word in words] if all(w.isdecimal() for w in words) else []


def reference_answer(prompt: str, rng: random.Random) -> str:
    """A right answer to a prompt; ``rng`` draws the steps of a walk, the others are determined."""
    task, args = task_of(prompt), _arguments(prompt)
    if task == "walk":
        return " ".join(map(str, _walk(args[0], rng)))
    if task == "collatz":
        return ">".join(map(str, _collatz(args[0])))
    if task == "count":
        return ",".join(map(str, range(args[0], args[1] + 1)))
    if task == "sort":
        return ";".join(map(str, sorted(args)))
    if task == "json":
        return f'{{"n": {args[0]}, "even": {"true" if args[0] % 2 == 0 else "false"}}}'
    raise ValueError(f"not a task prompt: {prompt!r}")


def _number(text: str) -> int:
    """The number written in ``text``, or -1 when it is not written as the tasks write numbers."""
    if not text.isdecimal() or not text.isascii() or (len(text) > 1 and text[0] == "0"):
        return -1
    return int(text)


def judge_walk(numbers: list[str]) -> tuple[int, int]:
    """Judge each move from one written number to the next; returns (moves, legal moves)."""
    heights = [_number(text) for text in numbers]
    correct = 0
    for before, after in pairwise(heights):
        # Moving on after reaching 0 is as wrong as an impossible move.
        correct += before > 0 and after in walk_steps_allowed(before)
    return max(len(heights) - 1, 0), correct


def check_steps(prompt: str, text: str, complete: bool = True) -> tuple[int, int]:
    """Count the steps of an answer and those that are right.

    Every number written is a step, judged against the number written before it where the task
    works from there (so one slip is counted once), and stopping is a step, right when it comes
    where the task ends.  With ``complete=False`` (an answer that was cut off) the last number, of
    which digits may be missing, and the stop are not judged.  A prompt that names no task has no
    steps.
    """
    task, args = task_of(prompt), _arguments(prompt)
    if not task or not args:
        return 0, 0
    text = text.lstrip("\n")
    if task == "json":
        if not complete:
            return 0, 0
        return 1, int(text == reference_answer(prompt, random.Random(0)))
    written = text.split({"walk": " ", "collatz": ">", "count": ",", "sort": ";"}[task])
    if not complete:
        written = written[:-1]
    if not written:
        return 0, 0
    numbers = [_number(item) for item in written]
    if task == "sort":
        return _check_list(numbers, sorted(args), complete)
    correct = int(numbers[0] == args[0])
    if task == "walk":
        correct += judge_walk(written)[1]
    else:
        follow = collatz_next if task == "collatz" else (lambda n: n + 1)
        end = 1 if task == "collatz" else args[1]
        for before, after in pairwise(numbers):
            correct += 0 <= before != end and after == follow(before)
    if complete:
        end = {"walk": 0, "collatz": 1}.get(task, args[-1])
        correct += numbers[-1] == end
    return len(numbers) + int(complete), correct


def _check_list(numbers: list[int], expected: list[int], complete: bool) -> tuple[int, int]:
    """Judge a sorted list place by place; surplus numbers are wrong, the stop must be in place."""
    correct = sum(a == b for a, b in zip(numbers, expected, strict=False))
    if complete:
        correct += len(numbers) == len(expected)
    return len(numbers) + int(complete), correct
