"""Starts the workers' processes, waits until they are ready, and watches over them.

A host that joins a cluster (``managers/worker_host.py``) starts its worker with the same parts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.disaggregation.refusals import ROLE_CHANGE, first_refusal
from sglang_ares.srt.emulation.settings import profile_of
from sglang_ares.srt.managers.cluster_views import FAILED_FOR_GOOD
from sglang_ares.srt.managers.fork_server import in_environment, process_context
from sglang_ares.srt.managers.io_struct import Peer
from sglang_ares.srt.managers.lease import LeaseTimes
from sglang_ares.srt.managers.remote_workers import Admission, RemoteWorker, WorkerStartError
from sglang_ares.srt.managers.run_time_changes import RunTimeChanges
from sglang_ares.srt.managers.worker_process import run_worker_process
from sglang_ares.srt.managers.worker_spec import WorkerSpec
from sglang_ares.srt.policy.types import DECODE, PREFILL
from sglang_ares.srt.predictor.start import chosen_head
from sglang_ares.srt.security.control_plane import ControlPlane, free_ports, private_port_args

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from sglang_ares.ares_args import AresArgs
    from sglang_ares.srt.managers.law_keeper import LawKeeper

logger = logging.getLogger(__name__)

# Up to this --max-running-requests upstream gives decode workers twice as many extra slots.
_FEW_REQUESTS = 32


@dataclass
class WorkerProcess:
    """A worker's processes (one per tensor-parallel rank) and addresses."""

    spec: WorkerSpec
    port_args: PortArgs
    processes: list[BaseProcess] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    # One per process that has not said yet that it is ready; when it must have.
    readers: list[Connection] = field(default_factory=list)
    deadline: float = 0.0
    start_timeout_s: float = 0.0
    # What has changed in the others, and how much of it this one was told at its start.
    changes: RunTimeChanges = field(default_factory=RunTimeChanges)
    knows: int = 0
    # A worker of another host may leave.
    left: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.spec.role} worker {self.spec.worker_id}"

    @property
    def ending(self) -> tuple[str, str] | None:
        """If it cannot be started anew: its state from now on, and why."""
        why = self.changes.why_not_anew
        return (FAILED_FOR_GOOD, why) if why is not None else None

    @property
    def alive(self) -> bool:
        """Whether all its processes run (a stopped process runs, too)."""
        return all(p.is_alive() for p in self.processes)

    @property
    def gone(self) -> bool:
        """Whether none of its processes is left."""
        return not any(p.is_alive() for p in self.processes)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [p.pid for p in self.processes if p.pid is not None]

    @property
    def ranks(self) -> int:
        """Processes that give signs of life."""
        return len(self.processes)

    @property
    def cause_of_death(self) -> str:
        """Why it is not alive."""
        codes = [p.exitcode for p in self.processes if not p.is_alive()]
        return f"died (exit code {codes[0]})"

    @property
    def peer(self) -> Peer:
        """How the other workers reach it."""
        return Peer(
            worker_id=self.spec.worker_id,
            role=self.spec.role,
            control_endpoint=self.spec.control_endpoint,
            bootstrap_host=self.spec.bootstrap_host,
            bootstrap_port=self.spec.bootstrap_port,
        )

    def spawn(self, start_timeout_s: float) -> None:
        """Start the processes; see :meth:`poll_ready`."""
        args = self.spec.server_args
        context = process_context(args.device)
        self.start_timeout_s = start_timeout_s
        self.deadline = time.monotonic() + start_timeout_s
        for rank in range(args.tp_size):
            reader, writer = context.Pipe(duplex=False)
            gpu_id = args.base_gpu_id + rank * args.gpu_id_step
            process = context.Process(  # type: ignore[attr-defined]
                target=in_environment,
                args=(
                    dict(os.environ),
                    run_worker_process,
                    self.spec,
                    self.port_args,
                    gpu_id,
                    rank,
                    writer,
                ),
                name=f"ares-{self.spec.role}-{self.spec.worker_id}-tp{rank}",
            )
            process.start()
            writer.close()
            self.processes.append(process)
            self.readers.append(reader)

    def poll_ready(self) -> bool:
        """Whether it has loaded its model; never waits.

        Raises :class:`WorkerStartError` if it has died or takes too long.
        """
        for reader in [r for r in self.readers if r.poll()]:
            try:
                info = reader.recv()
            except EOFError:
                raise self._died_while_starting() from None
            self.info = self.info or info
            self.readers.remove(reader)
            reader.close()
        if not self.alive:
            raise self._died_while_starting()
        if self.readers and time.monotonic() > self.deadline:
            raise WorkerStartError(
                f"{self.name} did not load its model within {self.start_timeout_s:.0f} s; raise "
                "--ares-worker-start-timeout."
            )
        if not self.readers and self.knows != self.changes.count:
            raise WorkerStartError(
                f"weights or LoRA adapters of the others have changed while {self.name} started"
            )
        return not self.readers

    def _died_while_starting(self) -> WorkerStartError:
        for process in self.processes:
            process.join(1)
        codes = [p.exitcode for p in self.processes if p.exitcode is not None]
        return WorkerStartError(
            f"{self.name} died while starting (exit code {codes[0] if codes else 'unknown'}); its "
            "own error is above. Exit code -9 usually means that memory ran out: start fewer "
            "workers."
        )

    def kill(self) -> None:
        """End the processes at once, stopped ones too."""
        for process in self.processes:
            process.kill()


