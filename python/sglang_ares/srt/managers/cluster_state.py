"""What the controller knows: each worker's last report, who owns each request, what is moving."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sglang_ares.srt.disaggregation.migration import CANCELLED, COMPLETED, REFUSED
from sglang_ares.srt.managers.io_struct import Landed, MigrationResult, WorkerReport
from sglang_ares.srt.policy.types import DECODE, WorkerLoad


@dataclass
class WorkerView:
    """One worker as last reported, and what was sent to it since."""

    worker_id: int
    role: str
    pids: list[int]
    kv_capacity: int
    state: str = "ready"
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
    """Where a live request is: its prefill worker (for aborts) and its decode worker."""

    prefill: int
    decode: int
    dispatched_at: float


@dataclass
class MovingRequest:
    """A migration that was commanded and has not been reported back."""

    rid: str
    source: int
    target: int


class ClusterState:
    """The controller's tables. All times are monotonic seconds."""

    def __init__(self, workers: list[WorkerView]) -> None:
        self.workers = {w.worker_id: w for w in workers}
        self.owners: dict[str, Ownership] = {}
        self.moving: dict[int, MovingRequest] = {}
        # Moving requests that left their target: ended there, if they had landed at all.
        self._left_target: set[str] = set()
        self.migrations_attempted = 0
        self.migrations_completed = 0
        self.migrations_refused: Counter[str] = Counter()
        self.migrations_failed: Counter[str] = Counter()
        self.migrations_cancelled: Counter[str] = Counter()
        self.started_at = time.monotonic()

    def with_role(self, role: str) -> list[WorkerView]:
        """The serving workers of a role."""
        return [w for w in self.workers.values() if w.role == role and w.state == "ready"]

    def loads(self, role: str) -> list[WorkerLoad]:
        """The loads of a role's workers, for a policy. What is on the move counts where it goes,
        or the same gap would be closed twice."""
        moving = frozenset(m.rid for m in self.moving.values())
        loads = {w.worker_id: w.load(moving) for w in self.with_role(role)}
        for move in self.moving.values():
            source, target = loads.get(move.source), loads.get(move.target)
            tokens = next(
                (r.tokens for r in (source.requests if source else ()) if r.rid == move.rid), 0
            )
            if source is not None and target is not None and tokens:
                held = max(0, source.kv_tokens - tokens)
                loads[move.source] = msgspec.structs.replace(source, kv_tokens=held)
                coming = target.queued_tokens + tokens
                loads[move.target] = msgspec.structs.replace(target, queued_tokens=coming)
        return list(loads.values())

    def note_dispatch(self, rid: str, prefill: int, decode: int, prompt_tokens: int) -> None:
        """A request was sent to its two workers."""
        self.owners[rid] = Ownership(prefill, decode, time.monotonic())
        for worker_id in (prefill, decode):
            self.workers[worker_id].dispatched[rid] = prompt_tokens

    def fault(self, message: WorkerReport | MigrationResult | Landed) -> str | None:
        """What is wrong with a worker's message that decodes, if anything."""
        if isinstance(message, WorkerReport):
            view = self.workers.get(message.worker_id)
            if view is None:
                return f"there is no worker {message.worker_id}"
            if (message.load.worker_id, message.load.role) != (view.worker_id, view.role):
                return f"the load is not one of {view.role} worker {view.worker_id}"
        elif isinstance(message, MigrationResult):
            known = self.moving.get(message.migration_id)
            if known != MovingRequest(message.rid, message.source, message.target):
                return f"migration {message.migration_id} is not under way, or another one"
        elif (
            message.worker_id not in self.workers
            or not 0 < message.migration_id <= self.migrations_attempted
        ):
            return f"worker {message.worker_id} or migration {message.migration_id} is unknown"
        return None

    def note_report(self, report: WorkerReport) -> None:
        """A worker's load; what it finished is forgotten."""
        view = self.workers.get(report.worker_id)
        if view is None:
            return
        view.report = report
        view.reported_at = time.monotonic()
        for request in report.load.requests:
            view.dispatched.pop(request.rid, None)
        for rid in report.finished:
            view.dispatched.pop(rid, None)
            owner = self.owners.get(rid)
            if owner is None or view.role != DECODE:
                continue
            if owner.decode == view.worker_id:
                del self.owners[rid]
            elif any(m.rid == rid and m.target == view.worker_id for m in self.moving.values()):
                self._left_target.add(rid)

    def note_migration_started(self, migration_id: int, move: MovingRequest) -> None:
        """A migration was commanded."""
        self.migrations_attempted += 1
        self.moving[migration_id] = move

    def note_migration_result(self, result: MigrationResult) -> bool:
        """A migration ended; false if it was not known."""
        if self.moving.pop(result.migration_id, None) is None:
            return False
        left_target = result.rid in self._left_target
        self._left_target.discard(result.rid)
        if result.outcome == COMPLETED:
            if left_target:
                self.owners.pop(result.rid, None)
            self.migrations_completed += 1
            self.workers[result.source].dispatched.pop(result.rid, None)
            owner = self.owners.get(result.rid)
            if owner is not None:
                owner.decode = result.target
        elif result.outcome == REFUSED:
            self.migrations_refused[_key(result.reason)] += 1
        elif result.outcome == CANCELLED:
            self.migrations_cancelled[_key(result.reason)] += 1
        else:
            self.migrations_failed[_key(result.reason)] += 1
        return True

    # --- documents --------------------------------------------------------------------------

    def status(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The body of ``GET /ares/status``; ``settings`` stand first in it."""
        return {
            "uptime_s": time.monotonic() - self.started_at,
            **settings,
            "workers": [self._worker_status(w) for w in self.workers.values()],
            "migrations": {
                "attempted": self.migrations_attempted,
                "completed": self.migrations_completed,
                "refused": dict(self.migrations_refused),
                "failed": dict(self.migrations_failed),
                "cancelled": dict(self.migrations_cancelled),
                "in_flight": len(self.moving),
            },
            "requests": len(self.owners),
        }

    def _worker_status(self, view: WorkerView) -> dict[str, Any]:
        load = view.load()
        report = view.report
        status: dict[str, Any] = {
            "id": view.worker_id,
            "role": view.role,
            "state": view.state,
            "pids": view.pids,
            "running": load.running,
            "queued": load.queued,
            "queued_tokens": load.queued_tokens,
            "kv_tokens": load.kv_tokens,
            "kv_capacity": load.kv_capacity,
        }
        if report is not None:
            status.update(
                report_age_s=time.monotonic() - view.reported_at,
                migrations_in=report.migrations_in,
                migrations_out=report.migrations_out,
                retracted=report.retracted,
                dropped_frames=report.dropped_frames,
                decode_step_ms=report.decode_step_ms,
                pools=msgspec.to_builtins(report.pools),
            )
        return status

    def requests(self) -> list[dict[str, Any]]:
        """The body of ``GET /ares/requests``: live requests, where and how large they are."""
        now = time.monotonic()
        known: dict[str, tuple[int, int]] = {}
        for view in self.with_role(DECODE):
            for request in view.load().requests:
                known[request.rid] = (view.worker_id, request.tokens)
        listing = []
        for rid, owner in self.owners.items():
            _, tokens = known.get(rid, (owner.decode, 0))
            listing.append(
                {
                    "rid": rid,
                    "worker": owner.decode,
                    "tokens": tokens,
                    "age_s": now - owner.dispatched_at,
                }
            )
        return listing


def _key(reason: str) -> str:
    """The stable part of a reason: what stands before its explanation."""
    return reason.split(":", 1)[0]
