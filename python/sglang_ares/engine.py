"""The cluster, embedded: upstream's ``Engine`` with ``ares_*`` keyword arguments."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing as mp
import os
import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.engine import Engine as UpstreamEngine
from sglang.srt.entrypoints.engine import SchedulerInitResult, _wait_for_scheduler_ready
from sglang.srt.server_args import ServerArgs

from sglang_ares.ares_args import AresArgs, AresArgsError
from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.srt.disaggregation.refusals import CLUSTER, first_refusal
from sglang_ares.srt.emulation.settings import announce, emulated_server_args, profile_of
from sglang_ares.srt.entrypoints.front_client import FrontClient
from sglang_ares.srt.entrypoints.measure import measure_if_needed
from sglang_ares.srt.managers.fork_server import has_begun, in_environment
from sglang_ares.srt.managers.tokenizer_manager import init_ares_tokenizer_manager
from sglang_ares.srt.managers.worker_process import run_controller_process, run_detokenizer
from sglang_ares.srt.platforms.cpu import (
    CPU_DEFAULTS,
    accelerator_present,
    give_cores_to_ranks,
)
from sglang_ares.srt.predictor.card import PredictorError, check_model, load_head
from sglang_ares.srt.predictor.start import AUTO, OFF, chosen_head
from sglang_ares.srt.security.control_plane import ControlPlane, private_port_args

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.server_args import PortArgs

    from sglang_ares.profiles.profile import Profile


def default_server_args(profile: Profile | None = None) -> dict[str, Any]:
    """Upstream's server arguments where ours differ from upstream's defaults; whatever the
    operator gives wins over them. ``profile``: what the workers emulate, if they do."""
    defaults = {"model_path": str(MODEL_DIR), "disaggregation_transfer_backend": "nixl"}
    if profile is not None:
        return {**defaults, **CPU_DEFAULTS, **emulated_server_args(profile)}
    return defaults if accelerator_present() else {**defaults, **CPU_DEFAULTS}


def prepare_server_args(server_args: ServerArgs, ares_args: AresArgs) -> ServerArgs:
    """Check the operator's arguments and attach ``ares_args``.

    Raises :class:`AresArgsError` with the flag and the remedy.
    """
    if ares_args.kv_checksum and server_args.tp_size > 1:
        raise AresArgsError(
            "--ares-kv-checksum cannot be used with --tp-size > 1: every rank holds other KV, and "
            "only one checksum travels. Drop one of them."
        )
    prepare_host(server_args)
    profile = profile_of(ares_args)
    if profile is not None:
        announce(profile, ares_args.time_dilation)
        ares_args = ares_args.dilated()
    _check_head(ares_args, server_args.model_path)
    if ares_args.kv_checksum and server_args.device != "cpu":
        server_args.disaggregation_enable_kv_checksum = True
    server_args._ares_args = ares_args
    server_args._ares_control = ControlPlane.create(ares_args)
    return server_args


def prepare_host(server_args: ServerArgs) -> None:
    """Check upstream's arguments, and set this process's environment for workers as its children.

    Raises :class:`AresArgsError` with the flag and the remedy.
    """
    row = first_refusal(CLUSTER, server_args)
    if row is not None:
        raise AresArgsError(f"{row.what} cannot be used: {row.reason} {row.remedy}")
    _check_model_path(server_args.model_path)
    if server_args.device == "cpu":
        # Before any child starts: several workers share few cores, and nothing can be learnt
        # from CUDA core dumps, for which upstream waits a minute when a worker dies.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        give_cores_to_ranks(server_args.tp_size)
        os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS", "0")


def _check_head(ares_args: AresArgs, model_path: str) -> None:
    """An emulated forward has no hidden states to predict from."""
    if not ares_args.emulate:
        check_head(ares_args.predictor, model_path)
    elif ares_args.predictor not in (AUTO, OFF):
        raise AresArgsError(
            "--ares-predictor needs the hidden states of a model, and --ares-emulate runs none. "
            "Drop one of them."
        )


def check_head(predictor: str, model_path: str) -> None:
    """Whether there is a head as asked for, and for this model; :class:`AresArgsError` if not."""
    folder = chosen_head(predictor, model_path)
    try:
        if folder is not None:
            check_model(load_head(folder)[1], model_path, folder)
    except PredictorError as error:
        raise AresArgsError(str(error)) from None


def _check_model_path(model_path: str) -> None:
    is_path = model_path.startswith(("/", "./", "../", "~")) or model_path.count("/") > 1
    if is_path and "://" not in model_path and not Path(model_path).expanduser().exists():
        raise AresArgsError(
            f"--model-path {model_path!r} does not exist. Name a folder with a Hugging Face "
            "model or a model id such as Qwen/Qwen3-8B; leave it out for the demo model."
        )


def control_plane_of(server_args: ServerArgs) -> ControlPlane:
    """Where the control sockets are, as attached by :func:`prepare_server_args`."""
    control: ControlPlane = server_args._ares_control
    return control


def ares_args_of(server_args: ServerArgs) -> AresArgs:
    """The cluster's configuration, as attached by :func:`prepare_server_args`."""
    ares_args: AresArgs = server_args._ares_args
    return ares_args


def detokenizer_of(server_args: ServerArgs) -> Callable[..., None]:
    """The entry point of the detokenizer's process."""
    return functools.partial(run_detokenizer, control_plane_of(server_args))


