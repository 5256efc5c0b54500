"""The keys of the control sockets: ZMQ CURVE, one server key pair and one client key pair.

A key directory holds

* ``server.key`` and ``server.key_secret``: every process that listens proves with it who it is;
* ``client.key`` and ``client.key_secret``: every process that connects;
* ``clients/*.key``: public keys of the clients that are let in.

The files are pyzmq's certificates. Whoever holds the directory is a member of the cluster.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

SERVER: Final = "server"
CLIENT: Final = "client"
CLIENTS: Final = "clients"
_ZAP_DOMAIN: Final = "sglang-ares"


class CurveKeysError(ValueError):
    """Keys that are missing, unreadable or readable by others; the text names the remedy."""


@dataclass(frozen=True)
class CurveKeys:
    """Keys of one cluster, as 40 ASCII characters (Z85) each. ``allowed``: public keys of the
    clients that may connect."""

    server_public: bytes
    server_secret: bytes = field(repr=False)
    client_public: bytes
    client_secret: bytes = field(repr=False)
    allowed: frozenset[bytes]

    @classmethod
    def load(cls, directory: str | Path) -> CurveKeys:
        """Read a key directory; :class:`CurveKeysError` if it is not complete and private."""
        folder = Path(directory).expanduser()
        if not folder.is_dir():
            raise CurveKeysError(
                f"{folder} is not a directory; make keys with `python -m sglang_ares.keys {folder}`"
            )
        server_public, server_secret = _load_pair(folder, SERVER)
        client_public, client_secret = _load_pair(folder, CLIENT)
        allowed = frozenset(
            _load(path)[0] for path in sorted((folder / CLIENTS).glob("*.key")) if path.is_file()
        )
        if client_public not in allowed:
            raise CurveKeysError(
                f"{folder}/{CLIENTS} does not hold {CLIENT}.key: the cluster's own processes would "
                f"not be let in; copy {folder}/{CLIENT}.key there"
            )
        return cls(server_public, server_secret, client_public, client_secret, allowed)

    @staticmethod
    def generate(directory: str | Path) -> Path:
        """Make a key directory; :class:`CurveKeysError` if it holds keys already. The directory
        is for its owner only, and nothing appears in it before it is complete."""
        folder = Path(directory).expanduser()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CurveKeysError(f"{folder} exists and is not empty; name another directory")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made aside: private from the first byte on, and complete or not there at all.
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name in (SERVER, CLIENT):
                _, secret = zmq.auth.create_certificates(made, name)
                os.chmod(secret, 0o600)  # noqa: PTH101 (pyzmq returns a string)
            (made / CLIENTS).mkdir()
            shutil.copyfile(made / f"{CLIENT}.key", made / CLIENTS / f"{CLIENT}.key")
            made.rename(folder)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            raise CurveKeysError(f"{folder} cannot be made: {error.strerror}") from None
        return folder

    def apply_server(self, socket: zmq.Socket[Any]) -> None:
        """Before ``bind``: only clients in ``allowed`` are let in (see :meth:`admit`)."""
        socket.curve_publickey = self.server_public
        socket.curve_secretkey = self.server_secret
        socket.curve_server = True
        socket.zap_domain = _ZAP_DOMAIN.encode()
        # Without a handler nobody is let in, instead of everybody.
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def apply_client(self, socket: zmq.Socket[Any]) -> None:
        """Before ``connect``: talk to a holder of the server's key only."""
        socket.curve_publickey = self.client_public
        socket.curve_secretkey = self.client_secret
        socket.curve_serverkey = self.server_public

    def admit(self, context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
        """Start the handler that decides over every connection to a server socket of
        ``context``; it serves until its ``stop``, or until the process ends."""
        authenticator = ThreadAuthenticator(context)
        admission = _Admission(self.allowed)
        authenticator.configure_curve_callback(_ZAP_DOMAIN, credentials_provider=admission)
        authenticator.start()
        return authenticator


class _Admission:
    """pyzmq's form of an allow list."""

    def __init__(self, allowed: frozenset[bytes]) -> None:
        self._allowed = allowed

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the client with the public ``key`` may connect."""
        return key in self._allowed


def _load_pair(folder: Path, name: str) -> tuple[bytes, bytes]:
    path = folder / f"{name}.key_secret"
    public, secret = _load(path)
    if secret is None:
        raise CurveKeysError(f"{path} holds no secret key; make new keys in another directory")
    if path.stat().st_mode & 0o077:
        raise CurveKeysError(f"{path} can be read by others than its owner; run `chmod 600 {path}`")
    return public, secret


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise CurveKeysError(f"{path} cannot be read as a key file ({error})") from None
    for key in (public, secret):
        if key is not None and len(key) != 40:
            raise CurveKeysError(f"{path} holds a key of {len(key)} characters instead of 40")
    return public, secret
