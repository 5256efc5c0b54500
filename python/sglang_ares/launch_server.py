"""``python -m sglang_ares.launch_server``: any SGLang flag, and the ``--ares-*`` flags."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import shutil
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

from sglang_ares.ares_args import AresArgs, AresArgsError
from sglang_ares.srt.managers.fork_server import begin_imports_of_command

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_ares.profiles.profile import Profile


def build_parser(profile: Profile | None = None) -> argparse.ArgumentParser:
    """Upstream's parser with the ARES group first, ``--model-path`` optional, our defaults, which
    depend on the profile that is emulated."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ares.launch_server",
        description="Serve a model on a cluster of prefill and decode workers that moves running "
        "requests between decode workers. Every SGLang flag works as in SGLang.",
    )
    AresArgs.add_cli_args(parser)
    add_upstream_args(parser, profile)
    return parser


def add_upstream_args(parser: argparse.ArgumentParser, profile: Profile | None = None) -> None:
    """Every SGLang flag, ``--model-path`` optional, our defaults."""
    from sglang.srt.server_args import ServerArgs

    from sglang_ares.engine import default_server_args

    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        if action.dest == "model_path":
            action.required = False
            action.help = f"{action.help} Default: the embedded demo model."
    parser.set_defaults(**default_server_args(profile))


def parse_args(argv: list[str]) -> tuple[ServerArgs, AresArgs]:
    """Upstream's raw server arguments and ours; flags may come from ``--config`` too."""
    from sglang_ares.srt.emulation.settings import profile_of

    server_args, namespace = parse_upstream_args(build_parser(), argv)
    profile = profile_of(AresArgs.from_namespace(namespace))
    if profile is not None:
        server_args, namespace = parse_upstream_args(build_parser(profile), argv)
    return server_args, AresArgs.from_namespace(namespace)


def parse_upstream_args(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[ServerArgs, argparse.Namespace]:
    """Upstream's raw server arguments, and all that was parsed; sets up logging."""
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    if "--config" in argv:
        argv = ConfigArgumentMerger(parser).merge_config_with_args(argv)
    namespace = parser.parse_args(argv)
    # Upstream notes on the namespace whether this flag was given.
    namespace._radix_eviction_policy_explicitly_set = any(
        a.split("=", 1)[0] == "--radix-eviction-policy" for a in argv
    )
    logging.basicConfig(
        level=getattr(logging, namespace.log_level.upper()),
        format="[%(asctime)s] %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    return ServerArgs.from_cli_args(namespace), namespace


def check_port(host: str, port: int) -> None:
    """Raise :class:`AresArgsError` if the HTTP port cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AresArgsError(
                f"--port {port} on --host {host} cannot be used ({error.strerror}); "
                "choose another --port."
            ) from None


def launch_server(server_args: ServerArgs, ares_args: AresArgs) -> None:
    """Start the cluster and serve HTTP until interrupted."""
    from sglang.srt.entrypoints.http_server import _setup_and_run_http_server, app
    from sglang.srt.managers.scheduler import run_scheduler_process

    from sglang_ares.engine import (
        Engine,
        control_plane_of,
        detokenizer_of,
        prepare_server_args,
    )
    from sglang_ares.srt.entrypoints.admin_api import add_ares_routes
    from sglang_ares.srt.entrypoints.front_client import FrontClient
    from sglang_ares.srt.entrypoints.leaving import RefuseWhileLeaving
    from sglang_ares.srt.entrypoints.measure import measure_before_serving, measure_if_needed

    check_port(server_args.host, server_args.port)
    server_args = prepare_server_args(server_args, ares_args)
    control = control_plane_of(server_args)
    atexit.register(shutil.rmtree, control.runtime_dir, ignore_errors=True)
    tokenizer_manager, template_manager, port_args, started, watchdog, _ = (
        Engine._launch_subprocesses(
            server_args=server_args,
            init_tokenizer_manager_func=Engine.init_tokenizer_manager_func,
            run_scheduler_process_func=run_scheduler_process,
            run_detokenizer_process_func=detokenizer_of(server_args),
        )
    )
    client = FrontClient(
        control.front.connect, keys=control.keys, attainment=tokenizer_manager.attainment
    )
    add_ares_routes(app, client)
    measure_before_serving(app, lambda: measure_if_needed(client, tokenizer_manager, ares_args))
    app.add_middleware(
        RefuseWhileLeaving, is_leaving=lambda: bool(tokenizer_manager.gracefully_exit)
    )
    _setup_and_run_http_server(
        server_args,
        tokenizer_manager,
        template_manager,
        port_args,
        started.scheduler_infos,
        watchdog,
    )


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""

    try:
        server_args, ares_args = parse_args(sys.argv[1:] if argv is None else argv)
        from sglang.srt.plugins import load_plugins

        load_plugins()
        launch_server(server_args, ares_args)
    except AresArgsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        from sglang.srt.utils import kill_process_tree

        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def leave(status: int) -> NoReturn:
    """Exit without the interpreter's own teardown, in which native libraries print pages of
    warnings about leaked objects; everything registered to run at exit has run."""
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    begin_imports_of_command(sys.argv[1:])
    try:
        exit_status = main()
    except KeyboardInterrupt:
        exit_status = 130
    except SystemExit as stop:  # argparse, and upstream's HTTP server when it cannot start
        exit_status = stop.code if isinstance(stop.code, int) else 1
    leave(exit_status)
