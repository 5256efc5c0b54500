"""What a worker process is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.security.curve import CurveKeys

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class WorkerSpec:
    """One worker. ``server_args`` are upstream's, already set to the worker's role;
    ``incarnation`` counts its restarts; ``loads_instance_id`` names the shared memory that
    ``/v1/loads`` reads. The mailbox listens on ``control_bind``; others reach it at
    ``control_endpoint``."""

    worker_id: int
    incarnation: int
    role: str
    server_args: ServerArgs
    control_endpoint: str
    controller_endpoint: str
    bootstrap_host: str
    bootstrap_port: int
    report_interval_s: float
    heartbeat_interval_s: float
    limits: MigrationLimits
    seeded_sampling: bool
    cluster_size: int
    loads_instance_id: str
    fault_injection: bool
    control_bind: str
    curve_keys: CurveKeys | None
