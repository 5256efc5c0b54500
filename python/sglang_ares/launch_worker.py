"""``python -m sglang_ares.launch_worker``: a worker on another host, joining a running cluster."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sglang_ares.ares_args import AresArgsError
from sglang_ares.launch_server import add_upstream_args, leave, parse_upstream_args
from sglang_ares.srt.managers.fork_server import begin_imports_of_command

if TYPE_CHECKING:
    from sglang_ares.srt.managers.worker_host import HostConfig

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Our flags, then upstream's."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ares.launch_worker",
        description="Join a running cluster with one worker of this host. Give it the SGLang flags "
        "that the server was given: a worker with another model, type or page size is refused. "
        "Ctrl-C or SIGTERM empties the worker and leaves; twice leaves at once.",
    )
    add_own_args(parser)
    add_upstream_args(parser)
    return parser


def add_own_args(parser: argparse.ArgumentParser) -> None:
    """The flags that are not upstream's, as a group of their own."""
    group = parser.add_argument_group("ARES", "The cluster to join, and this host's part in it.")
    group.add_argument(
        "--join",
        required=True,
        metavar="tcp://HOST:PORT",
        help="Where the cluster's queries arrive: the server's --ares-control-host and "
        "--ares-control-port.",
    )
    group.add_argument(
        "--role", required=True, choices=("prefill", "decode"), help="What the worker does."
    )
    group.add_argument(
        "--worker-host",
        metavar="ADDR",
        help="Address of this host at which the others reach it. Default: the one from which "
        "--join is reached.",
    )
    group.add_argument(
        "--worker-port",
        type=int,
        default=0,
        metavar="PORT",
        help="First of four TCP ports of this worker: its host process, its KV bootstrap server, "
        "the rendezvous of its ranks, its mailbox. Default: free ones.",
    )
    group.add_argument(
        "--join-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="Seconds the controller may be out of reach, at the start and later, before this "
        "host gives up. Default: 60.",
    )
    group.add_argument(
        "--ares-curve-keys",
        default="",
        metavar="DIR",
        help="A copy of the server's directory of keys (`python -m sglang_ares.keys`); needed off "
        "loopback.",
    )
    group.add_argument(
        "--ares-predictor",
        default="auto",
        metavar="DIR",
        help="Folder on this host with the head that predicts remaining output lengths, the same "
        "as the server's. auto: the one that comes with the demo model, for other models none. "
        "off: none. Nothing is predicted if the server has off. Default: auto.",
    )


def host_config(options: argparse.Namespace) -> HostConfig:
    """Check our flags; :class:`AresArgsError` with the flag and the remedy."""
    from sglang_ares.srt.managers.worker_host import HostConfig
    from sglang_ares.srt.security.curve import CurveKeys, CurveKeysError

    controller = urlsplit(options.join)
    try:
        port = controller.port
    except ValueError:
        port = None
    if controller.scheme != "tcp" or not controller.hostname or not port or controller.path:
        raise AresArgsError(f"--join is {options.join!r}; it must be like tcp://10.0.0.5:31000.")
    there = _resolve("--join", controller.hostname)
    here = (
        _resolve("--worker-host", options.worker_host)
        if options.worker_host
        else _own_address(there, port)
    )
    if here.is_unspecified:
        raise AresArgsError("--worker-host must be an address that the other hosts can connect to.")
    _check_own(str(here), options.worker_port)
    keys = None
    if options.ares_curve_keys:
        try:
            keys = CurveKeys.load(options.ares_curve_keys)
        except CurveKeysError as error:
            raise AresArgsError(f"--ares-curve-keys: {error}.") from None
    elif not (there.is_loopback and here.is_loopback):
        raise AresArgsError(
            "a worker of another host needs keys: copy the server's directory of keys here and "
            "pass --ares-curve-keys DIR."
        )
    if not options.join_timeout > 0:
        raise AresArgsError(f"--join-timeout is {options.join_timeout}; it must be above 0.")
    return HostConfig(
        controller=options.join,
        role=options.role,
        address=str(here),
        port=options.worker_port,
        join_timeout_s=options.join_timeout,
        keys=keys,
        predictor=options.ares_predictor,
    )


def _resolve(flag: str, host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return ipaddress.ip_address(found[0][4][0])
    except (OSError, ValueError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise AresArgsError(f"{flag}: {host!r} cannot be resolved ({why}).") from None


def _own_address(
    there: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address from which the kernel would reach ``there``; nothing is sent."""
    family = socket.AF_INET if there.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(there), port))
        except OSError as error:
            raise AresArgsError(
                f"--join {there} cannot be reached ({error.strerror}); name another address, or "
                "--worker-host."
            ) from None
        return ipaddress.ip_address(probe.getsockname()[0])


def _check_own(address: str, first_port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in range(first_port, first_port + 4) if first_port else (0,):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except (OSError, OverflowError) as error:
                why = getattr(error, "strerror", None) or error
                raise AresArgsError(
                    f"--worker-host {address}, port {port}: cannot be used ({why}); name an "
                    "address of this host and four free ports (--worker-port)."
                ) from None


def launch_worker(argv: list[str]) -> None:
    """Join, and serve until interrupted or released."""
    server_args, options = parse_upstream_args(build_parser(), argv)
    from sglang.srt.plugins import load_plugins

    from sglang_ares.engine import check_head, prepare_host
    from sglang_ares.srt.managers.worker_host import WorkerHost

    load_plugins()
    config = host_config(options)
    prepare_host(server_args)
    check_head(config.predictor, server_args.model_path)
    # Upstream's workers send their parent SIGQUIT when they fail; this one outlives them.
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    if options.worker_host:
        os.environ["SGLANG_HOST_IP"] = config.address
    host = WorkerHost(server_args, config)

    def on_signal(*args: Any) -> None:
        host.leave()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        host.run()
    finally:
        host.close()


def main(argv: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    from sglang_ares.srt.managers.worker_host import JoinError

    try:
        launch_worker(sys.argv[1:] if argv is None else argv)
    except AresArgsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JoinError as error:
        print(f"error: the cluster did not take the worker in: {error}", file=sys.stderr)
        return 1
    finally:
        from sglang.srt.utils import kill_process_tree

        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    begin_imports_of_command(sys.argv[1:])
    try:
        exit_status = main()
    except SystemExit as stop:  # argparse
        exit_status = stop.code if isinstance(stop.code, int) else 1
    leave(exit_status)
