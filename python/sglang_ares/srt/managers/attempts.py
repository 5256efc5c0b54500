"""The name of a request inside the cluster: its rid, and which attempt at it this is.

A request that is recovered from a dead worker, or dispatched again, runs under a new name.
Whatever the old attempt may still say, wherever it may still be, is then told apart by name
alone: nothing has to be found and stopped in time for the client's stream to be right.
"""

from __future__ import annotations

import re
from typing import Final

_SUFFIX: Final = re.compile(r"(.*)#(\d{2,})", re.DOTALL)


def internal_rid(rid: str, attempt: int) -> str:
    """The name of attempt ``attempt`` (0 is the first) at request ``rid``."""
    return f"{rid}#{attempt:02d}"


def split_rid(name: str) -> tuple[str, int]:
    """The request and the attempt that ``name`` stands for. What was never renamed (a health
    probe) is its own first attempt."""
    match = _SUFFIX.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def public_rid(name: str) -> str:
    """The rid the client knows."""
    return split_rid(name)[0]
