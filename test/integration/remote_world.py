"""A cluster over tcp with CURVE keys, and worker hosts that join it: from network namespaces of
their own where those can be made, else from other loopback addresses."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from integration.servers import Server, start_server, stop_server

START_TIMEOUT_S = 240


@dataclass(frozen=True)
class Network:
    """Where the hosts are. ``addresses``: the server's, then one per host; ``prefix``: what puts
    a command on each; ``links``: the server's end of the cable to each."""

    addresses: list[str]
    prefix: list[list[str]]
    links: list[str] = field(default_factory=list)

    @property
    def separate(self) -> bool:
        """Whether the hosts have network stacks of their own."""
        return any(self.prefix)

    def plug(self, place: int, state: str) -> None:
        """Pull the cable of a host (``down``), or put it back (``up``)."""
        subprocess.run(["ip", "link", "set", self.links[place], state], check=True)


@contextlib.contextmanager
def network(hosts: int) -> Iterator[Network]:
    """Namespaces ``ares-…-1`` … behind one bridge, or loopback addresses."""
    name = f"ar{os.getpid() % 100_000}"
    made: list[list[str]] = []
    ip = shutil.which("ip")

    def run(*args: str) -> None:
        subprocess.run([str(ip), *args], check=True, capture_output=True)

    try:
        if ip is None:
            raise OSError("no ip command")
        subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        run("link", "add", f"{name}b", "type", "bridge")
        made.append(["link", "del", f"{name}b"])
        run("link", "set", f"{name}b", "up")
        # UCX does not use bridges themselves.
        run("link", "add", f"{name}v0", "type", "veth", "peer", "name", f"{name}p0")
        made.append(["link", "del", f"{name}v0"])
        run("link", "set", f"{name}p0", "master", f"{name}b", "up")
        run("addr", "add", f"{subnet}.1/24", "dev", f"{name}v0")
        run("link", "set", f"{name}v0", "up")
        for i in range(1, hosts + 1):
            space = f"{name}n{i}"
            run("netns", "add", space)
            made.append(["netns", "del", space])
            run(
                "link", "add", f"{name}v{i}", "type", "veth", "peer", "name", "eth0", "netns", space
            )
            run("link", "set", f"{name}v{i}", "master", f"{name}b", "up")
            run("-n", space, "addr", "add", f"{subnet}.{i + 1}/24", "dev", "eth0")
            run("-n", space, "link", "set", "eth0", "up")
            run("-n", space, "link", "set", "lo", "up")
        found = Network(
            [f"{subnet}.{i + 1}" for i in range(hosts + 1)],
            [[], *([str(ip), "netns", "exec", f"{name}n{i}"] for i in range(1, hosts + 1))],
            ["", *(f"{name}v{i}" for i in range(1, hosts + 1))],
        )
    except (OSError, subprocess.CalledProcessError):
        found = Network([f"127.0.0.{i + 1}" for i in range(hosts + 1)], [[]] * (hosts + 1))
    try:
        yield found
    finally:
        for command in reversed(made):
            subprocess.run([str(ip), *command], check=False, capture_output=True)


@dataclass
class JoinedHost:
    """One ``launch_worker``. ``place``: which host of the network it is on."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def tree(self) -> list[int]:
        """Its process ids, the host's own first."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                pids += map(int, children)
        return pids

    def stop(self) -> None:
        """End it by force, stopped or not."""
        for pid in self.tree():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


@dataclass
class RemoteWorld:
    """The cluster, and the hosts that were started."""

    server: Server
    port: int
    keys: Path
    net: Network
    logs: Path
    hosts: list[JoinedHost] = field(default_factory=list)

    def join(self, place: int, role: str, *flags: str, keys: Path | None = None) -> JoinedHost:
        """Start a host; see :meth:`worker_of`."""
        address = self.net.addresses[place]
        log = self.logs / f"host-{len(self.hosts)}.log"
        command = [
            *self.net.prefix[place], sys.executable, "-m", "sglang_ares.launch_worker",
            "--join", f"tcp://{self.net.addresses[0]}:{self.port}", "--role", role,
            "--worker-host", address, "--ares-curve-keys", str(keys or self.keys),
            "--log-level", "info", *flags,
        ]  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                process_group=0,
                # Within one kernel UCX would go through shared memory.
                env={**os.environ, "UCX_TLS": "tcp,self"},
            )
        host = JoinedHost(process, address, log)
        self.hosts.append(host)
        return host

    def workers(self, **wanted: Any) -> list[dict[str, Any]]:
        """Entries of the status with these values."""
        workers = self.server.status()["workers"]
        return [w for w in workers if all(w.get(k) == v for k, v in wanted.items())]

    def worker_of(self, host: JoinedHost, state: str = "ready", **wanted: Any) -> dict[str, Any]:
        """The host's worker once it is in ``state``."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            found = self.workers(host=host.address, state=state, **wanted)
            if found:
                return found[0]
            left = host.process.poll()
            assert left is None or state != "ready", f"exit {left}:\n{host.log.read_text()[-3000:]}"
            time.sleep(0.1)
        raise AssertionError(f"not {state}: {self.workers()}\n{host.log.read_text()[-3000:]}")


@contextlib.contextmanager
def remote_world(logs: Path, keys: Path, port: int, *flags: str) -> Iterator[RemoteWorld]:
    """A server with one prefill and one decode worker of its own, and two hosts beside it."""
    with network(2) as net:
        os.environ["UCX_TLS"] = "tcp,self"
        process, server = start_server(
            logs / "server.log",
            f"--ares-curve-keys={keys}",
            f"--ares-control-host={net.addresses[0]}",
            f"--ares-control-port={port}",
            "--ares-decode-workers=1",
            "--ares-rescheduling=none",
            "--ares-report-interval=0.1",
            "--ares-worker-timeout=5",
            "--ares-max-restarts=20",
            "--log-level=info",
            *flags,
        )
        world = RemoteWorld(server, port, keys, net, logs)
        try:
            yield world
        finally:
            del os.environ["UCX_TLS"]
            for host in world.hosts:
                if host.process.poll() is None:
                    host.stop()
            stop_server(process)
