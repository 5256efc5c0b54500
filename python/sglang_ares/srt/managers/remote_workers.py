"""Workers on other hosts, as the controller sees them.

A host asks to join (``JoinQuery``), starts one worker, and reports what becomes of it. To the
supervisor the worker is like one of this host, but for two things: it is gone for certain when
its host says so *or* when its lease is over (``managers/lease.py``), and it is not started anew
from here: its host joins again, as the same worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_ares.srt.disaggregation.migration import MigrationLimits
from sglang_ares.srt.managers.cluster_settings import difference
from sglang_ares.srt.managers.cluster_views import (
    FAILED_FOR_GOOD,
    LEFT,
    READY,
    RESTARTING,
    WorkerView,
)
from sglang_ares.srt.managers.io_struct import (
    EndWorker,
    HostBeat,
    HostLeaving,
    JoinQuery,
    Lease,
    MayLeave,
    Peer,
    WorkerEnded,
    WorkerStarted,
    encode,
)
from sglang_ares.srt.managers.lease import LeaseTimes, lease_clock
from sglang_ares.srt.managers.run_time_changes import RunTimeChanges

if TYPE_CHECKING:
    from sglang_ares.srt.managers.cluster_state import ClusterState
    from sglang_ares.srt.managers.io_struct import Message
    from sglang_ares.srt.managers.mailbox import Mailbox
    from sglang_ares.srt.managers.supervisor import Supervisor

logger = logging.getLogger(__name__)


class WorkerStartError(RuntimeError):
    """A worker did not come up; the text names it and says why as far as known."""


class Admission(msgspec.Struct, frozen=True, kw_only=True):
    """What a host is told when its worker may join: who it is, whom it talks to, and the cluster's
    configuration as far as workers need it. Durations in seconds. ``predictor``: the server's flag;
    a folder is one of the server's host."""

    worker_id: int
    incarnation: int
    controller_endpoint: str
    outputs_endpoint: str
    report_interval_s: float
    worker_timeout_s: float
    start_timeout_s: float
    limits: MigrationLimits
    decode_radix_cache: bool
    predictor: str
    predictor_correction: bool
    fault_injection: bool
    cluster_size: int


@dataclass(frozen=True)
class RemoteSpec:
    """Who the worker is, and where it can be reached once it has started."""

    worker_id: int
    role: str
    incarnation: int
    control_endpoint: str = ""
    bootstrap_host: str = ""
    bootstrap_port: int = 0


class RemoteWorker:
    """One worker of another host; ``tell`` sends to that host.

    Its life: open (its host may join) → joined → started → ended, and open again.
    """

    def __init__(
        self,
        spec: RemoteSpec,
        host_id: str,
        host: str,
        times: LeaseTimes,
        start_timeout_s: float,
        tell: Callable[[Message], None],
        clock: Callable[[], float] = lease_clock,
    ) -> None:
        self.spec = spec
        # What its host starts it as; it may change its role afterwards.
        self.first_role = spec.role
        self.host_id = host_id
        self.host = host
        self._times = times
        self._start_timeout_s = start_timeout_s
        self._tell = tell
        self._clock = clock
        self.info: dict[str, Any] = {}
        self.pids: list[int] = []
        self.leaving = False
        self.left = False
        self.open(spec.incarnation)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.spec.role} worker {self.spec.worker_id} on {self.host}"

    @property
    def ranks(self) -> int:
        """Processes that give signs of life."""
        return len(self.pids)

    @property
    def peer(self) -> Peer:
        """How the other workers reach it."""
        return Peer(
            worker_id=self.spec.worker_id,
            role=self.spec.role,
            control_endpoint=self.spec.control_endpoint,
            bootstrap_host=self.spec.bootstrap_host,
            bootstrap_port=self.spec.bootstrap_port,
        )

    # --- its life ---------------------------------------------------------------------------

    def open(self, incarnation: int) -> None:
        """Its host may join, soon, with a worker of this incarnation, in the role it was started
        in before."""
        self.spec = RemoteSpec(self.spec.worker_id, self.first_role, incarnation)
        self.accepts = True
        self.joined = self.started = self._is_cut_off = False
        self.ended: str | None = None
        self._heard_at = self._joined_at = self._clock()

    def join(self) -> None:
        """Its host was told to start it; from now on it may hold a lease."""
        self.joined = True
        self._heard_at = self._joined_at = self._clock()

    def renew(self, beat: int) -> None:
        """Its host asks for the lease."""
        if self.joined and self.ended is None and not self._expired:
            self._heard_at = self._clock()
            ids = {"worker_id": self.spec.worker_id, "incarnation": self.spec.incarnation}
            self._tell(Lease(**ids, beat=beat))

    def start(self, message: WorkerStarted) -> None:
        """It has loaded the model."""
        self.started, self.accepts = True, False
        self.pids = list(message.pids)
        self.info = {
            "max_total_num_tokens": message.kv_capacity,
            "max_req_input_len": message.max_input_tokens,
        }
        self.spec = replace(
            self.spec,
            control_endpoint=message.control_endpoint,
            bootstrap_host=message.bootstrap_host,
            bootstrap_port=message.bootstrap_port,
        )

    def end(self, reason: str, *, leaves: bool = False) -> None:
        """No process of it is left, says its host."""
        self.accepts = False
        if self.ended is None:
            self.ended = reason
        self.left = self.left or leaves

    def cut_off(self) -> None:
        """Its connection was lost, and with it perhaps a request."""
        self._is_cut_off = True

    def kill(self) -> None:
        """Have it ended; it is gone when its host has said so, or when its lease is over."""
        self.accepts = False
        if self.joined and self.ended is None:
            self._tell(EndWorker(worker_id=self.spec.worker_id, incarnation=self.spec.incarnation))

    # --- what the supervisor asks -----------------------------------------------------------

    @property
    def _expired(self) -> bool:
        return self._clock() > self._heard_at + self._times.expiry_s

    @property
    def alive(self) -> bool:
        """Whether nothing speaks against it; silence is the supervisor's business."""
        return self.ended is None and not self._is_cut_off

    @property
    def gone(self) -> bool:
        """Whether no process of it can be left."""
        return not self.joined or self.ended is not None or self._expired

    @property
    def cause_of_death(self) -> str:
        """Why it is not alive."""
        return self.ended or "lost its connection"

    @property
    def ending(self) -> tuple[str, str] | None:
        """If it is not to be expected back: its state from now on, and why."""
        if self.left:
            return LEFT, "its host has left"
        if self.ended is None and self._expired:
            return FAILED_FOR_GOOD, "its host cannot be reached; it may join again"
        return None

    def poll_ready(self) -> bool:
        """Whether it has started; :class:`WorkerStartError` if it will not."""
        if self.ended is not None:
            raise WorkerStartError(self.ended)
        if self._expired:
            raise WorkerStartError("its host cannot be reached")
        late = self._clock() > self._joined_at + self._start_timeout_s
        if self.joined and not self.started and late:
            raise WorkerStartError(
                f"{self.name} did not load its model within {self._start_timeout_s:.0f} s; "
                "raise --ares-worker-start-timeout."
            )
        return self.started


