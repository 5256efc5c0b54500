"""Workloads: request streams, built in or loaded from published traces."""

from __future__ import annotations

from sglang_ares.bench.workloads.azure2023 import load_azure2023
from sglang_ares.bench.workloads.load import BUILT_IN, load_workload
from sglang_ares.bench.workloads.mooncake import load_mooncake
from sglang_ares.bench.workloads.servegen import ServeGen
from sglang_ares.bench.workloads.stream import RequestStream, WorkloadError
from sglang_ares.bench.workloads.synthetic import arrivals, lognormal, reasoning, swing

__all__ = [
    "BUILT_IN",
    "RequestStream",
    "ServeGen",
    "WorkloadError",
    "arrivals",
    "load_azure2023",
    "load_mooncake",
    "load_workload",
    "lognormal",
    "reasoning",
    "swing",
]