class WorkerCluster:
    """All workers: the processes of this host, and those that have joined from others."""

    def __init__(
        self,
        server_args: ServerArgs,
        port_args: PortArgs,
        ares_args: AresArgs,
        control: ControlPlane,
        laws: LawKeeper,
    ) -> None:
        self._laws = laws
        self._server_args = server_args
        self._port_args = port_args
        self._ares_args = ares_args
        self._control = control
        self._profile = profile_of(ares_args)
        self.changes = RunTimeChanges()
        roles = [PREFILL] * ares_args.prefill_workers + [DECODE] * ares_args.decode_workers
        ports = free_ports(2 * len(roles), taken=control.ports)
        self.workers: list[WorkerProcess | RemoteWorker] = [
            self._worker(worker_id, role, ports[2 * worker_id : 2 * worker_id + 2], incarnation=0)
            for worker_id, role in enumerate(roles)
        ]

    def _worker(
        self, worker_id: int, role: str, ports: Sequence[int], incarnation: int
    ) -> WorkerProcess:
        ares_args, control = self._ares_args, self._control
        mailbox = control.worker(worker_id, incarnation)
        with_cache = ares_args.decode_radix_cache == "on"
        worker_args = worker_server_args(
            self._server_args, role, worker_id, control.host, ports, with_cache
        )
        spec = WorkerSpec(
            worker_id=worker_id,
            incarnation=incarnation,
            role=role,
            server_args=worker_args,
            control_endpoint=mailbox.connect,
            control_bind=mailbox.bind,
            curve_keys=control.keys,
            controller_endpoint=control.controller.connect,
            bootstrap_host=control.host,
            bootstrap_port=ports[0],
            report_interval_s=ares_args.report_interval,
            heartbeat_interval_s=LeaseTimes.of(ares_args.worker_timeout).beat_s,
            limits=migration_limits(ares_args),
            seeded_sampling=worker_args.sampling_backend == "pytorch",
            cluster_size=ares_args.total_workers,
            loads_instance_id=self._port_args.instance_id,
            fault_injection=ares_args.fault_injection,
            profile=self._profile,
            time_dilation=ares_args.time_dilation,
            laws=self._laws.for_worker(),
            emulate_predictions=ares_args.emulate_predictions,
            tells_of_room=ares_args.why_not_by_slo is None,
            predictor=""
            if self._profile is not None
            else str(chosen_head(ares_args.predictor, worker_args.model_path) or ""),
            record_states=ares_args.predictor_record,
            correct_drift=ares_args.predictor_correction,
            adapters=tuple(self.changes.adapters),
        )
        own = _worker_port_args(worker_args, self._port_args, control.runtime_dir)
        return WorkerProcess(spec, own, changes=self.changes, knows=self.changes.count)

    @property
    def why_roles_are_fixed(self) -> str | None:
        """What keeps workers from changing their role, if anything."""
        return why_roles_are_fixed(
            self._server_args, decode_radix_cache=self._ares_args.decode_radix_cache == "on"
        )

    @property
    def local(self) -> list[WorkerProcess]:
        """The workers of this host."""
        return [w for w in self.workers if isinstance(w, WorkerProcess)]

    # --- start ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every process and wait until all have loaded the model."""
        waiting = self.local
        for worker in waiting:
            worker.spawn(self._ares_args.worker_start_timeout)
        while waiting:
            waiting = [w for w in waiting if not w.poll_ready()]
            readers = [reader for w in waiting for reader in w.readers]
            if readers:
                wait(readers, timeout=1.0)

    # --- end and restart --------------------------------------------------------------------

    def kill(self, worker_id: int) -> None:
        """End a worker's processes at once, stopped ones too."""
        self.workers[worker_id].kill()

    def poll_ready(self, worker: WorkerProcess | RemoteWorker) -> bool:
        """Whether a worker that was started anew has loaded its model; never waits.

        Raises :class:`WorkerStartError` if it has died or takes too long.
        """
        return worker.poll_ready()

    def restart(self, worker_id: int) -> WorkerProcess | RemoteWorker:
        """Start a worker anew, with addresses of its own; one of another host may join again."""
        old = self.workers[worker_id]
        if isinstance(old, RemoteWorker):
            old.open(old.spec.incarnation + 1)
            return old
        worker = self._worker(
            worker_id,
            old.spec.role,
            free_ports(2, taken=self._control.ports),
            old.spec.incarnation + 1,
        )
        self.workers[worker_id] = worker
        worker.spawn(self._ares_args.worker_start_timeout)
        return worker

    def set_role(self, worker_id: int, role: str) -> None:
        """A worker has changed its role: peers are told, and a restart brings it back in it."""
        worker = self.workers[worker_id]
        if isinstance(worker, RemoteWorker):
            worker.spec = replace(worker.spec, role=role)
        else:
            worker.spec = replace(worker.spec, role=role)

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that become readable when a process ends."""
        return [p.sentinel for w in self.local for p in w.processes if p.is_alive()]


def migration_limits(ares_args: AresArgs) -> MigrationLimits:
    """The operator's limits, the same for every worker."""
    return MigrationLimits(
        timeout_s=ares_args.migration_timeout,
        max_inbound=ares_args.max_migrations_per_worker,
        max_outbound=ares_args.max_migrations_per_worker,
        chunk_tokens=ares_args.migration_chunk_tokens,
        bandwidth_mb_s=ares_args.migration_bandwidth,
        memory_share=ares_args.migration_memory_share,
        live_copy=ares_args.migration_copy == "live",
        kv_checksum=ares_args.kv_checksum,
    )


