"""Every message of ARES, as tagged msgspec structs; nothing here is ever pickled.

Directions: controller → worker (``ConnectPeers``, ``StartMigration``), worker → controller
(``WorkerReport``, ``MigrationResult``, ``Landed``), worker → worker (``Offer`` … ``ForwardAbort``,
in the order of the protocol), front ↔ controller (``…Query``/``…Reply``). On the wire a message
is one msgpack array whose first element is its class name. :class:`Decoder` checks every type and
bound; what a field means is checked where it is used (``disaggregation/checks.py``, the managers).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from sglang_ares.srt.disaggregation.request_state import RequestSpec, RequestState
from sglang_ares.srt.policy.types import WorkerLoad
from sglang_ares.srt.security.bounds import (
    MAX_LISTED,
    Address,
    ClockDifference,
    Count,
    HostName,
    HttpStatus,
    Outcome,
    Port,
    Reason,
    Rid,
    Role,
    Room,
    Seconds,
    SequenceId,
    WorkerId,
)
from sglang_ares.srt.security.sockets import MAX_MESSAGE_BYTES


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of all messages."""


# --- controller -> worker -------------------------------------------------------------------


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach one worker: its control endpoint (ZMQ) and its KV bootstrap server."""

    worker_id: WorkerId
    role: Role
    control_endpoint: Address
    bootstrap_host: HostName
    bootstrap_port: Port


class ConnectPeers(Message, frozen=True, kw_only=True):
    """All workers of the cluster; sent once every worker is up."""

    peers: Annotated[list[Peer], msgspec.Meta(max_length=4096)]


class StartMigration(Message, frozen=True, kw_only=True):
    """Move ``rid`` to worker ``target``."""

    migration_id: SequenceId
    rid: Rid
    target: WorkerId


# --- worker -> controller -------------------------------------------------------------------


class PoolCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What the integrity check compares: free slots, and KV tokens by owner."""

    kv_free: Count
    kv_cached: Count
    request_slots_free: Count
    metadata_slots_free: Count
    requests: Count
    idle: bool


class WorkerReport(Message, frozen=True, kw_only=True):
    """A worker's load, and the requests that left it since its last report.

    ``decode_step_ms``: mean duration of the decode steps since the last report (0: none).
    ``dropped_frames``: control messages this worker has not let in since its start.
    """

    worker_id: WorkerId
    load: WorkerLoad
    finished: Annotated[list[Rid], msgspec.Meta(max_length=MAX_LISTED)]
    pools: PoolCounters
    migrations_in: Count
    migrations_out: Count
    retracted: Count
    decode_step_ms: Seconds
    dropped_frames: Count = 0


class MigrationResult(Message, frozen=True, kw_only=True):
    """How a migration ended, told by its source.

    ``outcome``: completed, refused, failed or cancelled; ``reason`` says why unless completed.
    ``duration_s``: from the command to the end. ``kv_bytes``: bytes of KV sent.
    """

    migration_id: SequenceId
    rid: Rid
    source: WorkerId
    target: WorkerId
    outcome: Outcome
    reason: Reason
    tokens: Count
    kv_bytes: Count
    duration_s: Seconds


class Landed(Message, frozen=True, kw_only=True):
    """The target emitted its first token of a moved request ``blackout_s`` after the last one
    of the source (wall clocks of both hosts)."""

    migration_id: SequenceId
    rid: Rid
    worker_id: WorkerId
    blackout_s: ClockDifference


# --- worker -> worker -----------------------------------------------------------------------


class Offer(Message, frozen=True, kw_only=True):
    """Source: take this request? It holds ``tokens`` of KV now and may grow by ``headroom``
    until the hand-over. ``room`` names the KV transfer."""

    migration_id: SequenceId
    source: WorkerId
    room: Room
    tokens: Count
    headroom: Annotated[int, msgspec.Meta(ge=0, le=65_536)]
    spec: RequestSpec
    output_ids: bytes


class Accept(Message, frozen=True, kw_only=True):
    """Target: memory is reserved; send KV from token ``prefix_tokens`` on."""

    migration_id: SequenceId
    worker_id: WorkerId
    prefix_tokens: Count


class Refuse(Message, frozen=True, kw_only=True):
    """Target: no, for ``reason`` (a key of the refusal table, then free text)."""

    migration_id: SequenceId
    worker_id: WorkerId
    reason: Reason


class Commit(Message, frozen=True, kw_only=True):
    """Source: it has stopped; this is its final state, and the last KV pages are on their way.

    ``stopped_at``: wall clock (s) of the last step on the source. ``kv_checksum``: CRC-32 of the
    KV that was sent, if the source computes one.
    """

    migration_id: SequenceId
    source: WorkerId
    tokens: Count
    state: RequestState
    stopped_at: Seconds
    kv_checksum: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None


class Committed(Message, frozen=True, kw_only=True):
    """Target: state and KV are complete; it owns the request from here on."""

    migration_id: SequenceId
    worker_id: WorkerId


class Cancel(Message, frozen=True, kw_only=True):
    """Source: forget this migration; no byte of it is in flight any more."""

    migration_id: SequenceId
    source: WorkerId
    reason: Reason


class Cancelled(Message, frozen=True, kw_only=True):
    """Target: forgotten, its memory is free again; the source owns the request."""

    migration_id: SequenceId
    worker_id: WorkerId


class TransferFailed(Message, frozen=True, kw_only=True):
    """Target: the KV did not arrive; it waits for ``Cancel`` before it frees the memory."""

    migration_id: SequenceId
    worker_id: WorkerId
    reason: Reason


class ForwardAbort(Message, frozen=True, kw_only=True):
    """Source: the client aborted the request after ``Commit`` had gone out."""

    migration_id: SequenceId
    source: WorkerId


# --- front <-> controller -------------------------------------------------------------------


class StatusQuery(Message, frozen=True, kw_only=True):
    """Ask for the cluster's status."""

    query_id: SequenceId


class RequestsQuery(Message, frozen=True, kw_only=True):
    """Ask for the live requests."""

    query_id: SequenceId


class MigrateQuery(Message, frozen=True, kw_only=True):
    """Ask for a migration, and for its outcome."""

    query_id: SequenceId
    rid: Rid
    target: WorkerId


class QueryReply(Message, frozen=True, kw_only=True):
    """Answer to any query: an HTTP status and a JSON document (as bytes)."""

    query_id: SequenceId
    status: HttpStatus
    body: bytes


WorkerInbound = (
    ConnectPeers
    | StartMigration
    | Offer
    | Accept
    | Refuse
    | Commit
    | Committed
    | Cancel
    | Cancelled
    | TransferFailed
    | ForwardAbort
)
ControllerInbound = WorkerReport | MigrationResult | Landed
FrontInbound = StatusQuery | RequestsQuery | MigrateQuery

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The wire form of ``message``."""
    return _encoder.encode(message)


class Decoder:
    """Decodes and validates the messages of one socket.

    ``inbound`` is the union of the message types the socket may carry. Anything else raises
    :class:`msgspec.ValidationError` or :class:`msgspec.DecodeError`.
    """

    def __init__(self, inbound: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(inbound)

    def decode(self, frame: bytes) -> Any:
        """One message."""
        if len(frame) > MAX_MESSAGE_BYTES:
            raise msgspec.ValidationError(f"message of {len(frame)} bytes is too large")
        try:
            return self._decoder.decode(frame)
        except msgspec.MsgspecError:
            raise
        except Exception as error:
            # Text that is not UTF-8, arrays within arrays without end, and the like.
            raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from None
