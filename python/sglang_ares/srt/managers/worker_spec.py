"""What a worker process is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_ares.profiles.laws import NO_LAWS, Laws
from sglang_ares.profiles.profile import Profile
from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.security.curve import CurveKeys

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs


@dataclass(frozen=True)
class WorkerSpec:
    """One worker. ``server_args`` are upstream's, already set to the worker's role;
    ``incarnation`` counts its restarts; ``loads_instance_id`` names the shared memory that
    ``/v1/loads`` reads. The mailbox listens on ``control_bind``; others reach it at
    ``control_endpoint``. ``profile``: what it emulates, if it does, ``time_dilation`` times as
    slow. ``laws``: what is known of its step times before it has made a step. On another host
    than the front's: ``outputs_endpoint`` is where the tokens go, and ``lease`` (shared with
    the host's process) says until when the worker may live (``managers/lease.py``)."""

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
    # A folder with a length head, and where to record hidden states; empty: neither.
    predictor: str
    record_states: str
    correct_drift: bool
    profile: Profile | None = None
    time_dilation: float = 1.0
    laws: Laws = NO_LAWS
    emulate_predictions: str = "none"
    # Whether anybody may wait for its memory in the controller.
    tells_of_room: bool = False
    # Upstream's requests by which LoRA adapters were loaded and unloaded before this start.
    adapters: tuple[Any, ...] = ()
    outputs_endpoint: str | None = None
    lease: Any = None
