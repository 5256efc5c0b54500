"""Collected data on disk: memory-mapped shards of hidden states, and what became of each request.

A folder holds ``dataset.json``, and for each shard ``NNNNN.states.npy`` (float16, one row per
label), ``NNNNN.rows.npy`` (:data:`ROW`) and ``NNNNN.requests.jsonl``. A shard is complete once the
last of these is there. The split of a request follows from its number and the seed alone, so that
it is the same however the data was collected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import msgspec
import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.predictor.identity import ModelIdentity

SPLITS: Final = ("train", "validation", "test")
_TRAIN, _VALIDATION = 0.70, 0.85
# One label: ``request`` is the request's number, ``generated`` output tokens lay before the state,
# ``remaining`` came after them.
ROW: Final = np.dtype([("request", "<i4"), ("generated", "<i4"), ("remaining", "<i4")])


class DatasetError(ValueError):
    """A folder that is no data set, or not the expected one; names it."""


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How the data came about; the same when collecting goes on."""

    model: ModelIdentity
    prompts: str
    seed: int
    max_new_tokens: int
    temperature: float


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request. ``length``: output tokens; ``censored``: they were cut off, not ended."""

    request: int
    prompt: str
    prompt_ids: list[int]
    length: int
    censored: bool


def split_of(request: int, seed: int) -> str:
    """70 % of the requests train, 15 % validate, 15 % test."""
    digest = blake2b(f"{seed}/{request}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return SPLITS[0] if share < _TRAIN else SPLITS[1] if share < _VALIDATION else SPLITS[2]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labelled states of whole requests; rows of a request stand together, in order.

    ``states``: float16 or float32 ``(N, d)``. ``rows``: ``(N,)`` of :data:`ROW`. ``requests``: by
    their numbers.
    """

    states: NDArray[Any]
    rows: NDArray[np.void]
    requests: dict[int, RequestRecord]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def generated(self) -> NDArray[np.int64]:
        """``(N,)`` output tokens before each state."""
        return self.rows["generated"].astype(np.int64)

    @property
    def remaining(self) -> NDArray[np.int64]:
        """``(N,)`` output tokens after each state."""
        return self.rows["remaining"].astype(np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(N,)`` the request's output tokens."""
        return self.generated + self.remaining

    @property
    def censored(self) -> NDArray[np.bool_]:
        """``(N,)`` whether the request was cut off."""
        cut = {r for r, record in self.requests.items() if record.censored}
        return np.isin(self.rows["request"], list(cut))

    def by_request(self) -> list[tuple[int, slice]]:
        """Each request's number and where its rows are."""
        if not len(self):
            return []
        starts = np.flatnonzero(np.diff(self.rows["request"], prepend=-1))
        ends = [*starts[1:].tolist(), len(self)]
        numbers = self.rows["request"][starts].tolist()
        return [(n, slice(a, b)) for n, a, b in zip(numbers, starts.tolist(), ends, strict=True)]


class DatasetWriter:
    """Adds shards to ``folder``; an interrupted one leaves no trace."""

    def __init__(self, folder: Path, info: DatasetInfo) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "dataset.json"
        if path.exists() and load_info(folder) != info:
            raise DatasetError(
                f"{folder} holds data that was collected otherwise (see dataset.json): name "
                "another folder, or the same model, prompts, seed and limits."
            )
        path.write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")
        self.done = {r.request for r in _records(folder)}
        self._next = len(list(folder.glob("*.requests.jsonl")))

    def add(self, states: NDArray[Any], rows: Sequence[Any], records: list[RequestRecord]) -> None:
        """Write one shard."""
        stem = self._folder / f"{self._next:05d}"
        np.save(f"{stem}.states.npy", states.astype(np.float16))
        np.save(f"{stem}.rows.npy", np.array(rows, ROW))
        lines = b"".join(msgspec.json.encode(r) + b"\n" for r in records)
        unfinished = stem.with_suffix(".partial")
        unfinished.write_bytes(lines)
        unfinished.rename(f"{stem}.requests.jsonl")
        self.done |= {r.request for r in records}
        self._next += 1


def load_info(folder: Path) -> DatasetInfo:
    """How a folder's data was collected; raises :class:`DatasetError`."""
    try:
        return msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetInfo)
    except (OSError, msgspec.MsgspecError) as error:
        raise DatasetError(
            f"{folder} is no data set ({error}): make one with `python -m "
            "sglang_ares.predictor collect`."
        ) from None


def _records(folder: Path) -> Iterable[RequestRecord]:
    decoder = msgspec.json.Decoder(RequestRecord)
    for path in sorted(folder.glob("*.requests.jsonl")):
        yield from decoder.decode_lines(path.read_bytes())


def load_split(folder: Path, split: str) -> Labels:
    """The labels of one split; their states are read from the memory-mapped shards."""
    info = load_info(folder)
    states, rows, requests = [], [], {}
    for path in sorted(folder.glob("*.requests.jsonl")):
        stem = str(path).removesuffix(".requests.jsonl")
        shard_rows = np.load(f"{stem}.rows.npy")
        numbers = np.unique(shard_rows["request"])
        wanted = [n for n in numbers.tolist() if split_of(n, info.seed) == split]
        keep = np.isin(shard_rows["request"], wanted)
        states.append(np.load(f"{stem}.states.npy", mmap_mode="r")[keep])
        rows.append(shard_rows[keep])
        for record in msgspec.json.Decoder(RequestRecord).decode_lines(path.read_bytes()):
            if record.request in wanted:
                requests[record.request] = record
    if not rows:
        raise DatasetError(f"{folder} has no complete shard yet.")
    return Labels(np.concatenate(states), np.concatenate(rows), requests)


def save_labels(path: Path, labels: Labels) -> None:
    """A small set of labels as one compressed file, to ship it."""
    records = json.dumps([msgspec.to_builtins(r) for r in labels.requests.values()])
    np.savez_compressed(
        path,
        states=labels.states.astype(np.float16),
        rows=labels.rows,
        requests=np.frombuffer(records.encode(), np.uint8),
    )


def load_labels(path: Path) -> Labels:
    """What :func:`save_labels` wrote; raises :class:`DatasetError`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            records = msgspec.json.decode(file["requests"].tobytes(), type=list[RequestRecord])
            return Labels(file["states"], file["rows"], {r.request: r for r in records})
    except (OSError, KeyError, ValueError, BadZipFile, msgspec.MsgspecError) as error:
        raise DatasetError(
            f"{path} holds no test split ({error}): name a data set with --data, or train with "
            "--ship-labels."
        ) from None
