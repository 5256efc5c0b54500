"""Keys, endpoints and listening sockets of the control plane, on real sockets."""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt.managers.detokenizer_manager import DetokenizerManager

from sglang_ares import keys as keys_command
from sglang_ares.ares_args import AresArgs, AresArgsError
from sglang_ares.srt.entrypoints.front_client import FrontClient
from sglang_ares.srt.managers.detokenizer_manager import AresDetokenizerManager
from sglang_ares.srt.managers.io_struct import ControllerInbound, Decoder, LedgerDropped
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.security import sockets
from sglang_ares.srt.security.control_plane import ControlPlane, Endpoint, free_ports
from sglang_ares.srt.security.curve import CurveKeys, CurveKeysError
from sglang_ares.srt.security.dropped import DroppedFrames

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    context: Context = zmq.Context(1)
    yield context
    context.destroy(linger=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CurveKeys.generate(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture
def keys(folder: Path) -> CurveKeys:
    return CurveKeys.load(folder)


def receive(box: Mailbox, count: int, timeout_s: float = 10.0) -> list[bytes]:
    frames: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(frames) < count and time.monotonic() < deadline:
        box.socket.poll(20)
        frames += box.drain()
    return frames


def drain_until(
    box: Mailbox, condition: Callable[[], bool], timeout_s: float = 10.0
) -> list[bytes]:
    frames: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        box.socket.poll(20)
        frames += box.drain()
    assert condition()
    return frames


# --- keys -----------------------------------------------------------------------------------


def test_generated_keys_are_private_and_load(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("server", "client"):
        assert stat.S_IMODE((folder / f"{name}.key_secret").stat().st_mode) == 0o600
    keys = CurveKeys.load(folder)
    assert keys.allowed == {keys.client_public}
    secrets = {keys.server_secret, keys.client_secret}
    assert len({keys.server_public, keys.client_public} | secrets) == 4
    assert not any(s.decode() in repr(keys) for s in secrets)
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"


def test_keys_are_never_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert keys_command.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "name another" in error
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_the_command_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys_command.main([str(tmp_path / "new" / "keys")]) == 0
    told = capsys.readouterr().out
    assert f"--ares-curve-keys {tmp_path}/new/keys" in told and "copy" in told
    CurveKeys.load(tmp_path / "new" / "keys")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no server key": (_remove("server.key_secret"), "server.key_secret cannot be read"),
    "no client key": (_remove("client.key_secret"), "client.key_secret cannot be read"),
    "nobody allowed": (_remove("clients/client.key"), "would not be let in"),
    "readable by others": (
        lambda f: (f / "client.key_secret").chmod(0o640),
        "chmod 600",
    ),
    "no secret in it": (
        lambda f: (f / "server.key_secret").write_text((f / "server.key").read_text()),
        "holds no secret key",
    ),
    "not a key": (
        lambda f: (f / "clients" / "x.key").write_text('public-key = "abc"\n'),
        "3 characters instead of 40",
    ),
    "not even text": (
        lambda f: (f / "clients" / "x.key").write_bytes(b"\x00\xff"),
        "cannot be read as a key file",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_keys_are_named(tmp_path: Path, how: str) -> None:
    folder = CurveKeys.generate(tmp_path / "keys")
    change, text = BROKEN[how]
    change(folder)
    with pytest.raises(CurveKeysError, match=text):
        CurveKeys.load(folder)


def test_a_missing_directory_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(CurveKeysError, match=r"python -m sglang_ares\.keys"):
        CurveKeys.load(tmp_path / "none")


# --- who is heard ---------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_only_holders_of_an_admitted_key_are_heard(
    context: Context, keys: CurveKeys, tmp_path: Path, transport: str
) -> None:
    endpoint = (
        f"tcp://127.0.0.1:{free_ports(1)[0]}" if transport == "tcp" else f"ipc://{tmp_path}/box"
    )
    admission = keys.admit(context)
    box = Mailbox(context, endpoint, keys=keys, dropped=DroppedFrames("box"))
    outside: Context = zmq.Context(1)
    member = Mailbox(outside, f"ipc://{tmp_path}/member", keys=keys)
    member.connect("box", endpoint)
    member.send("box", b"from a member")
    assert receive(box, 1) == [b"from a member"]

    stranger_public, stranger_secret = zmq.curve_keypair()

    def push(*, public: bytes = b"", secret: bytes = b"", server: bytes = b"") -> None:
        socket = outside.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        if public:
            socket.curve_publickey, socket.curve_secretkey = public, secret
            socket.curve_serverkey = server
        socket.connect(endpoint)
        # It may have been turned away by now, and then has nobody to wait for.
        with contextlib.suppress(zmq.Again):
            socket.send(b"from a stranger", zmq.NOBLOCK)

    push()
    push(public=stranger_public, secret=stranger_secret, server=keys.server_public)
    push(public=keys.client_public, secret=keys.client_secret, server=stranger_public)
    frames = drain_until(box, lambda: box.dropped.total >= 3)
    member.send("box", b"again from a member")
    assert frames + receive(box, 1) == [b"again from a member"]
    outside.destroy(linger=0)
    box.close()
    admission.stop()


def test_without_a_handler_nobody_is_heard(
    context: Context, keys: CurveKeys, tmp_path: Path
) -> None:
    """A socket whose owner forgot to admit anyone is closed to everyone, not open."""
    box = Mailbox(context, f"ipc://{tmp_path}/box", keys=keys)
    outside: Context = zmq.Context(1)
    member = Mailbox(outside, f"ipc://{tmp_path}/member", keys=keys)
    member.connect("box", box.endpoint)
    member.send("box", b"x")
    assert drain_until(box, lambda: box.dropped.total >= 1) == []
    member.close()
    outside.destroy(linger=0)
    box.close()


async def test_the_front_speaks_with_its_keys(
    context: Context, keys: CurveKeys, tmp_path: Path
) -> None:
    from sglang_ares.srt.entrypoints.front_client import ControllerTimeoutError

    admission = keys.admit(context)
    endpoint = f"ipc://{tmp_path}/front"
    dropped = DroppedFrames("front")
    router = sockets.BoundSocket(context, zmq.ROUTER, endpoint, keys=keys, dropped=dropped)
    for client, heard in (
        (FrontClient(endpoint, 0.5, keys=keys), 1),
        (FrontClient(endpoint, 0.5), 0),
    ):
        with pytest.raises(ControllerTimeoutError):
            await client.status()
        assert len(router.receive(parts=2, limit=9)) == heard
        client.close()
    assert dropped.total > 0
    router.close()
    admission.stop()


def test_the_controller_hears_of_strangers_that_the_ledger_has_refused(
    context: Context, keys: CurveKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else says anything there meanwhile."""

    class ToldEnoughError(Exception):
        """Ends a loop that would go on for ever."""

    def ipc(name: str) -> Endpoint:
        return Endpoint(f"ipc://{tmp_path}/{name}", f"ipc://{tmp_path}/{name}")

    outputs = ipc("outputs")
    plane = ControlPlane(str(tmp_path), ipc("front"), ipc("controller"), (), keys, outputs=outputs)
    admission = keys.admit(context)
    controller = Mailbox(context, plane.controller.bind, keys=keys)
    told: list[int] = []
    deadline = time.monotonic() + 30

    def hear() -> None:
        for frame in controller.drain():
            message = Decoder(ControllerInbound).decode(frame)
            assert isinstance(message, LedgerDropped)
            told.append(message.dropped_frames)
        if (told and told[-1] >= 3) or time.monotonic() > deadline:
            raise ToldEnoughError

    monkeypatch.setattr(DetokenizerManager, "init_running_status", lambda *_: None)
    monkeypatch.setattr(AresDetokenizerManager, "control", plane, raising=False)
    ledger: Any = object.__new__(AresDetokenizerManager)
    ledger.init_running_status(None)
    ledger.recv_from_scheduler = context.socket(zmq.PULL)
    ledger.soft_watchdog = SimpleNamespace(disable=contextlib.nullcontext, feed=hear)
    for _ in range(3):
        stranger = context.socket(zmq.PUSH)
        stranger.connect(outputs.connect)
    with pytest.raises(ToldEnoughError):
        ledger.event_loop()
    assert told[-1] >= 3 and told == sorted(set(told)), "told once"
    ledger._outputs.close()
    ledger._mailbox.close()
    ledger._admission.stop()
    controller.close()
    admission.stop()


# --- what is let in -------------------------------------------------------------------------


@pytest.fixture
def box(context: Context, tmp_path: Path) -> Iterator[Mailbox]:
    box = Mailbox(context, f"ipc://{tmp_path}/box")
    yield box
    box.close()


@pytest.fixture
def sender(context: Context, box: Mailbox) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(box.endpoint)
    return socket


def test_messages_of_several_parts_are_dropped_and_counted(
    box: Mailbox, sender: zmq.Socket[bytes]
) -> None:
    sender.send_multipart([b"a", b"b"])
    sender.send_multipart([b"", b"", b""])
    sender.send(b"whole")
    assert receive(box, 1) == [b"whole"]
    assert box.dropped.total == 2


def test_too_large_a_frame_is_never_read(box: Mailbox, sender: zmq.Socket[bytes]) -> None:
    sender.send(b"x" * (sockets.MAX_MESSAGE_BYTES + 1))
    sender.send(b"after")  # over a new connection
    assert receive(box, 1) == [b"after"]


def test_one_drain_takes_a_bounded_number_of_bytes(
    box: Mailbox, sender: zmq.Socket[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_MESSAGE_BYTES", 1000)
    for _ in range(10):
        sender.send(b"x" * 400)
    time.sleep(0.2)
    assert [len(f) for f in box.drain()] == [400, 400, 400]
    assert len(receive(box, 7)) == 7


def test_bytes_that_are_not_zmq_disturb_nobody(box: Mailbox, sender: zmq.Socket[bytes]) -> None:
    import socket

    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(box.endpoint.removeprefix("ipc://"))
            raw.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 4)
    sender.send(b"after")
    assert b"after" in receive(box, 1)


def test_a_flood_is_counted_but_not_all_logged(caplog: pytest.LogCaptureFixture) -> None:
    dropped = DroppedFrames("here")
    for i in range(1000):
        dropped.count(f"bad\n{i} " + "x" * 5000)
    assert dropped.total == 1000
    assert len(caplog.records) == 5
    assert all("\n" not in r.getMessage() and len(r.getMessage()) < 500 for r in caplog.records)
    dropped._interval_ends = 0.0
    dropped.count("later")
    assert "995 more that were not logged" in caplog.records[-1].getMessage()


# --- endpoints ------------------------------------------------------------------------------


def test_on_loopback_the_sockets_are_files_of_their_owner() -> None:
    for host in ("127.0.0.1", "localhost"):
        plane = ControlPlane.create(AresArgs(control_host=host, decode_workers=3))
        runtime_dir = Path(plane.runtime_dir)
        assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
        endpoints = (plane.front, plane.controller, *plane.workers)
        assert len({e.bind for e in endpoints}) == 6
        assert all(e.bind == e.connect and str(runtime_dir) in e.bind for e in endpoints)
        assert plane.keys is None and plane.ports == ()
        runtime_dir.rmdir()


def test_upstreams_sockets_are_in_the_runtime_directory_too(tmp_path: Path) -> None:
    import tempfile

    from sglang.srt.server_args import ServerArgs

    from sglang_ares.srt.security.control_plane import private_port_args

    before = tempfile.tempdir
    ports = private_port_args(ServerArgs(model_path="m"), str(tmp_path))
    assert tempfile.tempdir == before
    names = [v for n in dir(ports) if n.endswith("_ipc_name") and (v := getattr(ports, n))]
    assert len(names) >= 5
    assert all(name.startswith(f"ipc://{tmp_path}/") for name in names)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_off_loopback_keys_are_mandatory(host: str) -> None:
    with pytest.raises(AresArgsError) as caught:
        ControlPlane.create(AresArgs(control_host=host))
    text = str(caught.value)
    assert f"--ares-control-host {host}" in text
    assert "--ares-curve-keys" in text and "sglang_ares.keys" in text and "\n" not in text


def test_broken_keys_name_the_flag(tmp_path: Path) -> None:
    with pytest.raises(AresArgsError, match=r"--ares-curve-keys: .*is not a directory; make keys"):
        ControlPlane.create(AresArgs(curve_keys=str(tmp_path / "none")))


def test_with_keys_every_address_is_possible(folder: Path) -> None:
    plane = ControlPlane.create(AresArgs(control_host="0.0.0.0", curve_keys=str(folder)))
    assert plane.keys is not None and len(plane.ports) == 6
    for endpoint, port in zip(
        (plane.front, plane.controller, *plane.workers, plane.outputs), plane.ports, strict=True
    ):
        assert endpoint is not None and endpoint.bind == f"tcp://0.0.0.0:{port}"
        assert "0.0.0.0" not in endpoint.connect and endpoint.connect.endswith(f":{port}")
    Path(plane.runtime_dir).rmdir()


def test_a_given_port_makes_them_tcp_on_loopback_too() -> None:
    first = free_ports(1)[0]
    plane = ControlPlane.create(AresArgs(control_port=first, decode_workers=1))
    assert plane.ports == tuple(range(first, first + 5))
    assert plane.front.connect == f"tcp://127.0.0.1:{first}"
    Path(plane.runtime_dir).rmdir()


@pytest.mark.parametrize(
    "host, port, part",
    [("no.such.host.invalid", 0, "cannot be resolved"), ("127.0.0.1", 70_000, "choose another")],
)
def test_an_address_that_cannot_be_used(host: str, port: int, part: str) -> None:
    with pytest.raises(AresArgsError, match=part) as caught:
        ControlPlane.create(AresArgs(control_host=host, control_port=port))
    assert "--ares-control-" in str(caught.value)


def test_an_address_of_another_host(folder: Path) -> None:
    with pytest.raises(AresArgsError, match="an address of this host"):
        ControlPlane.create(AresArgs(control_host="192.0.2.1", curve_keys=str(folder)))