class Engine(UpstreamEngine):
    """Upstream's engine, served by a cluster of prefill and decode workers.

    Takes upstream's keyword arguments plus the fields of :class:`AresArgs` with the prefix
    ``ares_`` (``ares_decode_workers=4``); ``model_path`` defaults to the embedded model. Use it
    as a context manager: leaving it ends every process it started.
    """

    init_tokenizer_manager_func = staticmethod(init_ares_tokenizer_manager)

    def __init__(self, **kwargs: Any) -> None:
        ares_args = AresArgs.pop_from_kwargs(kwargs)
        server_args = kwargs.get("server_args")
        if server_args is None:
            defaults = default_server_args(profile_of(ares_args))
            server_args = ServerArgs(**{"log_level": "error", **defaults, **kwargs})
        server_args = prepare_server_args(server_args, ares_args)
        self.run_detokenizer_process_func = detokenizer_of(server_args)
        super().__init__(server_args=server_args)
        control = control_plane_of(self.server_args)
        self._client = FrontClient(
            control.front.connect,
            keys=control.keys,
            attainment=self.tokenizer_manager.attainment,
        )
        if not _within_a_loop():
            self._run(
                measure_if_needed(
                    self._client, self.tokenizer_manager, ares_args_of(self.server_args)
                )
            )

    @classmethod
    def _launch_subprocesses(cls, server_args: ServerArgs, **kwargs: Any) -> Any:
        """Upstream's, with its sockets in the runtime directory, where only its owner may go."""
        kwargs["port_args"] = private_port_args(
            server_args, control_plane_of(server_args).runtime_dir
        )
        return super()._launch_subprocesses(server_args=server_args, **kwargs)

    @classmethod
    def _launch_scheduler_processes(
        cls,
        server_args: ServerArgs,
        port_args: PortArgs,
        run_scheduler_process_func: Callable[..., None],
        **kwargs: Any,
    ) -> tuple[SchedulerInitResult, list[mp.Process]]:
        """Start the controller, which starts the workers."""
        if server_args.device == "cpu" and has_begun():
            # Upstream has just chosen "spawn"; its detokenizer, too, can fork.
            mp.set_start_method("forkserver", force=True)
        reader, writer = mp.Pipe(duplex=False)
        arguments = (
            server_args,
            port_args,
            ares_args_of(server_args),
            control_plane_of(server_args),
        )
        process = mp.Process(
            target=in_environment,
            args=(
                dict(os.environ),
                run_controller_process,
                server_args.device,
                pickle.dumps(arguments),
                writer,
            ),
            name="ares-controller",
        )
        process.start()
        writer.close()
        pids = [process.pid]
        infos: list[dict[str, Any]] = []

        def wait_for_ready() -> None:
            infos.extend(_wait_for_scheduler_ready([reader], [process]))
            pids.extend(infos[0]["scheduler_pids"])

        result = SchedulerInitResult(
            scheduler_infos=infos,
            all_child_pids=pids,
            wait_for_ready=wait_for_ready,
            block_until_scheduler_exits=process.join,
        )
        return result, [process]

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, *args: Any, run_detokenizer_process_func: Callable[..., None], **kwargs: Any
    ) -> Any:
        """Upstream's, in the environment of this moment."""
        run = functools.partial(in_environment, dict(os.environ), run_detokenizer_process_func)
        return super()._launch_detokenizer_subprocesses(
            *args, run_detokenizer_process_func=run, **kwargs
        )

    def shutdown(self) -> None:
        """End every process and remove the sockets."""
        if client := getattr(self, "_client", None):
            client.close()
        super().shutdown()
        runtime_dir = control_plane_of(self.server_args).runtime_dir
        shutil.rmtree(runtime_dir, ignore_errors=True)

    # --- ARES -------------------------------------------------------------------------------

    def ares_status(self) -> dict[str, Any]:
        """The document of ``GET /ares/status``."""
        status: dict[str, Any] = self._run(self._client.status())[1]
        return status

    def ares_requests(self) -> list[dict[str, Any]]:
        """The document of ``GET /ares/requests``."""
        requests: list[dict[str, Any]] = self._run(self._client.requests())[1]
        return requests

    def ares_migrate(self, rid: str, target: int) -> dict[str, Any]:
        """Move a request and wait; the document of ``POST /ares/migrate``."""
        outcome: dict[str, Any] = self._run(self._client.migrate(rid, target))[1]
        return outcome

    def ares_change_role(self, worker_id: int, role: str) -> dict[str, Any]:
        """Change a worker's role and wait; the document of ``POST /ares/role``."""
        outcome: dict[str, Any] = self._run(self._client.change_role(worker_id, role))[1]
        return outcome

    async def async_ares_migrate(self, rid: str, target: int) -> dict[str, Any]:
        """As :meth:`ares_migrate`, while requests of ``async_generate`` run in the same loop."""
        outcome: dict[str, Any] = (await self._client.migrate(rid, target))[1]
        return outcome

    async def async_ares_requests(self) -> list[dict[str, Any]]:
        """As :meth:`ares_requests`, within a running loop."""
        requests: list[dict[str, Any]] = (await self._client.requests())[1]
        return requests

    async def async_ares_status(self) -> dict[str, Any]:
        """As :meth:`ares_status`, within a running loop."""
        status: dict[str, Any] = (await self._client.status())[1]
        return status

    def _run(self, coroutine: Any) -> Any:
        loop: asyncio.AbstractEventLoop = self.loop
        return loop.run_until_complete(coroutine)


def _within_a_loop() -> bool:
    """Whether the caller runs in an event loop, where nothing can be waited for."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
