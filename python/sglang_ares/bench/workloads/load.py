"""Finds a workload by name or path, at the rate and for the time that are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from sglang_ares.bench.workloads.azure2023 import load_azure2023
from sglang_ares.bench.workloads.mooncake import load_mooncake
from sglang_ares.bench.workloads.servegen import ServeGen
from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError
from sglang_ares.bench.workloads.synthetic import lognormal, reasoning, swing

BUILT_IN: dict[str, Callable[..., RequestStream]] = {
    "reasoning": reasoning,
    "lognormal": lognormal,
    "swing": swing,
}


def load_workload(
    name_or_path: str,
    *,
    seed: int,
    rate: float | None = None,
    duration_s: float | None = None,
    start_s: float = 0.0,
    **parameters: float,
) -> RequestStream:
    """A built-in workload, or one from a trace file.

    A file is told by its name: ``.csv`` or ``.csv.gz`` is an Azure trace, ``.jsonl`` or
    ``.jsonl.gz`` a Mooncake trace, ``.tar.gz`` a ServeGen archive.

    Args:
        rate: mean requests per second. Traces are brought to it by scaling their timestamps;
            default: their own rate. Built-in workloads need it.
        duration_s: how long requests arrive. A trace that is too short for rate and duration ends
            sooner; default: all of it. Built-in workloads need it.
        start_s: where in a trace to begin, in its own time.
        parameters: of a built-in workload, such as ``output_cv``.
    """
    for name, value in (("rate", rate), ("duration", duration_s)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise WorkloadError(f"{name} is {value}; it must be a finite number above 0")
    if name_or_path in BUILT_IN:
        if rate is None or duration_s is None:
            raise WorkloadError(f"workload {name_or_path} needs a rate and a duration")
        return BUILT_IN[name_or_path](rate=rate, duration_s=duration_s, seed=seed, **parameters)
    path = Path(name_or_path)
    if not path.is_file():
        raise WorkloadError(
            f"there is no workload {name_or_path!r}: neither a file nor one of: "
            f"{', '.join(BUILT_IN)}"
        )
    if parameters:
        raise WorkloadError(f"{path}: a trace takes no {', '.join(parameters)}")
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _servegen(path, seed=seed, rate=rate, duration_s=duration_s, start_s=start_s)
    if path.name.endswith((".csv", ".csv.gz")):
        stream = load_azure2023(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        stream = load_mooncake(path, seed=seed)
    else:
        raise WorkloadError(
            f"{path}: not a known kind of trace; its name must end in .csv, .jsonl (or these with "
            ".gz) or .tar.gz"
        )
    stream = stream.between(start_s, math.inf)
    if not len(stream):
        raise WorkloadError(f"{path}: no request arrives {start_s:g} s after the first or later")
    if rate is not None and stream.rate > 0:
        stream = stream.scaled(stream.rate / rate)
    return stream.between(0, duration_s) if duration_s is not None else stream


def _servegen(
    path: Path, *, seed: int, rate: float | None, duration_s: float | None, start_s: float
) -> RequestStream:
    """ServeGen-sampled requests.

    For a rate above the clients' own, a longer part of the day is squeezed into the duration. For
    a lower one every client sends less, so that none drops out of a short run; for one that the
    rest of the day cannot feed, every client sends more.
    """
    archive = ServeGen(path)
    left_s = archive.day_s - start_s
    if left_s <= 0:
        raise WorkloadError(f"{path}: start {start_s:g} s is not within its {archive.day_s:g} s")
    if duration_s is None:
        duration_s = left_s
    if rate is None:
        return archive.sample(seed=seed, start_s=start_s, span_s=min(duration_s, left_s))
    span_s = min(duration_s, left_s)
    while span_s < left_s and archive.rate(start_s, start_s + span_s) * span_s < rate * duration_s:
        span_s = min(left_s, span_s + 600.0)
    share = rate * duration_s / (archive.rate(start_s, start_s + span_s) * span_s)
    stream = archive.sample(seed=seed, start_s=start_s, span_s=span_s, share=share)
    return stream.scaled(duration_s / span_s).between(0, duration_s)
