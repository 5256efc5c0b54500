"""A simulation as a Chrome trace: open it in Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sglang_ares.simulator.request_log import FINISHED, MOVED
from sglang_ares.simulator.result import Result

_DECODE, _REQUESTS = 1, 2


def write_trace(path: Path, result: Result) -> None:
    """Write the trace; the simulation must have been run with ``record_stays``.

    Process 1 has a counter of resident tokens per decode worker. Process 2 has a row per request
    that ran: what it waited for, and its stays on decode workers. Flow arrows are migrations.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, event in enumerate(trace_events(result)):
            file.write((",\n" if index else "") + json.dumps(event))
        file.write("\n]}\n")


def trace_events(result: Result) -> Iterator[dict[str, Any]]:
    """The events, in the Trace Event Format; times in microseconds."""
    if result.stays is None:
        raise ValueError("there is nothing to trace; simulate with record_stays=True")
    yield _name(_DECODE, "decode workers")
    yield _name(_REQUESTS, "requests")
    for time_s, tokens in zip(result.sample_s, result.sample_tokens, strict=True):
        for worker, held in enumerate(tokens):
            yield {
                "ph": "C",
                "pid": _DECODE,
                "name": f"worker {worker}: resident tokens",
                "ts": time_s * 1e6,
                "args": {"tokens": int(held)},
            }
    for request in np.flatnonzero(~np.isnan(result.first_token_s)).tolist():
        arrival_s, prefilled_s = result.arrival_s[request], result.prefilled_s[request]
        first_s = result.first_token_s[request]
        if result.retractions[request] == 0:
            yield _span(request, "queue and prefill", arrival_s, prefilled_s)
            yield _span(request, "KV transfer", prefilled_s, first_s)
        else:
            # The time of the first prefill was overwritten by the recomputation's.
            yield _span(request, "queue, prefill and KV transfer", arrival_s, first_s)
    moved_from: dict[int, float] = {}
    for number, stay in enumerate(result.stays):
        yield _span(stay.request, f"worker {stay.worker}", stay.start_s, stay.end_s)
        left_s = moved_from.pop(stay.request, None)
        if left_s is not None:
            arrow = {"cat": "migration", "name": "migration", "id": number, "pid": _REQUESTS}
            yield {**arrow, "ph": "s", "tid": stay.request, "ts": left_s * 1e6}
            yield {**arrow, "ph": "f", "bp": "e", "tid": stay.request, "ts": stay.start_s * 1e6}
        if stay.end == MOVED:
            moved_from[stay.request] = stay.end_s
        elif stay.end != FINISHED:
            instant = {"ph": "i", "s": "t", "pid": _REQUESTS, "tid": stay.request}
            yield {**instant, "name": stay.end, "ts": stay.end_s * 1e6}


def _name(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}


def _span(request: int, name: str, start_s: float, end_s: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": _REQUESTS,
        "tid": request,
        "name": name,
        "ts": start_s * 1e6,
        "dur": max(0.0, end_s - start_s) * 1e6,
    }
