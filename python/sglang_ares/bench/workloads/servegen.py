"""ServeGen's per-client distributions (github.com/alibaba/ServeGen, Apache-2.0), sampled.

What they hold are not requests: for each client, an arrival process per window of 600 s, and
distributions of token counts per six hours. Streams drawn from them are called
*ServeGen-sampled*.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
import tarfile
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sglang_ares.bench.workloads.files import number, tokens
from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError

_MEMBER = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")
_LAWS = ("Gamma", "Weibull")


@dataclass(frozen=True)
class _Window:
    """From ``start_s`` on requests come at ``rate`` per second, their gaps after ``law``."""

    start_s: float
    rate: float
    law: str
    shape: float


@dataclass(frozen=True)
class _Lengths:
    """Token counts and the probabilities of not exceeding them, both ``(V,)``."""

    values: NDArray[np.int64]
    cumulative: NDArray[np.float64]

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        return self.values[np.searchsorted(self.cumulative, rng.random(size), side="right")]


@dataclass(frozen=True)
class _Client:
    """Windows by time; input and output lengths from each of ``block_starts`` on (None: the
    client sends nothing in that block)."""

    windows: list[_Window]
    window_s: float
    block_starts: list[float]
    blocks: list[tuple[_Lengths, _Lengths] | None]


class ServeGen:
    """The clients of one archive, to sample from. Raises :class:`WorkloadError`."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._clients = _read(self._path)
        self.day_s = max(c.windows[-1].start_s + c.window_s for c in self._clients)

    def rate(self, start_s: float, end_s: float) -> float:
        """Mean requests per second that the windows between two times of the day promise."""
        expected = 0.0
        for client in self._clients:
            for window in client.windows:
                overlap = min(end_s, window.start_s + client.window_s) - max(
                    start_s, window.start_s
                )
                if overlap > 0 and client.blocks[_block(client, window)] is not None:
                    expected += overlap * window.rate
        return expected / (end_s - start_s)

    def sample(
        self, *, seed: int, start_s: float = 0.0, span_s: float | None = None, share: float = 1.0
    ) -> RequestStream:
        """The requests of ``span_s`` seconds from ``start_s`` on (default: until the day ends),
        every client's rate multiplied by ``share``.

        Input and output are drawn independently: their joint distribution is not published.
        """
        if span_s is None:
            span_s = self.day_s - start_s
        end_s = start_s + span_s
        if not 0 <= start_s < end_s <= self.day_s * (1 + 1e-9):
            raise WorkloadError(
                f"{self._path}: start {start_s:g} s and span {span_s:g} s are not within the day "
                f"of {self.day_s:g} s that it describes"
            )
        columns: list[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]] = []
        # A generator for each client: what one sends does not depend on the others.
        rngs = np.random.default_rng(seed).spawn(len(self._clients))
        for client, rng in zip(self._clients, rngs, strict=True):
            for window in client.windows:
                first = max(start_s, window.start_s)
                last = min(end_s, window.start_s + client.window_s)
                lengths = client.blocks[_block(client, window)]
                if first >= last or window.rate <= 0 or lengths is None:
                    continue
                times = _window_arrivals(rng, window, window.rate * share, last - first)
                inputs, outputs = (part.draw(rng, len(times)) for part in lengths)
                columns.append((first - start_s + times, inputs, outputs))
        if not columns:
            raise WorkloadError(f"{self._path}: no client sends anything in this time")
        arrival, prompt, output = (np.concatenate(part) for part in zip(*columns, strict=True))
        order = np.argsort(arrival, kind="stable")
        return RequestStream(
            name="servegen",
            origin=(
                f"ServeGen-sampled from {self._path.name}: {start_s:g} s to {end_s:g} s of its "
                f"day, client rates times {share:.4g}, input and output independent, seed {seed}"
            ),
            arrival_s=arrival[order],
            prompt_tokens=prompt[order],
            output_tokens=output[order],
        )


def _window_arrivals(
    rng: np.random.Generator, window: _Window, rate: float, duration_s: float
) -> NDArray[np.float64]:
    """Arrivals within a window, from its start on: a renewal process of the window's law and
    shape with the mean gap ``1 / rate``, started somewhere in a gap."""
    size = int(rate * duration_s * 1.2 + 6 * math.sqrt(rate * duration_s) + 16)
    if window.law == "Gamma":
        gaps = rng.gamma(window.shape, 1 / (rate * window.shape), size)
    else:
        gaps = rng.weibull(window.shape, size) / (rate * math.gamma(1 + 1 / window.shape))
    gaps[0] *= rng.random()
    times: NDArray[np.float64] = np.cumsum(gaps)
    return times[times < duration_s]


