"""Every message of ARES, as tagged msgspec structs; nothing here is ever pickled.

Directions: controller → worker (``ConnectPeers`` … ``Resume``), worker → controller
(``Heartbeat`` … ``PeerDiedAck``), worker → worker (``Offer`` … ``ForwardAbort``, in the order of
the protocol), controller ↔ token ledger (``FenceRequests``, ``Fenced``, …), front ↔ controller
(``…Query``/``…Reply``); of workers on other hosts: controller → worker (``Generate``,
``ControlRequest``), worker → controller and ledger (``ControlReply``, ``Outputs``), their host ↔
controller (``JoinQuery`` … ``MayLeave``). On the wire a message is one msgpack array whose first
element is its class name. :class:`Decoder` checks every type and bound; what a field means is
checked where it is used (``disaggregation/checks.py``, the managers). A ``rid`` names one attempt
at a request (``managers/attempts.py``), except where the front is spoken to.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from sglang_ares.srt.disaggregation.request_state import RequestSpec, RequestState
from sglang_ares.srt.managers.remote_outputs import OutputBatch
from sglang_ares.srt.policy.types import Remaining, WorkerLoad
from sglang_ares.srt.predictor.errors import ErrorSums
from sglang_ares.srt.predictor.estimate import MAX_TRAIL
from sglang_ares.srt.security.bounds import (
    MAX_HEADROOM,
    MAX_LISTED,
    Address,
    ClockDifference,
    Count,
    HostName,
    HttpStatus,
    Label,
    Milliseconds,
    Outcome,
    PolicyName,
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


class PeerDied(Message, frozen=True, kw_only=True):
    """Worker ``worker_id`` is dead for certain: nothing of it writes, sends or owns any more.
    Let go of what depends on it, then acknowledge."""

    event_id: SequenceId
    worker_id: WorkerId


class Discard(Message, frozen=True, kw_only=True):
    """These attempts are void: end them without a word, now or when they arrive."""

    rids: Annotated[list[Rid], msgspec.Meta(max_length=MAX_LISTED)]


class Resume(Message, frozen=True, kw_only=True):
    """Continue a request after ``output_ids``; a prefill worker sends the KV of its prompt and
    all output but the last token over transfer ``room``.

    ``cached_tokens``, ``reasoning_tokens``: usage counters so far.
    """

    spec: RequestSpec
    output_ids: bytes
    cached_tokens: Count
    reasoning_tokens: Count
    bootstrap_host: HostName
    bootstrap_port: Port
    room: Room


class ChangeRole(Message, frozen=True, kw_only=True):
    """Become a worker of ``role`` as soon as nothing is left to do; answer with
    ``RoleChanged``. Only the worker that it names obeys."""

    change_id: SequenceId
    worker_id: WorkerId
    incarnation: Count
    role: Role


class InjectFault(Message, frozen=True, kw_only=True):
    """Hold the next migration that reaches ``point`` for ``seconds`` (action ``hold``), let its
    transfer fail there (``fail``), or end all holds (``release``); ``disaggregation/faults.py``.
    """

    point: Reason
    action: Reason
    seconds: Seconds


# --- worker -> controller -------------------------------------------------------------------


class Heartbeat(Message, frozen=True, kw_only=True):
    """Rank ``rank`` of a worker is not stopped; sent by a thread of its own, so that a long step
    is not mistaken for death. ``incarnation`` counts the worker's restarts."""

    worker_id: WorkerId
    incarnation: Count
    rank: WorkerId


class RequestFailed(Message, frozen=True, kw_only=True):
    """The worker lost a request through no fault of the request: it wants a new attempt."""

    rid: Rid
    worker_id: WorkerId
    reason: Reason


class Adopted(Message, frozen=True, kw_only=True):
    """The target of a migration owns the request now; told by itself, as its source may die."""

    migration_id: SequenceId
    rid: Rid
    worker_id: WorkerId


class RoleChanged(Message, frozen=True, kw_only=True):
    """The end of a ``ChangeRole``: the role the worker has now, and, if that is the old one, the
    ``reason``."""

    change_id: SequenceId
    worker_id: WorkerId
    role: Role
    reason: Reason


class FaultReached(Message, frozen=True, kw_only=True):
    """An injected fault has struck."""

    worker_id: WorkerId
    point: Reason
    rid: Rid


class PeerDiedAck(Message, frozen=True, kw_only=True):
    """All this worker had to say that bears on the dead one was sent before."""

    event_id: SequenceId
    worker_id: WorkerId


class PoolCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What the integrity check compares: free slots, and KV tokens by owner. ``kv_cached`` of the
    prefix cache can be evicted, ``kv_locked`` of it is in use by requests (0 when idle)."""

    kv_free: Count
    kv_cached: Count
    kv_locked: Count
    request_slots_free: Count
    metadata_slots_free: Count
    requests: Count
    idle: bool


class PredictionReport(msgspec.Struct, frozen=True, kw_only=True):
    """``errors``: by the output tokens generated when a prediction was made. ``not_finite``: raw
    outputs that were no numbers. Both since the worker's start."""

    errors: Annotated[dict[Count, ErrorSums], msgspec.Meta(max_length=MAX_TRAIL)]
    not_finite: Count


