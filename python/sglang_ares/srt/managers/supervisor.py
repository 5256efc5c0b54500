"""Watches over the workers: declares them dead, ends them for certain, starts them anew."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from sglang_ares.srt.managers.cluster_views import (
    DYING,
    FAILED_FOR_GOOD,
    READY,
    RESTARTING,
)
from sglang_ares.srt.managers.remote_workers import RemoteWorker, WorkerStartError

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster import WorkerCluster, WorkerProcess
    from sglang_ares.srt.managers.cluster_state import ClusterState

logger = logging.getLogger(__name__)

# A worker that served is started anew at once. One that could not even be started is given this
# long, doubling with every failure in a row.
_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0
# After serving this long a worker's earlier restarts no longer count.
_FORGIVEN_AFTER_S = 600.0


class SupervisorHost(Protocol):
    """What the supervisor asks of the controller."""

    def leave_out(self, worker_id: int) -> None:
        """Send the worker nothing any more."""
        ...

    def on_worker_dead(self, worker_id: int) -> None:
        """Its processes are gone."""
        ...

    def settled(self, worker_id: int) -> bool:
        """Whether all others have let go of the dead worker, so that its id may come back."""
        ...

    def restart(self, worker_id: int) -> None:
        """Start a lost worker anew."""
        ...

    def take_in(self, worker: WorkerProcess | RemoteWorker) -> None:
        """A restarted worker is ready: connect it, and let it have requests."""
        ...


class Supervisor:
    """One state per worker: ready → dying → restarting → ready, or failed for good."""

    def __init__(
        self,
        host: SupervisorHost,
        cluster: WorkerCluster,
        state: ClusterState,
        timeout_s: float,
        max_restarts: int,
        now: float,
    ) -> None:
        self._host = host
        self._cluster = cluster
        self._state = state
        self._timeout_s = timeout_s
        self._max_restarts = max_restarts
        # Last sign of life of every rank, by worker and rank.
        self._heard: dict[tuple[int, int], float] = {}
        self._last_tick = now
        self._restart_at: dict[int, float] = {}
        # By worker: restarts that count; starts that failed since it last served; serving since.
        self._strikes: Counter[int] = Counter()
        self._failed_starts: Counter[int] = Counter()
        self._serving_since: dict[int, float] = {}
        # Those that are out of restarts.
        self.exhausted: set[int] = set()
        for worker in cluster.workers:
            self._expect(worker, now)

    def _expect(self, worker: WorkerProcess | RemoteWorker, now: float) -> None:
        self._serving_since[worker.spec.worker_id] = now
        for rank in range(worker.ranks):
            self._heard[worker.spec.worker_id, rank] = now

    def on_heartbeat(self, worker_id: int, incarnation: int, rank: int, now: float) -> None:
        """A rank has spoken."""
        view = self._state.workers.get(worker_id)
        if view is not None and view.incarnation == incarnation:
            self._heard[worker_id, rank] = now

    def readmit(self, worker_id: int, *, forgive: bool) -> bool:
        """Expect a worker back that was given up; false while others hold on to it. With
        ``forgive`` its earlier restarts do not count."""
        if not self._host.settled(worker_id):
            return False
        if forgive:
            self._strikes[worker_id] = self._failed_starts[worker_id] = 0
            self.exhausted.discard(worker_id)
        view = self._state.workers[worker_id]
        view.state, view.reason = RESTARTING, ""
        self._restart_at[worker_id] = 0.0
        return True

    def tick(self, now: float) -> None:
        """Look after every worker once; never waits."""
        # While the controller itself did not run it heard nobody: that is not their silence.
        pause = now - self._last_tick
        self._last_tick = now
        if pause > 1.0:
            self._heard = {key: heard + pause for key, heard in self._heard.items()}
        for worker in self._cluster.workers:
            view = self._state.workers[worker.spec.worker_id]
            if view.state == READY:
                self._check(worker, now)
            elif view.state == DYING and worker.gone:
                self._bury(worker, now)
            elif view.state == RESTARTING:
                self._bring_back(worker, now)

    def _check(self, worker: WorkerProcess | RemoteWorker, now: float) -> None:
        worker_id = worker.spec.worker_id
        if not worker.alive:
            self._lose(worker, worker.cause_of_death)
            return
        silent = now - min(h for (w, _), h in self._heard.items() if w == worker_id)
        if silent > self._timeout_s:
            self._lose(worker, f"gave no sign of life for {silent:.1f} s")

    def _lose(self, worker: WorkerProcess | RemoteWorker, reason: str) -> None:
        logger.log(logging.INFO if worker.left else logging.ERROR, "%s %s", worker.name, reason)
        view = self._state.workers[worker.spec.worker_id]
        view.state, view.reason = DYING, reason
        self._host.leave_out(worker.spec.worker_id)
        self._cluster.kill(worker.spec.worker_id)

    def _bury(self, worker: WorkerProcess | RemoteWorker, now: float) -> None:
        worker_id = worker.spec.worker_id
        view = self._state.workers[worker_id]
        since = self._serving_since.pop(worker_id, None)
        if since is not None:
            self._failed_starts[worker_id] = 0
            if now - since > _FORGIVEN_AFTER_S:
                self._strikes[worker_id] = 0
        else:
            self._failed_starts[worker_id] += 1
        if worker.ending is not None:
            view.state, why = worker.ending
            view.reason += f"; {why}"
            logger.warning("%s is left out: %s", worker.name, view.reason)
        elif self._strikes[worker_id] >= self._max_restarts:
            view.state = FAILED_FOR_GOOD
            self.exhausted.add(worker_id)
            strikes = self._strikes[worker_id]
            view.reason += f"; it was restarted {strikes} times (--ares-max-restarts)"
            logger.error("%s is left out: %s", worker.name, view.reason)
        else:
            view.state = RESTARTING
            self._strikes[worker_id] += 1
            failures = self._failed_starts[worker_id]
            wait_s = _BACKOFF_S * 2 ** (failures - 1) if failures else 0.0
            self._restart_at[worker_id] = now + min(wait_s, _LONGEST_BACKOFF_S)
        self._host.on_worker_dead(worker_id)

    def _bring_back(self, worker: WorkerProcess | RemoteWorker, now: float) -> None:
        worker_id = worker.spec.worker_id
        view = self._state.workers[worker_id]
        due = self._restart_at.get(worker_id)
        if due is not None:
            if now >= due and self._host.settled(worker_id):
                del self._restart_at[worker_id]
                view.incarnation += 1
                logger.info("starting %s anew (restart %d)", worker.name, view.incarnation)
                self._host.restart(worker_id)
            return
        try:
            if not self._cluster.poll_ready(worker):
                return
        except WorkerStartError as error:
            self._lose(worker, f"could not be started anew: {error}")
            return
        self._expect(worker, now)
        view.state, view.reason = READY, ""
        view.pids = worker.pids
        view.kv_capacity = worker.info["max_total_num_tokens"]
        logger.info("%s is back", worker.name)
        self._host.take_in(worker)
