"""Starts the workers' processes, waits until they are ready, and watches over them."""

from __future__ import annotations

import logging
import multiprocessing as mp
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
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
    # One per process that has not said yet that it is ready; when it must have.
    readers: list[Connection] = field(default_factory=list)
    deadline: float = 0.0

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.spec.role} worker {self.spec.worker_id}"

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
        self._server_args = server_args
        self._port_args = port_args
        self._ares_args = ares_args
        self._control = control
        roles = [PREFILL] * ares_args.prefill_workers + [DECODE] * ares_args.decode_workers
        ports = free_ports(2 * len(roles), taken=control.ports)
        self.workers = [
            self._worker(worker_id, role, ports[2 * worker_id : 2 * worker_id + 2], incarnation=0)
            for worker_id, role in enumerate(roles)
        ]

    def _worker(
        self, worker_id: int, role: str, ports: Sequence[int], incarnation: int
    ) -> WorkerProcess:
        ares_args, control = self._ares_args, self._control
        mailbox = control.worker(worker_id, incarnation)
        with_cache = ares_args.decode_radix_cache == "on"
        worker_args = worker_server_args(self._server_args, role, worker_id, ports, with_cache)
        spec = WorkerSpec(
            worker_id=worker_id,
            incarnation=incarnation,
            role=role,
            server_args=worker_args,
            control_endpoint=mailbox.connect,
            control_bind=mailbox.bind,
            curve_keys=control.keys,
            controller_endpoint=control.controller.connect,
            bootstrap_host=_LOOPBACK,
            bootstrap_port=ports[0],
            report_interval_s=ares_args.report_interval,
            heartbeat_interval_s=min(1.0, ares_args.worker_timeout / 5),
            limits=MigrationLimits(
                timeout_s=ares_args.migration_timeout,
                max_inbound=ares_args.max_migrations_per_worker,
                max_outbound=ares_args.max_migrations_per_worker,
                chunk_tokens=ares_args.migration_chunk_tokens,
                bandwidth_mb_s=ares_args.migration_bandwidth,
                memory_share=ares_args.migration_memory_share,
                live_copy=ares_args.migration_copy == "live",
                kv_checksum=ares_args.kv_checksum,
            ),
            seeded_sampling=worker_args.sampling_backend == "pytorch",
            cluster_size=ares_args.total_workers,
            loads_instance_id=self._port_args.instance_id,
            fault_injection=ares_args.fault_injection,
        )
        own = _worker_port_args(worker_args, self._port_args, control.runtime_dir)
        return WorkerProcess(spec, own)

    # --- start ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every process and wait until all have loaded the model."""
        for worker in self.workers:
            self._spawn(worker)
        waiting = list(self.workers)
        while waiting:
            waiting = [w for w in waiting if not self.poll_ready(w)]
            readers = [reader for w in waiting for reader in w.readers]
            if readers:
                wait(readers, timeout=1.0)

    def _spawn(self, worker: WorkerProcess) -> None:
        args = worker.spec.server_args
        context = _process_context(args)
        worker.deadline = time.monotonic() + self._ares_args.worker_start_timeout
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
            worker.readers.append(reader)

    def poll_ready(self, worker: WorkerProcess) -> bool:
        """Whether a worker that was started has loaded its model; never waits.

        Raises :class:`WorkerStartError` if it has died or takes too long.
        """
        for reader in [r for r in worker.readers if r.poll()]:
            try:
                info = reader.recv()
            except EOFError:
                raise _died_while_starting(worker) from None
            worker.info = worker.info or info
            worker.readers.remove(reader)
            reader.close()
        if not worker.alive:
            raise _died_while_starting(worker)
        if worker.readers and time.monotonic() > worker.deadline:
            raise WorkerStartError(
                f"{worker.name} did not load its model within "
                f"{self._ares_args.worker_start_timeout:.0f} s; raise "
                "--ares-worker-start-timeout."
            )
        return not worker.readers

    # --- end and restart --------------------------------------------------------------------

    def kill(self, worker_id: int) -> None:
        """End a worker's processes at once, stopped ones too."""
        for process in self.workers[worker_id].processes:
            process.kill()

    def restart(self, worker_id: int) -> WorkerProcess:
        """Start a worker anew, with addresses of its own; see :meth:`poll_ready`."""
        old = self.workers[worker_id].spec
        worker = self._worker(
            worker_id, old.role, free_ports(2, taken=self._control.ports), old.incarnation + 1
        )
        self.workers[worker_id] = worker
        self._spawn(worker)
        return worker

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that become readable when a process ends."""
        return [p.sentinel for w in self.workers for p in w.processes if p.is_alive()]


def _died_while_starting(worker: WorkerProcess) -> WorkerStartError:
    for process in worker.processes:
        process.join(1)
    codes = [p.exitcode for p in worker.processes if p.exitcode is not None]
    return WorkerStartError(
        f"{worker.name} died while starting (exit code {codes[0] if codes else 'unknown'}); its "
        "own error is above. Exit code -9 usually means that memory ran out: start fewer workers."
    )


def worker_server_args(
    server_args: ServerArgs,
    role: str,
    worker_id: int,
    ports: Sequence[int],
    decode_radix_cache: bool = True,
) -> ServerArgs:
    """The operator's server arguments, set to one worker's role; not resolved yet. ``ports``: of
    its KV bootstrap server, and of its ranks' rendezvous."""
    bootstrap_port, nccl_port = ports
    fields = msgspec.structs.asdict(server_args)
    # On a CPU the "GPU id" is a NUMA node, and all workers share them.
    on_cpu = server_args.device == "cpu"
    gpus_per_worker = 0 if on_cpu else server_args.tp_size * server_args.gpu_id_step
    fields.update(
        disaggregation_mode=role,
        disaggregation_bootstrap_port=bootstrap_port,
        host=_LOOPBACK,
        base_gpu_id=server_args.base_gpu_id + worker_id * gpus_per_worker,
        # Upstream would draw it from the range of outgoing connections, where it may be taken
        # by the time the worker binds it.
        nccl_port=nccl_port,
        dist_init_addr=None,
    )
    if role == DECODE and decode_radix_cache and not server_args.disable_radix_cache:
        # Upstream's default is off; less is sent to where a request's prefix is already.
        fields["disaggregation_decode_enable_radix_cache"] = True
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