class FirstEstimates(Message, frozen=True, kw_only=True):
    """A prefill worker: what is predicted for requests it has just done with."""

    worker_id: WorkerId
    remaining: Annotated[dict[Rid, Remaining], msgspec.Meta(max_length=MAX_LISTED)]


class WorkerReport(Message, frozen=True, kw_only=True):
    """A worker's load, and the requests that left it since its last report.

    ``ended_lengths``: output tokens of the requests that came to their end since (aborted ones did
    not). ``decode_step_ms``: mean duration of the decode steps since the last report (0: none).
    ``prefill_law``: its prefill times (fixed, per token, per square of tokens), once it knows.
    ``dropped_frames``: control messages this worker has not let in since its start.
    ``late_steps``: steps in which an emulated worker could not keep to its profile.
    ``predictions``: None where nothing is predicted.
    """

    worker_id: WorkerId
    incarnation: Count
    load: WorkerLoad
    finished: Annotated[list[Rid], msgspec.Meta(max_length=MAX_LISTED)]
    ended_lengths: Annotated[list[Count], msgspec.Meta(max_length=MAX_LISTED)] = []
    pools: PoolCounters
    migrations_in: Count
    migrations_out: Count
    retracted: Count
    decode_step_ms: Seconds
    dropped_frames: Count = 0
    prefill_law: tuple[Milliseconds, Milliseconds, Milliseconds] | None = None
    late_steps: Count = 0
    predictions: PredictionReport | None = None


class LoadUpdate(Message, frozen=True, kw_only=True):
    """A worker's load between two reports: a request has ended, and there is room."""

    worker_id: WorkerId
    incarnation: Count
    load: WorkerLoad


class MigrationResult(Message, frozen=True, kw_only=True):
    """How a migration ended, told by its source.

    ``outcome``: completed, refused, failed or cancelled; ``reason`` says why unless completed.
    ``duration_s``: from the command to the end. ``tokens``: what the request held at the end;
    ``tokens_sent``: those whose KV was sent, ``tokens_saved``: those the target's cache held
    already (0 unless completed). ``kv_bytes``: bytes of KV sent, in whole pages.
    """

    migration_id: SequenceId
    rid: Rid
    source: WorkerId
    target: WorkerId
    outcome: Outcome
    reason: Reason
    tokens: Count
    tokens_sent: Count
    tokens_saved: Count
    kv_bytes: Count
    duration_s: Seconds


class Landed(Message, frozen=True, kw_only=True):
    """The target emitted its first token of a moved request ``blackout_s`` after the last one
    of the source (wall clocks of both hosts); ``steps``: decode steps the target ended in that
    time, the request's own included."""

    migration_id: SequenceId
    rid: Rid
    worker_id: WorkerId
    blackout_s: ClockDifference
    steps: Count


# --- worker -> worker -----------------------------------------------------------------------


class Offer(Message, frozen=True, kw_only=True):
    """Source: take this request? It holds ``tokens`` of KV now and may grow by ``headroom``
    until the hand-over. ``room`` names the KV transfer."""

    migration_id: SequenceId
    source: WorkerId
    room: Room
    tokens: Count
    headroom: Annotated[int, msgspec.Meta(ge=0, le=MAX_HEADROOM)]
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


class ChunkSent(Message, frozen=True, kw_only=True):
    """Source: more KV pages are on their way, and these were not the last."""

    migration_id: SequenceId
    source: WorkerId


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


# --- controller <-> token ledger ------------------------------------------------------------


class FenceRequests(Message, frozen=True, kw_only=True):
    """Let no earlier attempts than these speak from here on (rid of the client: attempt).

    ``first_attempts``: where each request began to count; what was said before belongs to an
    earlier request of that rid.
    """

    fence_id: SequenceId
    attempts: dict[Rid, Count]
    first_attempts: dict[Rid, Count] = {}


class EmittedTokens(msgspec.Struct, frozen=True, kw_only=True):
    """What of a request went towards the client before the fence; nothing else ever will.

    ``ended``: its last token or an error went out. ``output_ids``: little-endian int32.
    ``incomplete``: more had gone out before these.
    """

    rid: Rid
    ended: bool
    output_ids: bytes
    cached_tokens: Count
    reasoning_tokens: Count
    incomplete: bool = False


class Fenced(Message, frozen=True, kw_only=True):
    """The fence is up."""

    fence_id: SequenceId
    requests: list[EmittedTokens]


class LedgerDropped(Message, frozen=True, kw_only=True):
    """What the token ledger's process has not let in since its start; told when there is more."""

    dropped_frames: Count


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


class DrainQuery(Message, frozen=True, kw_only=True):
    """Empty a worker and give it no further requests, or (``drain`` false) use it again."""

    query_id: SequenceId
    worker_id: WorkerId
    drain: bool


