"""Pools over time above the load that was offered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.simulator.plots import COLOURS
from sglang_ares.simulator.result import Result
from sglang_ares.simulator.roles.history import POOLS, offered_load
from sglang_ares.srt.policy.elastic.instances import Slo

_SHADES = (COLOURS[0], COLOURS[4], COLOURS[1], COLOURS[5])
_BINS = 60


def stream_of(result: Result) -> RequestStream:
    """The requests that were simulated."""
    name, _, origin = result.workload.partition(": ")
    return RequestStream(
        name=name,
        origin=origin,
        arrival_s=result.arrival_s,
        prompt_tokens=result.prompt_tokens,
        output_tokens=result.output_tokens,
    )


def plot_roles(path: Path, results: Mapping[str, Result]) -> None:
    """A panel of pool sizes per result, titled with its key, above one of the offered load: workers
    that arriving prefill and decode work keeps busy. The results are of the same requests."""
    shown = [(name, r, r.roles) for name, r in results.items() if r.roles is not None]
    if not shown:
        raise ValueError("there are no roles to draw; simulate with roles")
    rows = len(shown) + 1
    figure = Figure(figsize=(10, 1 + 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, result, roles) in zip(panels, shown, strict=False):
        axes.stackplot(
            result.sample_s, roles.pools.T, labels=POOLS, colors=_SHADES, step="post", linewidth=0
        )
        axes.set_title(f"{name}: {len(roles.flips)} changes", loc="left", fontsize=11)
        axes.set_ylabel("workers")
        axes.set_ylim(0, roles.pools.sum(axis=1).max())
    first = shown[0][1]
    config, stream = first.config, stream_of(first)
    slo = Slo(ttft_ms=config.ttft_slo_ms, tpot_ms=config.tpot_slo_ms)
    bin_s = max(1.0, float(stream.arrival_s[-1]) / _BINS) if len(stream) else 1.0
    middle, prefill, decode = offered_load(stream, config.profile, slo, bin_s)
    load = panels[-1]
    load.plot(middle, prefill, color=COLOURS[0], drawstyle="steps-mid", label="prefill")
    load.plot(middle, decode, color=COLOURS[1], drawstyle="steps-mid", label="decode")
    load.set_title("offered load", loc="left", fontsize=11)
    load.set_ylabel("workers kept busy")
    load.set_ylim(0)
    load.set_xlabel("time (seconds)")
    load.legend(loc="upper right", fontsize=9, ncols=2)
    panels[0].legend(loc="upper right", fontsize=9, ncols=4)
    load.set_xlim(0, float(stream.arrival_s[-1]) if len(stream) else 1.0)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
