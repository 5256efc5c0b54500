"""Files of hidden states, written by workers that run with ``--ares-predictor-record DIR``.

A worker appends one row per request at the prompt's end and at every ``INTERVAL``-th output token,
to a file that is new at every start. A file is a header (``_HEADER``) and rows of
:func:`row_dtype`; ``collect`` joins the rows of a request, which a prefill and one or several
decode workers wrote.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.policy.types import LEVELS

logger = logging.getLogger(__name__)

# Output tokens between two labels (the paper's), two rows of a recording, two smoothing steps.
INTERVAL: Final = 20

_MAGIC: Final = b"ARESROWS"
_HEADER: Final = struct.Struct("<8sII")
_VERSION: Final = 1


class RecordingError(ValueError):
    """A file that is no recording; names it."""


def row_dtype(hidden_size: int) -> np.dtype[np.void]:
    """``key``: :func:`request_key`. ``generated``: output tokens before the state. ``predicted``,
    ``estimate``: tokens predicted from this state alone, and smoothed (NaN without a head)."""
    return np.dtype(
        [
            ("key", "V16"),
            ("generated", "<i4"),
            ("predicted", "<f4", (len(LEVELS),)),
            ("estimate", "<f4", (len(LEVELS),)),
            ("state", "<f4", (hidden_size,)),
        ]
    )


def request_key(rid: str) -> bytes:
    """16 bytes that stand for the rid a client gave."""
    return blake2b(rid.encode(), digest_size=16).digest()


class StateRecorder:
    """Appends rows to ``path``, a file that is not there yet. Where that fails nothing more is
    recorded; requests are served all the same."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        self._failed = False
        self._dtype: np.dtype[np.void] = row_dtype(0)

    @classmethod
    def in_folder(cls, folder: Path, worker_id: int, incarnation: int) -> StateRecorder:
        """For one start of a worker; what earlier servers recorded in ``folder`` stays."""
        return cls(folder / f"worker-{worker_id}-{incarnation}-{time.time_ns()}.rows")

    def write(
        self,
        rids: list[str],
        generated: list[int],
        states: NDArray[Any],
        predicted: NDArray[Any],
        estimates: NDArray[Any],
    ) -> None:
        """One row per request; shapes ``(N, d)``, ``(N, len(LEVELS))`` twice."""
        if self._failed:
            return
        if self._file is None:
            self._dtype = row_dtype(states.shape[1])
        rows = np.zeros(len(rids), self._dtype)
        rows["key"] = [np.void(request_key(rid)) for rid in rids]
        rows["generated"] = generated
        rows["predicted"] = predicted
        rows["estimate"] = estimates
        rows["state"] = states
        try:
            self._append(rows.tobytes(), states.shape[1])
        except OSError as error:
            self._failed = True
            logger.warning("hidden states are recorded no longer: %s: %s", self._path, error)
            if self._file is not None:
                self._file.close()

    def _append(self, rows: bytes, hidden_size: int) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("xb", buffering=0)
            rows = _HEADER.pack(_MAGIC, _VERSION, hidden_size) + rows
        # A disk that fills up takes a part first; a row behind that could not be read.
        if self._file.write(rows) < len(rows):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class RecordingReader:
    """Reads what was appended to the recordings of a folder since it last looked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def new_rows(self) -> Iterator[NDArray[np.void]]:
        """Whole rows only; the rest comes next time. Raises :class:`RecordingError`."""
        for path in sorted(self._folder.glob("*.rows")):
            with path.open("rb") as file:
                head = file.read(_HEADER.size)
                if len(head) < _HEADER.size:
                    continue
                magic, version, hidden_size = _HEADER.unpack(head)
                if magic != _MAGIC or version != _VERSION:
                    raise RecordingError(f"{path} is no recording of version {_VERSION}")
                dtype = row_dtype(hidden_size)
                start = self._read.get(path, _HEADER.size)
                file.seek(start)
                data = file.read()
            whole = len(data) // dtype.itemsize * dtype.itemsize
            self._read[path] = start + whole
            if whole:
                yield np.frombuffer(data[:whole], dtype)
