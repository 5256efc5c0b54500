"""Reading trace files, gzip-compressed or not, and checking what they say."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file, or of a ``.gz`` one, with their numbers from 1; blank ones left out."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        opened = gzip.open if compressed else io.open
        with opened(path, "rt", encoding="utf-8", newline="") as text:
            for number, line in enumerate(text, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from None


def tokens(value: object, where: str, *, least: int = 1) -> int:
    """A count of tokens, a whole number from ``least`` on; ``where`` names it in the error."""
    try:
        count = int(str(value))
    except ValueError:
        raise WorkloadError(f"{where} is {value!r}; it must be a whole number") from None
    if count < least or isinstance(value, bool):
        raise WorkloadError(f"{where} is {value!r}; it must be at least {least}")
    return count


def number(value: object, where: str) -> float:
    """A finite number that is not negative."""
    try:
        result = float(str(value))
    except ValueError:
        raise WorkloadError(f"{where} is {value!r}; it must be a number") from None
    if not (result >= 0 and math.isfinite(result)):
        raise WorkloadError(f"{where} is {value!r}; it must be finite and not negative")
    return result


def stream_of(
    name: str,
    origin: str,
    path: Path,
    rows: list[tuple[float, int, int]],
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None,
) -> RequestStream:
    """A stream from sorted rows of arrival (s), prompt and output tokens; time starts at the first
    arrival. A trace without requests is an error."""
    if not rows:
        raise WorkloadError(f"{path}: holds no requests")
    arrival, prompt, output = zip(*rows, strict=True)
    return RequestStream(
        name=name,
        origin=origin,
        arrival_s=np.array(arrival, np.float64) - arrival[0],
        prompt_tokens=np.array(prompt, np.int64),
        output_tokens=np.array(output, np.int64),
        prefix_blocks=prefix_blocks,
    )