class RemoteWorkers:
    """Hosts that join, and what they report. ``workers``: the cluster's, of this host too;
    ``admission``: what every host is told, with id and incarnation to be filled in (None: nobody
    can join); ``least_input_tokens``: what the front lets through; ``enlist`` adds a worker that
    the cluster did not have yet, not ready; ``changes``: what a worker that joins would lack."""

    def __init__(
        self,
        mailbox: Mailbox,
        supervisor: Supervisor,
        state: ClusterState,
        workers: list[Any],
        settings: dict[str, str],
        admission: Admission | None,
        least_input_tokens: int,
        enlist: Callable[[RemoteWorker], None],
        clock: Callable[[], float] = lease_clock,
        changes: RunTimeChanges | None = None,
    ) -> None:
        self._changes = changes or RunTimeChanges()
        self._mailbox = mailbox
        self._supervisor = supervisor
        self._enlist = enlist
        self._clock = clock
        self._state = state
        self._workers = workers
        self._settings = settings
        self._admission = admission
        self._least_input_tokens = least_input_tokens

    def _remote(self) -> list[RemoteWorker]:
        return [w for w in self._workers if isinstance(w, RemoteWorker)]

    # --- joining ----------------------------------------------------------------------------

    def answer(self, query: JoinQuery) -> tuple[int, Any]:
        """200 with the :class:`Admission`; 503 to ask again soon; 409 with the reason."""
        if self._admission is None:
            return 409, _because(
                "the control sockets of this cluster are files; start it with "
                "--ares-control-host or --ares-control-port"
            )
        differs = difference(query.settings, self._settings)
        if differs is not None:
            logger.warning("a worker on %s was refused: %s", query.host, differs)
            return 409, _because(f"the worker must have the cluster's settings: {differs}")
        if self._changes.why_not_join is not None:
            logger.warning("%s was refused: %s", query.host, self._changes.why_not_join)
            return 409, _because(self._changes.why_not_join)
        worker = self._known(query) or self._vacant(query)
        if worker is None:
            worker = self._add(query)
        return self._admit(worker, query)

    def _known(self, query: JoinQuery) -> RemoteWorker | None:
        return next((w for w in self._remote() if w.host_id == query.host_id), None)

    def _vacant(self, query: JoinQuery) -> RemoteWorker | None:
        """The place of a worker that was given up, for another host."""
        for worker in self._remote():
            view = self._state.workers[worker.spec.worker_id]
            if (
                worker.first_role == query.role
                and view.state in (LEFT, FAILED_FOR_GOOD)
                and worker.gone
            ):
                if not self._supervisor.readmit(view.worker_id, forgive=True):
                    continue
                worker.host_id, worker.host = query.host_id, query.host
                worker.left = worker.leaving = False
                view.host, view.draining = query.host, False
                return worker
        return None

    def _add(self, query: JoinQuery) -> RemoteWorker:
        assert self._admission is not None
        worker_id = len(self._workers)
        worker = RemoteWorker(
            RemoteSpec(worker_id, query.role, 0),
            query.host_id,
            query.host,
            LeaseTimes.of(self._admission.worker_timeout_s),
            self._admission.start_timeout_s,
            lambda message: self._tell(worker_id, message),
            self._clock,
        )
        self._enlist(worker)
        return worker

    def _tell(self, worker_id: int, message: Message) -> None:
        self._mailbox.send(f"host-{worker_id}", encode(message))

    def _admit(self, worker: RemoteWorker, query: JoinQuery) -> tuple[int, Any]:
        view = self._state.workers[worker.spec.worker_id]
        if worker.first_role != query.role:
            return 409, _because(f"this host joined as a {worker.first_role} worker")
        given_up = view.state in (LEFT, FAILED_FOR_GOOD)
        if given_up and view.worker_id in self._supervisor.exhausted:
            return 409, _because(f"worker {view.worker_id} {view.reason}")
        if given_up:
            worker.left = worker.leaving = view.draining = False
            self._supervisor.readmit(view.worker_id, forgive=False)
        elif worker.started:
            worker.end("was ended by its host")
        if view.state != RESTARTING or not worker.accepts:
            return 503, _because("the cluster has not let go of the former worker yet")
        assert self._admission is not None
        self._mailbox.connect(f"host-{view.worker_id}", query.mailbox)
        worker.join()
        view.reason = f"starts on {query.host}"
        logger.info("%s may join (incarnation %d)", worker.name, view.incarnation)
        return 200, msgspec.structs.replace(
            self._admission,
            worker_id=view.worker_id,
            incarnation=view.incarnation,
            cluster_size=len(self._workers),
        )

    # --- reports ----------------------------------------------------------------------------

    def _current(self, worker_id: int, incarnation: int) -> RemoteWorker | None:
        worker = self._workers[worker_id] if worker_id < len(self._workers) else None
        if isinstance(worker, RemoteWorker) and worker.spec.incarnation == incarnation:
            return worker
        return None

    def on_message(self, message: HostBeat | WorkerStarted | WorkerEnded | HostLeaving) -> None:
        """A host reports; what it says of an earlier incarnation is of no interest."""
        worker = self._current(message.worker_id, message.incarnation)
        if worker is None or not worker.joined:
            return
        match message:
            case HostBeat():
                worker.renew(message.beat)
            case WorkerStarted() if not worker.started and worker.ended is None:
                self._take_in(worker, message)
            case WorkerEnded():
                worker.end(message.reason, leaves=message.leaves)
            case HostLeaving():
                worker.leaving = True
                self._state.workers[message.worker_id].draining = True

    def _take_in(self, worker: RemoteWorker, message: WorkerStarted) -> None:
        if message.max_input_tokens < self._least_input_tokens:
            self._release(
                worker,
                f"it takes inputs of {message.max_input_tokens} tokens at most, the cluster "
                f"{self._least_input_tokens}: give it more KV memory (--max-total-tokens, "
                "--mem-fraction-static)",
            )
        elif self._changes.why_not_join is not None:
            self._release(worker, self._changes.why_not_join)
        else:
            worker.start(message)

    def tick(self) -> None:
        """Let those go that want to and are empty; give up those whose connection was lost."""
        for peer in self._mailbox.lost():
            worker = self._workers[int(peer)]
            if isinstance(worker, RemoteWorker):
                worker.cut_off()
        for worker in self._remote():
            view = self._state.workers[worker.spec.worker_id]
            drained = view.state == READY and self._state.operating_state(view) == "drained"
            if worker.leaving and worker.ended is None and (drained or view.state != READY):
                worker.leaving = False
                self._release(worker, "it is empty")

    def server_ends(self) -> None:
        """Let all go."""
        for worker in self._remote():
            if worker.joined and worker.ended is None:
                self._release(worker, "the server ends")

    def _release(self, worker: RemoteWorker, reason: str) -> None:
        self._tell(
            worker.spec.worker_id,
            MayLeave(
                worker_id=worker.spec.worker_id,
                incarnation=worker.spec.incarnation,
                reason=reason,
            ),
        )


def view_of(worker: RemoteWorker) -> WorkerView:
    """The view of a worker that has not started yet."""
    return WorkerView(
        worker_id=worker.spec.worker_id,
        role=worker.spec.role,
        pids=[],
        kv_capacity=0,
        state=RESTARTING,
        host=worker.host,
    )


def _because(reason: str) -> dict[str, str]:
    return {"reason": reason}