class PolicyQuery(Message, frozen=True, kw_only=True):
    """Use these policies from now on; an empty name changes nothing."""

    query_id: SequenceId
    placement: PolicyName
    rescheduling: PolicyName
    admission: PolicyName = ""


class RoleQuery(Message, frozen=True, kw_only=True):
    """Make a worker one of ``role``; answered when it is, or with the reason why not."""

    query_id: SequenceId
    worker_id: WorkerId
    role: Role


class FaultQuery(Message, frozen=True, kw_only=True):
    """Inject a fault on a worker, or (no worker) ask which have struck."""

    query_id: SequenceId
    worker_id: WorkerId | None
    point: Reason
    action: Reason
    seconds: Seconds


class QueryReply(Message, frozen=True, kw_only=True):
    """Answer to any query: an HTTP status and a JSON document (as bytes)."""

    query_id: SequenceId
    status: HttpStatus
    body: bytes


# --- workers on other hosts -----------------------------------------------------------------


class Generate(Message, frozen=True, kw_only=True):
    """Controller → worker: a request; its KV comes or goes over transfer ``room``, unless it is a
    health check (no room)."""

    spec: RequestSpec
    bootstrap_host: HostName
    bootstrap_port: Port
    room: Room


class ControlRequest(Message, frozen=True, kw_only=True):
    """Controller → worker: one of upstream's control requests, as JSON
    (``managers/remote_io.py`` has the list)."""

    body: bytes


class ControlReply(Message, frozen=True, kw_only=True):
    """Worker → controller: upstream's answer for the front, as JSON."""

    worker_id: WorkerId
    body: bytes


class Outputs(Message, frozen=True, kw_only=True):
    """Worker → token ledger: new tokens."""

    worker_id: WorkerId
    batch: OutputBatch


class JoinQuery(Message, frozen=True, kw_only=True):
    """Host → controller, on the socket of the front's queries: take in my worker. No process of
    it runs. ``host_id`` is the same for every attempt of one host process; ``mailbox`` is where
    that listens. ``settings``: what must be as in the cluster (``managers/cluster_settings.py``).
    """

    query_id: SequenceId
    host_id: HostName
    role: Role
    host: HostName
    mailbox: Address
    settings: Annotated[dict[Label, Label], msgspec.Meta(max_length=2048)]


class HostBeat(Message, frozen=True, kw_only=True):
    """Host → controller: asks for the lease of its worker to be renewed."""

    worker_id: WorkerId
    incarnation: Count
    beat: SequenceId


class Lease(Message, frozen=True, kw_only=True):
    """Controller → host: the worker may live on, counted from when ``beat`` was sent."""

    worker_id: WorkerId
    incarnation: Count
    beat: SequenceId


class WorkerStarted(Message, frozen=True, kw_only=True):
    """Host → controller: the worker has loaded the model. ``pids``: on its host, by rank."""

    worker_id: WorkerId
    incarnation: Count
    pids: Annotated[list[Count], msgspec.Meta(min_length=1, max_length=1024)]
    kv_capacity: Count
    max_input_tokens: Count
    control_endpoint: Address
    bootstrap_host: HostName
    bootstrap_port: Port


class WorkerEnded(Message, frozen=True, kw_only=True):
    """Host → controller: no process of the worker is left. ``leaves``: the host goes too."""

    worker_id: WorkerId
    incarnation: Count
    reason: Reason
    leaves: bool = False


class HostLeaving(Message, frozen=True, kw_only=True):
    """Host → controller: it wants to go; empty the worker."""

    worker_id: WorkerId
    incarnation: Count


class EndWorker(Message, frozen=True, kw_only=True):
    """Controller → host: end the worker's processes now, and say so."""

    worker_id: WorkerId
    incarnation: Count


class MayLeave(Message, frozen=True, kw_only=True):
    """Controller → host: the worker is empty, or the server ends: end the worker and go."""

    worker_id: WorkerId
    incarnation: Count
    reason: Reason


WorkerInbound = (
    Generate
    | ControlRequest
    | ConnectPeers
    | StartMigration
    | PeerDied
    | Discard
    | Resume
    | ChangeRole
    | InjectFault
    | Offer
    | Accept
    | Refuse
    | ChunkSent
    | Commit
    | Committed
    | Cancel
    | Cancelled
    | TransferFailed
    | ForwardAbort
)
ControllerInbound = (
    Heartbeat
    | WorkerReport
    | LoadUpdate
    | FirstEstimates
    | MigrationResult
    | Landed
    | Adopted
    | RequestFailed
    | PeerDiedAck
    | RoleChanged
    | FaultReached
    | Fenced
    | LedgerDropped
    | ControlReply
    | HostBeat
    | WorkerStarted
    | WorkerEnded
    | HostLeaving
)
LedgerInbound = FenceRequests
OutputsInbound = Outputs
HostInbound = Lease | EndWorker | MayLeave
FrontInbound = (
    StatusQuery
    | RequestsQuery
    | MigrateQuery
    | DrainQuery
    | PolicyQuery
    | RoleQuery
    | FaultQuery
    | JoinQuery
)

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