def admission_of(ares_args: AresArgs, control: ControlPlane) -> Admission | None:
    """What hosts that join are told; None if the control sockets are files."""
    if control.outputs is None:
        return None
    return Admission(
        worker_id=0,
        incarnation=0,
        controller_endpoint=control.controller.connect,
        outputs_endpoint=control.outputs.connect,
        report_interval_s=ares_args.report_interval,
        worker_timeout_s=ares_args.worker_timeout,
        start_timeout_s=ares_args.worker_start_timeout,
        limits=migration_limits(ares_args),
        decode_radix_cache=ares_args.decode_radix_cache == "on",
        predictor=ares_args.predictor,
        predictor_correction=ares_args.predictor_correction,
        fault_injection=ares_args.fault_injection,
        cluster_size=ares_args.total_workers,
    )


def why_roles_are_fixed(server_args: ServerArgs, *, decode_radix_cache: bool) -> str | None:
    """What keeps workers from changing their role, if anything."""
    row = first_refusal(ROLE_CHANGE, server_args)
    if row is not None:
        return f"{row.what}: {row.reason} {row.remedy}"
    if not decode_radix_cache and not server_args.disable_radix_cache:
        return (
            "--ares-decode-radix-cache off: prefill workers have a prefix cache, decode workers "
            "have none. Drop it, or give --disable-radix-cache too."
        )
    return None


def worker_server_args(
    server_args: ServerArgs,
    role: str,
    place: int,
    host: str,
    ports: Sequence[int],
    decode_radix_cache: bool = True,
) -> ServerArgs:
    """The operator's server arguments, set to one worker's role; not resolved yet. ``place``: how
    many workers of this host take GPUs before it. ``host``: its address. ``ports``: of its KV
    bootstrap server, and of its ranks' rendezvous."""
    bootstrap_port, nccl_port = ports
    fields = msgspec.structs.asdict(server_args)
    changes_role = why_roles_are_fixed(server_args, decode_radix_cache=decode_radix_cache) is None
    # On a CPU the "GPU id" is a NUMA node, and all workers share them.
    on_cpu = server_args.device == "cpu"
    gpus_per_worker = 0 if on_cpu else server_args.tp_size * server_args.gpu_id_step
    fields.update(
        disaggregation_mode=role,
        disaggregation_bootstrap_port=bootstrap_port,
        host=host,
        base_gpu_id=server_args.base_gpu_id + place * gpus_per_worker,
        # Upstream would draw it from the range of outgoing connections, where it may be taken
        # by the time the worker binds it.
        nccl_port=nccl_port,
        dist_init_addr=None,
        enable_pd_role_switch=changes_role,
    )
    with_cache = decode_radix_cache and not server_args.disable_radix_cache
    if with_cache and (changes_role or role == DECODE):
        # Upstream's default is off; less is sent to where a request's prefix is already.
        fields["disaggregation_decode_enable_radix_cache"] = True
    if changes_role and server_args.disaggregation_decode_extra_slots is None:
        # Upstream gives them to workers that are started for decode.
        most = server_args.max_running_requests
        few = most is not None and most <= _FEW_REQUESTS
        fields["disaggregation_decode_extra_slots"] = 2 * most if few else 0
    if role == PREFILL:
        fields["disaggregation_decode_retraction_backup"] = _declared_default(
            server_args, "disaggregation_decode_retraction_backup"
        )
    return type(server_args)(**fields)


def _declared_default(server_args: ServerArgs, name: str) -> Any:
    return next(f.default for f in msgspec.structs.fields(type(server_args)) if f.name == name)


def _worker_port_args(worker_args: ServerArgs, front: PortArgs, runtime_dir: str) -> PortArgs:
    """Sockets of its own for a worker, but the front's tokenizer and detokenizer."""
    port_args = private_port_args(worker_args, runtime_dir)
    port_args.tokenizer_ipc_name = front.tokenizer_ipc_name
    port_args.detokenizer_ipc_name = front.detokenizer_ipc_name
    return port_args
