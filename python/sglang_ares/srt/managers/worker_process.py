"""Entry points of the child processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from sglang_ares.srt.managers.fork_server import begin_imports

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs

    from sglang_ares.srt.managers.worker_spec import WorkerSpec
    from sglang_ares.srt.security.control_plane import ControlPlane


def leave_signals_to_the_front() -> None:
    """A terminal's Ctrl-C and a service manager's SIGTERM reach every process; only the front
    decides what they mean. Its death ends this process in any case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from sglang.srt.utils import kill_itself_when_parent_died

    # Upstream's processes do so when they have loaded; a parent that SIGTERM ends while they load
    # must not leave them behind, now that SIGTERM does not end them.
    kill_itself_when_parent_died()
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        sys.exit()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_controller_process(device: str, arguments: bytes, writer: Connection) -> None:
    """The controller. ``arguments``: of ``run_controller``, pickled, as reading them imports
    SGLang: where no fork server runs yet, the workers' begins with that first, and both import at
    once."""
    begin_imports(device)
    leave_signals_to_the_front()
    from sglang_ares.srt.managers.controller import run_controller

    server_args, port_args, ares_args, control = pickle.loads(arguments)
    run_controller(server_args, port_args, ares_args, control, writer)


def nothing() -> None:
    """A process that only has to start."""


def run_worker_process(
    spec: WorkerSpec, port_args: PortArgs, gpu_id: int, tp_rank: int, writer: Connection
) -> None:
    """One tensor-parallel rank of a worker: its KV bootstrap server (rank 0) and its scheduler."""
    leave_signals_to_the_front()
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class
    from sglang.srt.managers.scheduler import run_scheduler_process

    from sglang_ares.plugin import hook_worker
    from sglang_ares.srt.managers.scheduler import AresScheduler
    from sglang_ares.srt.platforms.cpu import transfer_over_interface_of
    from sglang_ares.srt.predictor.start import predict_lengths

    # Where upstream's KV managers listen; it would look for an address of its own.
    os.environ.setdefault("SGLANG_HOST_IP", spec.bootstrap_host)
    server_args = spec.server_args
    if server_args.device == "cpu":
        transfer_over_interface_of(spec.bootstrap_host)
    server_args.resolve_once()
    if tp_rank == 0:
        resolved = resolution_result(server_args, "disaggregation_transfer_backend")
        backend = TransferBackend(resolved)
        bootstrap_server = get_kv_class(backend, KVClassType.BOOTSTRAP_SERVER)
        bootstrap_server(spec.bootstrap_host, spec.bootstrap_port)
    AresScheduler.spec = spec
    if spec.profile is not None:
        from sglang_ares.srt.emulation.device import EmulatedDevice
        from sglang_ares.srt.emulation.forward import EmulatedForward
        from sglang_ares.srt.emulation.predictions import EmulatedPredictions

        AresScheduler.emulated = EmulatedDevice(spec.profile, spec.time_dilation)
        AresScheduler.emulated_predictions = EmulatedPredictions(spec.emulate_predictions)
        forward = EmulatedForward(AresScheduler.emulated)
    else:
        forward = None
    AresScheduler.predictions = predict_lengths(spec, tp_rank)
    hook_worker(
        AresScheduler,
        overlap=not server_args.disable_overlap_schedule,
        seeded_sampling=spec.seeded_sampling,
        forward=forward,
    )
    run_scheduler_process(server_args, port_args, gpu_id, tp_rank, 0, None, writer)


def run_detokenizer(control: ControlPlane, *args: Any, **kwargs: Any) -> None:
    """Upstream's detokenizer process, with our detokenizer."""
    leave_signals_to_the_front()
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    from sglang_ares.srt.managers.detokenizer_manager import AresDetokenizerManager

    AresDetokenizerManager.control = control
    run_detokenizer_process(*args, detokenizer_manager_class=AresDetokenizerManager, **kwargs)
