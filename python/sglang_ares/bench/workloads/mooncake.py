"""Mooncake's traces (github.com/kvcache-ai/Mooncake, FAST25-release/traces, Apache-2.0)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sglang_ares.bench.workloads.files import number, numbered_lines, stream_of, tokens
from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError

# Timestamps are rounded to this.
_QUANTUM_S = 3.0
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


def load_mooncake(path: str | Path, *, seed: int) -> RequestStream:
    """JSON lines (or ``.gz``) with timestamp (ms), input_length, output_length and hash_ids.

    The trace rounds timestamps to 3 s; every arrival is moved by a seeded uniform part of these
    3 s, or the requests would come in bursts that nobody sent. A length of 0 counts as 1.

    Raises :class:`WorkloadError` with file, line and field.
    """
    path = Path(path)
    rows: list[tuple[float, int, int]] = []
    blocks: list[tuple[int, ...]] = []
    for line, text in numbered_lines(path):
        where = f"{path}, line {line}"
        try:
            record = json.loads(text)
        except ValueError as error:
            raise WorkloadError(f"{where}: not JSON: {error}") from None
        missing = [f for f in _FIELDS if not isinstance(record, dict) or f not in record]
        if missing:
            raise WorkloadError(f"{where}: field {missing[0]} is missing")
        arrival_s = number(record["timestamp"], f"{where}: timestamp") / 1e3
        if rows and arrival_s < rows[-1][0]:
            raise WorkloadError(f"{where}: timestamp is earlier than that of the line before")
        prompt = tokens(record["input_length"], f"{where}: input_length", least=0)
        output = tokens(record["output_length"], f"{where}: output_length", least=0)
        if not isinstance(record["hash_ids"], list):
            raise WorkloadError(f"{where}: hash_ids is not a list")
        blocks.append(tuple(tokens(i, f"{where}: hash_ids", least=0) for i in record["hash_ids"]))
        rows.append((arrival_s, max(1, prompt), max(1, output)))
    rng = np.random.default_rng(seed)
    jittered = np.array([row[0] for row in rows]) + rng.uniform(0, _QUANTUM_S, len(rows))
    order = np.argsort(jittered, kind="stable")
    return stream_of(
        "mooncake",
        f"Mooncake trace {path.name}, timestamps jittered within their 3 s (seed {seed})",
        path,
        [(float(jittered[i]), *rows[i][1:]) for i in order],
        tuple(blocks[i] for i in order),
    )
