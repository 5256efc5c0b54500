"""What migrations ask of the scheduler they run in: one protocol per side, and the manager's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.managers.schedule_batch import Req

    from sglang_ares.srt.disaggregation.checks import WorkerFacts
    from sglang_ares.srt.disaggregation.kv_link import KvLink
    from sglang_ares.srt.managers.io_struct import Message, Offer, Peer
    from sglang_ares.srt.security.dropped import DroppedFrames


class SideHost(Protocol):
    """What both sides ask."""

    worker_id: int
    link: KvLink
    dropped: DroppedFrames

    def alloc_metadata(self) -> int | None:
        """A slot of upstream's metadata buffers, if there is one."""
        ...

    def free_metadata(self, slot: int) -> None:
        """Give the slot back."""
        ...

    def send(self, worker_id: int, message: Message) -> None:
        """Send to a peer."""
        ...


class SourceHost(SideHost, Protocol):
    """What the sending side asks."""

    def is_running(self, req: Req) -> bool:
        """Whether the request decodes here."""
        ...

    def can_stop(self, req: Req) -> bool:
        """Whether the step with the request that is under way, if any, is about to end."""
        ...

    def stop(self, req: Req) -> None:
        """Take the request out of the next step."""
        ...

    def has_stopped(self, req: Req) -> bool:
        """Whether no step with the request is under way any more."""
        ...

    def resume(self, req: Req) -> None:
        """Let a stopped request decode again."""
        ...

    def release(self, req: Req) -> None:
        """Free the request's memory; it lives elsewhere now."""
        ...

    def lost(self, req: Req, reason: str) -> None:
        """Let go of a request that a dead worker may have owned; it needs a new attempt."""
        ...

    def abort_here(self, rid: str) -> None:
        """End a request that is owned here, as the client asked."""
        ...

    def write_room(self, slot: int, room: int) -> None:
        """Stamp the slot with the transfer's room, which the target verifies."""
        ...

    def decode_step_s(self) -> float:
        """How long a decode step takes here at present, the same on all ranks; 0 if there was
        none."""
        ...

    def wall_clock(self) -> float:
        """Seconds since the epoch."""
        ...


class TargetHost(SideHost, Protocol):
    """What the receiving side asks."""

    facts: WorkerFacts

    def refusal(self, offer: Offer) -> str | None:
        """Why this worker cannot take the request, if it cannot."""
        ...

    def build(self, offer: Offer, source: Peer) -> None:
        """Build the request; ``on_built`` is called when it (and its grammar) is ready."""
        ...

    def lock_prefix(self, req: Req, offer: Offer) -> int:
        """Find the request's first tokens in the prefix cache and keep them there; how many, in
        whole pages, and fewer than it has: at least one token is left to send."""
        ...

    def unlock_prefix(self, req: Req) -> None:
        """Let go of what :meth:`lock_prefix` found."""
        ...

    def reserve(self, req: Req, offer: Offer) -> bool:
        """Allocate KV for the request's further tokens and headroom, if there is enough."""
        ...

    def trim(self, req: Req, tokens: int) -> None:
        """Free the reserved KV beyond ``tokens``."""
        ...

    def unreserve(self, req: Req) -> None:
        """Free all reserved KV, and let go of the prefix."""
        ...

    def room_in(self, slot: int) -> int:
        """The room that arrived in the slot."""
        ...

    def adopt(self, req: Req, migration_id: int, stopped_at: float, aborted: bool) -> None:
        """Let the request decode here; end it at once if the client ``aborted`` it."""
        ...


class MigrationHost(SourceHost, TargetHost, Protocol):
    """Both sides' demands, and the ones of the manager itself.

    ``speaks``: whether this is the tensor-parallel rank whose messages are sent.
    ``kv_capacity``: tokens.
    """

    speaks: bool
    kv_capacity: int

    def find_running(self, rid: str) -> tuple[Req, TokenizedGenerateReqInput] | None:
        """A request that decodes here, and what the front sent for it."""
        ...

    def immovable(self, req: Req, recv_req: TokenizedGenerateReqInput) -> str | None:
        """Why the request cannot move, if it cannot."""
        ...

    def forget(self, rid: str) -> None:
        """A request that was built for a migration does not come after all."""
        ...

    def report(self, message: Message) -> None:
        """Tell the controller."""
        ...
