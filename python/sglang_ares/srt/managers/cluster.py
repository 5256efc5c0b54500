"""Starts the workers' processes, waits until they are ready, and watches over them."""

from __future__ import annotations

import logging
import multiprocessing as mp
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import msgspec
from sglang.srt.server_args import PortArgs, ServerArgs

from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.managers.io_struct import Peer
from sglang_ares.srt.managers.worker_process import run_worker_process
from sglang_ares.srt.managers.worker_spec import WorkerSpec
from sglang_ares.srt.policy.types import DECODE, PREFILL
from sglang_ares.srt.security.control_plane import ControlPlane, free_ports, private_port_args

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from sglang_ares.ares_args import AresArgs

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"


class WorkerStartError(RuntimeError):
    """A worker did not come up; the text names it and says why as far as known."""


@dataclass
class WorkerProcess:
    """A worker's processes (one per tensor-parallel rank) and addresses."""

    spec: WorkerSpec
    port_args: PortArgs
    processes: list[BaseProcess] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [p.pid for p in self.processes if p.pid is not None]

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


class WorkerCluster:
    """All worker processes of one host."""

    def __init__(
        self,
        server_args: ServerArgs,
        port_args: PortArgs,
        ares_args: AresArgs,
        control: ControlPlane,
    ) -> None:
        self._ares_args = ares_args
        self.workers: list[WorkerProcess] = []
        roles = [PREFILL] * ares_args.prefill_workers + [DECODE] * ares_args.decode_workers
        ports = free_ports(len(roles), taken=control.ports)
        for worker_id, (role, port) in enumerate(zip(roles, ports, strict=True)):
            worker_args = worker_server_args(server_args, role, worker_id, port)
            spec = WorkerSpec(
                worker_id=worker_id,
                role=role,
                server_args=worker_args,
                control_endpoint=control.workers[worker_id].connect,
                control_bind=control.workers[worker_id].bind,
                curve_keys=control.keys,
                controller_endpoint=control.controller.connect,
                bootstrap_host=_LOOPBACK,
                bootstrap_port=port,
                report_interval_s=ares_args.report_interval,
                limits=MigrationLimits(
                    timeout_s=ares_args.migration_timeout,
                    max_inbound=ares_args.max_migrations_per_worker,
                    kv_checksum=ares_args.kv_checksum,
                ),
                seeded_sampling=worker_args.sampling_backend == "pytorch",
                cluster_size=len(roles),
                loads_instance_id=port_args.instance_id,
            )
            self.workers.append(
                WorkerProcess(spec, _worker_port_args(worker_args, port_args, control.runtime_dir))
            )

    def start(self) -> None:
        """Start every process and wait until all have loaded the model."""
        context = _process_context(self.workers[0].spec.server_args)
        readers: list[tuple[WorkerProcess, BaseProcess, Connection]] = []
        for worker in self.workers:
            args = worker.spec.server_args
            for rank in range(args.tp_size):
                reader, writer = context.Pipe(duplex=False)
                gpu_id = args.base_gpu_id + rank * args.gpu_id_step
                process = context.Process(  # type: ignore[attr-defined]
                    target=run_worker_process,
                    args=(worker.spec, worker.port_args, gpu_id, rank, writer),
                    name=f"ares-{worker.spec.role}-{worker.spec.worker_id}-tp{rank}",
                )
                process.start()
                writer.close()
                worker.processes.append(process)
                readers.append((worker, process, reader))
        deadline = time.monotonic() + self._ares_args.worker_start_timeout
        for worker, process, reader in readers:
            info = self._await_ready(worker, process, reader, deadline)
            worker.info = worker.info or info

    def _await_ready(
        self,
        worker: WorkerProcess,
        process: BaseProcess,
        reader: Connection,
        deadline: float,
    ) -> dict[str, Any]:
        name = f"{worker.spec.role} worker {worker.spec.worker_id}"
        while not reader.poll(1.0):
            for other in self.workers:
                dead = [p for p in other.processes if not p.is_alive()]
                if dead:
                    raise WorkerStartError(
                        f"{other.spec.role} worker {other.spec.worker_id} died while starting "
                        f"(exit code {dead[0].exitcode}); its own error is above. Exit code -9 "
                        "usually means that memory ran out: start fewer workers."
                    )
            if time.monotonic() > deadline:
                raise WorkerStartError(
                    f"{name} did not load its model within "
                    f"{self._ares_args.worker_start_timeout:.0f} s; raise "
                    "--ares-worker-start-timeout."
                )
        try:
            info: dict[str, Any] = reader.recv()
        except EOFError:
            process.join(10)
            raise WorkerStartError(
                f"{name} died while starting (exit code {process.exitcode}); "
                "its own error is above."
            ) from None
        return info

    def dead_worker(self) -> WorkerProcess | None:
        """A worker that lost a process, if there is one."""
        for worker in self.workers:
            if not all(p.is_alive() for p in worker.processes):
                return worker
        return None

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that become readable when a process ends."""
        return [p.sentinel for w in self.workers for p in w.processes]


def worker_server_args(
    server_args: ServerArgs, role: str, worker_id: int, bootstrap_port: int
) -> ServerArgs:
    """The operator's server arguments, set to one worker's role; not resolved yet."""
    fields = msgspec.structs.asdict(server_args)
    # On a CPU the "GPU id" is a NUMA node, and all workers share them.
    on_cpu = server_args.device == "cpu"
    gpus_per_worker = 0 if on_cpu else server_args.tp_size * server_args.gpu_id_step
    fields.update(
        disaggregation_mode=role,
        disaggregation_bootstrap_port=bootstrap_port,
        host=_LOOPBACK,
        base_gpu_id=server_args.base_gpu_id + worker_id * gpus_per_worker,
        nccl_port=None,
        dist_init_addr=None,
    )
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


def _process_context(worker_args: ServerArgs) -> BaseContext:
    """How to start workers. On a CPU they fork from a server that has imported SGLang once;
    with an accelerator each starts afresh, as upstream does."""
    if worker_args.device != "cpu":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["sglang_ares.srt.managers.preload"])
    return context
