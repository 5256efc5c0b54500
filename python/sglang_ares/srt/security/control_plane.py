"""Where the control sockets of a cluster are, and with which keys: decided once, by the front.

On loopback they are ipc sockets in the cluster's runtime directory, which only its owner may
enter. ``--ares-control-host`` with any other address, or ``--ares-control-port``, makes them tcp
sockets, so that workers of other hosts can join; off loopback keys are mandatory.
"""

from __future__ import annotations

import ipaddress
import random
import socket
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_ares.ares_args import AresArgsError
from sglang_ares.srt.security.curve import CurveKeys, CurveKeysError

if TYPE_CHECKING:
    from sglang.srt.server_args import PortArgs, ServerArgs

    from sglang_ares.ares_args import AresArgs

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Endpoint:
    """``bind``: where a socket listens. ``connect``: how others reach it (ZMQ notation)."""

    bind: str
    connect: str


@dataclass(frozen=True)
class ControlPlane:
    """``front``: the controller's ROUTER, for queries (and for workers that want to join).
    ``controller``: its mailbox, for reports. ``ledger``: the token ledger's, always local.
    ``workers``: mailboxes by worker id. ``ports``: the TCP ports among them. ``outputs``: where
    the tokens of workers on other hosts arrive (None: the sockets are files, nobody can join).
    ``host``: the address of this host for KV transfers."""

    runtime_dir: str
    front: Endpoint
    controller: Endpoint
    workers: tuple[Endpoint, ...]
    keys: CurveKeys | None
    ports: tuple[int, ...] = ()
    outputs: Endpoint | None = None
    host: str = _LOOPBACK

    @property
    def ledger(self) -> Endpoint:
        """The token ledger's mailbox; it shares the front's host."""
        name = f"ipc://{self.runtime_dir}/ledger"
        return Endpoint(name, name)

    def worker(self, worker_id: int, incarnation: int) -> Endpoint:
        """A worker's mailbox. Where sockets are files, one that is started anew has a new one."""
        endpoint = self.workers[worker_id]
        if not incarnation or not endpoint.bind.startswith("ipc://"):
            return endpoint
        name = f"{endpoint.bind}.{incarnation}"
        return Endpoint(name, name)

    @classmethod
    def create(cls, ares_args: AresArgs) -> ControlPlane:
        """Load the keys, choose the endpoints and make the runtime directory (mode 0700).

        Raises :class:`AresArgsError` with the flag and the remedy.
        """
        address = _resolve(ares_args.control_host)
        if not address.is_loopback and not ares_args.curve_keys:
            raise AresArgsError(
                f"--ares-control-host {ares_args.control_host} leaves loopback and needs keys: "
                "make them with `python -m sglang_ares.keys DIR` and pass --ares-curve-keys DIR."
            )
        keys = None
        if ares_args.curve_keys:
            try:
                keys = CurveKeys.load(ares_args.curve_keys)
            except CurveKeysError as error:
                raise AresArgsError(f"--ares-curve-keys: {error}.") from None
        workers = ares_args.total_workers
        if address.is_loopback and not ares_args.control_port:
            folder = tempfile.mkdtemp(prefix="sglang-ares-")
            names = ["front", "controller", *(f"worker-{i}" for i in range(workers))]
            endpoints = [Endpoint(e, e) for e in (f"ipc://{folder}/{name}" for name in names)]
            return cls(folder, endpoints[0], endpoints[1], tuple(endpoints[2:]), keys)
        ports = _tcp_ports(ares_args, address, 3 + workers)
        reached = str(address)
        if address.is_unspecified:
            from sglang.srt.utils.network import get_local_ip_auto

            reached = get_local_ip_auto(fallback=_LOOPBACK)
        front, controller, *own, outputs = [
            Endpoint(tcp_endpoint(str(address), p), tcp_endpoint(reached, p)) for p in ports
        ]
        folder = tempfile.mkdtemp(prefix="sglang-ares-")
        return cls(folder, front, controller, tuple(own), keys, tuple(ports), outputs, host=reached)


def private_port_args(server_args: ServerArgs, runtime_dir: str) -> PortArgs:
    """Upstream's sockets, as it would choose them, but in a directory that only its owner may
    enter: upstream unpickles what it receives there."""
    from sglang.srt.server_args import PortArgs

    usual, tempfile.tempdir = tempfile.tempdir, runtime_dir
    try:
        return PortArgs.init_new(server_args)
    finally:
        tempfile.tempdir = usual


def free_ports(count: int, taken: Collection[int] = ()) -> list[int]:
    """Distinct TCP ports nobody listens on, below the range that outgoing connections draw from:
    a worker binds its port only once it has loaded."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if port not in taken and probe.connect_ex((_LOOPBACK, port)) != 0:
                ports.add(port)
    return sorted(ports)


def _tcp_ports(
    ares_args: AresArgs, address: ipaddress.IPv4Address | ipaddress.IPv6Address, count: int
) -> list[int]:
    first = ares_args.control_port
    ports = list(range(first, first + count)) if first else free_ports(count)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    for port in ports:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((str(address), port))
            except (OSError, OverflowError) as error:
                why = getattr(error, "strerror", None) or error
                raise AresArgsError(
                    f"port {port} on --ares-control-host {ares_args.control_host} cannot be used "
                    f"({why}); choose another --ares-control-port (it and the next {count - 1} are "
                    "taken) or an address of this host."
                ) from None
    return ports


def _resolve(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return ipaddress.ip_address(found[0][4][0])
    except (OSError, ValueError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise AresArgsError(
            f"--ares-control-host {host!r} cannot be resolved ({why}); name an address of "
            "this host."
        ) from None


def tcp_endpoint(host: str, port: int) -> str:
    """ZMQ's notation."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
