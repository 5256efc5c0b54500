"""What the controller's tables hold: workers as last reported, live requests, commanded moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_ares.srt.managers.attempts import internal_rid
from sglang_ares.srt.managers.io_struct import WorkerReport
from sglang_ares.srt.policy.types import Remaining, WorkerLoad
from sglang_ares.srt.predictor.estimate import brought_forward

# What a worker can be: serving; lost, its processes not gone yet; waiting for its restart or
# starting again; given up; gone with its host, which had asked.
READY = "ready"
DYING = "dying"
RESTARTING = "restarting"
FAILED_FOR_GOOD = "failed"
LEFT = "left"
# Shown to operators of a worker that serves until it changes its role.
CHANGING = "changing"


@dataclass
class WorkerView:
    """One worker as last reported, and what was sent to it since."""

    worker_id: int
    role: str
    pids: list[int]
    kv_capacity: int
    incarnation: int = 0
    state: str = READY
    # Why it is not ready.
    reason: str = ""
    # The operator wants it empty: it takes no requests, and those it has are moved away.
    draining: bool = False
    # Another host than the controller's, if it runs on one.
    host: str = ""
    # The role it is to have; it takes no requests until then.
    changing_to: str | None = None
    report: WorkerReport | None = None
    reported_at: float = 0.0
    # Prompt tokens of requests dispatched here that no report has shown yet.
    dispatched: dict[str, int] = field(default_factory=dict)

    def load(self, moving: frozenset[str] = frozenset()) -> WorkerLoad:
        """The load a policy should reckon with; requests in ``moving`` must stay."""
        if self.report is None:
            base = WorkerLoad(
                worker_id=self.worker_id,
                role=self.role,
                kv_tokens=0,
                kv_capacity=self.kv_capacity,
                running=0,
                queued=0,
                queued_tokens=0,
            )
        else:
            base = self.report.load
        requests = tuple(
            msgspec.structs.replace(r, movable=False) if r.rid in moving else r
            for r in base.requests
        )
        return msgspec.structs.replace(
            base,
            queued=base.queued + len(self.dispatched),
            queued_tokens=base.queued_tokens + sum(self.dispatched.values()),
            requests=requests,
        )


@dataclass
class Ownership:
    """A live request: what the front sent (a ``TokenizedGenerateReqInput``), where it is (on no
    worker, -1, while it waits to be dispatched), and which attempt at it runs. ``recovering``: it
    is nowhere until the token ledger has answered. ``aborted``: the client has left, so that it
    need not be recovered."""

    rid: str
    request: Any
    prefill: int
    decode: int
    dispatched_at: float
    attempt: int = 0
    first_attempt: int = 0
    recovering: bool = False
    # Attempts that ended because their worker changed its role: no failures.
    handed_back: int = 0
    aborted: bool = False
    # What prefill predicted after the first output token, until its decode worker predicts.
    first_estimate: Remaining | None = None

    @property
    def waiting(self) -> bool:
        """No worker knows of it yet."""
        return self.decode < 0

    @property
    def name(self) -> str:
        """What the workers call it."""
        return internal_rid(self.rid, self.attempt)

    def expected_after(self, output_tokens: int) -> Remaining | None:
        """What is left of the first estimate; None once nothing is, as more will come than it
        knew of."""
        if self.first_estimate is None:
            return None
        left = brought_forward(self.first_estimate, max(output_tokens - 1, 0))
        return left if left[-1] > 0 else None


# Why a migration was commanded.
MANUAL = "manual"
POLICY = "policy"
MEMORY = "memory"
DRAIN = "drain"
ROLE = "role"
CAUSES = (MANUAL, POLICY, MEMORY, DRAIN, ROLE)


@dataclass
class MovingRequest:
    """A migration that was commanded, for ``cause``, and has not been reported back. ``rid``: the
    attempt."""

    rid: str
    source: int
    target: int
    cause: str = POLICY