def _block(client: _Client, window: _Window) -> int:
    return max(0, bisect_right(client.block_starts, window.start_s) - 1)


def _read(path: Path) -> list[_Client]:
    """All clients, by their numbers."""
    texts: dict[int, dict[str, str]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                match = _MEMBER.search(member.name)
                file = archive.extractfile(member) if match else None
                if match and file is not None:
                    texts.setdefault(int(match[1]), {})[match[2]] = file.read().decode()
    except (OSError, EOFError, tarfile.TarError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from None
    if not texts:
        raise WorkloadError(f"{path}: holds no chunk-N-trace.csv and chunk-N-dataset.json")
    clients = []
    for client_id, parts in sorted(texts.items()):
        for part in ("trace.csv", "dataset.json"):
            if part not in parts:
                raise WorkloadError(f"{path}: chunk-{client_id}-{part} is missing")
        windows, window_s = _windows(parts["trace.csv"], f"{path}, chunk-{client_id}-trace.csv")
        starts, blocks = _blocks(parts["dataset.json"], f"{path}, chunk-{client_id}-dataset.json")
        clients.append(_Client(windows, window_s, starts, blocks))
    return clients


def _windows(text: str, where: str) -> tuple[list[_Window], float]:
    """Rows of start, rate, cv, law, shape, scale, without a header; and the windows' length."""
    windows: list[_Window] = []
    for line, fields in enumerate(csv.reader(text.splitlines()), start=1):
        here = f"{where}, line {line}"
        if len(fields) != 6:
            raise WorkloadError(f"{here}: {len(fields)} fields; 6 are needed")
        start_s, rate = number(fields[0], f"{here}: start"), number(fields[1], f"{here}: rate")
        if windows and start_s <= windows[-1].start_s:
            raise WorkloadError(f"{here}: start is not later than that of the line before")
        law, shape = fields[3], 1.0
        if rate > 0:
            if law not in _LAWS:
                raise WorkloadError(f"{here}: law is {law!r}; it must be Gamma or Weibull")
            shape = number(fields[4], f"{here}: shape")
            if shape == 0:
                raise WorkloadError(f"{here}: shape is 0; it must be above 0")
        windows.append(_Window(start_s, rate, law, shape))
    if len(windows) < 2:
        raise WorkloadError(f"{where}: fewer than two windows")
    return windows, windows[1].start_s - windows[0].start_s


def _blocks(text: str, where: str) -> tuple[list[float], list[tuple[_Lengths, _Lengths] | None]]:
    """Start of each block, and its distributions of input and output lengths."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise WorkloadError(f"{where}: not JSON: {error}") from None
    if not isinstance(document, dict) or not document:
        raise WorkloadError(f"{where}: not a JSON object of blocks")
    blocks: list[tuple[float, tuple[_Lengths, _Lengths] | None]] = []
    for key, block in document.items():
        here = f"{where}, block {key}"
        if not isinstance(block, dict):
            raise WorkloadError(f"{here}: not a JSON object")
        parts = [_lengths(block, field, here) for field in ("input_tokens", "output_tokens")]
        inputs, outputs = parts
        sends = inputs is not None and outputs is not None
        blocks.append((number(key, f"{here}: start"), (inputs, outputs) if sends else None))  # type: ignore[arg-type]
    blocks.sort(key=lambda item: item[0])
    return [start for start, _ in blocks], [lengths for _, lengths in blocks]


def _lengths(block: dict[str, object], field: str, where: str) -> _Lengths | None:
    """The distribution in ``field``, a string that holds a Python dict; None for an empty one."""
    here = f"{where}: {field}"
    if field not in block:
        raise WorkloadError(f"{here} is missing")
    try:
        table = ast.literal_eval(str(block[field]))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise WorkloadError(f"{here} is not a literal") from None
    if not isinstance(table, dict):
        raise WorkloadError(f"{here} is not a dict of lengths and probabilities")
    if not table:
        return None
    values = np.array([tokens(v, here) for v in table], np.int64)
    weights = np.cumsum([number(p, here) for p in table.values()])
    if not weights[-1] > 0:
        raise WorkloadError(f"{here}: the probabilities sum to 0")
    return _Lengths(values, weights / weights[-1])
