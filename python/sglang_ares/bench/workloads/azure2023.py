"""The Azure LLM inference trace of 2023 (github.com/Azure/AzurePublicDataset, CC-BY 4.0)."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path

from sglang_ares.bench.workloads.files import numbered_lines, stream_of, tokens
from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def load_azure2023(path: str | Path) -> RequestStream:
    """A csv, or csv.gz, with the columns TIMESTAMP, ContextTokens and GeneratedTokens, sorted by
    time. A prompt or output of 0 tokens counts as 1.

    Raises :class:`WorkloadError` with file, line and column.
    """
    path = Path(path)
    lines = numbered_lines(path)
    first = next(lines, None)
    header = next(csv.reader([first[1]])) if first is not None else []
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise WorkloadError(
            f"{path}, line 1: column {missing[0]} is missing; the header must name "
            f"{', '.join(_COLUMNS)}"
        )
    time_column, prompt_column, output_column = (header.index(name) for name in _COLUMNS)
    rows: list[tuple[float, int, int]] = []
    epoch: datetime | None = None
    for line, text in lines:
        fields = next(csv.reader([text]))
        where = f"{path}, line {line}"
        if len(fields) != len(header):
            raise WorkloadError(f"{where}: {len(fields)} fields where the header has {len(header)}")
        moment, fraction = _moment(fields[time_column], f"{where}: TIMESTAMP")
        epoch = epoch or moment
        arrival_s = (moment - epoch).total_seconds() + fraction
        if rows and arrival_s < rows[-1][0]:
            raise WorkloadError(f"{where}: TIMESTAMP is earlier than that of the line before")
        prompt = tokens(fields[prompt_column], f"{where}: ContextTokens", least=0)
        output = tokens(fields[output_column], f"{where}: GeneratedTokens", least=0)
        rows.append((arrival_s, max(1, prompt), max(1, output)))
    return stream_of("azure2023", f"Azure LLM inference trace 2023, {path.name}", path, rows)


def _moment(text: str, where: str) -> tuple[datetime, float]:
    """``YYYY-MM-DD HH:MM:SS.fffffff`` as its whole second and the fraction; times have no zone."""
    whole, _, decimals = text.partition(".")
    try:
        moment = datetime.strptime(whole, "%Y-%m-%d %H:%M:%S")  # noqa: DTZ007
        return moment, float(f"0.{decimals or '0'}")
    except ValueError:
        raise WorkloadError(
            f"{where} is {text!r}; it must be YYYY-MM-DD HH:MM:SS.fffffff"
        ) from None
