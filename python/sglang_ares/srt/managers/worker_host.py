"""The process beside a worker on another host than the controller's: it joins the cluster, starts
the worker, ends it when told or when its lease is over, and joins again with a new one.

Requests and tokens do not pass through here: the worker speaks to the cluster itself.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
import time
import uuid
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from sglang_ares.srt.managers.cluster import (
    WorkerProcess,
    worker_server_args,
)
from sglang_ares.srt.managers.cluster_settings import settings_of
from sglang_ares.srt.managers.fork_server import process_context
from sglang_ares.srt.managers.io_struct import (
    Decoder,
    EndWorker,
    HostBeat,
    HostInbound,
    HostLeaving,
    JoinQuery,
    Lease,
    MayLeave,
    Message,
    QueryReply,
    WorkerEnded,
    WorkerStarted,
    encode,
)
from sglang_ares.srt.managers.lease import LeaseTimes, is_expired, lease_clock, new_lease
from sglang_ares.srt.managers.mailbox import Mailbox
from sglang_ares.srt.managers.remote_workers import Admission, WorkerStartError
from sglang_ares.srt.managers.worker_process import nothing
from sglang_ares.srt.managers.worker_spec import WorkerSpec
from sglang_ares.srt.predictor.start import AUTO, OFF, chosen_head
from sglang_ares.srt.security.bounds import MAX_REASON_CHARS
from sglang_ares.srt.security.control_plane import free_ports, private_port_args, tcp_endpoint
from sglang_ares.srt.security.sockets import connected_socket

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_ares.srt.security.curve import CurveKeys

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
# The controller answers at once; it is asked again when it has not, or asked for patience.
_ANSWER_S = 2.0
_PATIENCE_S = 0.3
_TOLD_EVERY_S = 10.0
_POLL_MS = 200
_REAP_S = 5.0


class JoinError(RuntimeError):
    """The cluster did not take the worker in; the text says why, and what to do."""


class End(Enum):
    """Why serving ended: the worker is to join again, or this host is to leave."""

    LOST = auto()
    LEAVES = auto()


@dataclass(frozen=True)
class HostConfig:
    """``controller``: where the cluster's queries arrive (ZMQ notation). ``address``: of this
    host, as others reach it. ``port``: first of the ports used here, 0 for free ones.
    ``join_timeout_s``: how long the controller may be out of reach. ``predictor``: the head, as
    ``--ares-predictor`` names it on this host."""

    controller: str
    role: str
    address: str
    port: int
    join_timeout_s: float
    keys: CurveKeys | None
    predictor: str = AUTO


class WorkerHost:
    """Serves until it is told to leave (:meth:`leave`), or the cluster does not want it."""

    def __init__(self, server_args: ServerArgs, config: HostConfig) -> None:
        self._server_args = server_args
        self._config = config
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        # Kept: it stops when nobody refers to it any more.
        self._admission = config.keys and config.keys.admit(self._context)
        self._ports = range(config.port, config.port + 4) if config.port else free_ports(4)
        mailbox_port, *self._worker_ports = self._ports
        endpoint = tcp_endpoint(config.address, mailbox_port)
        self._mailbox = Mailbox(self._context, endpoint, keys=config.keys)
        self._inbound = Decoder(HostInbound)
        self._replies = Decoder(QueryReply)
        self._settings = settings_of(server_args)
        self._host_id = uuid.uuid4().hex
        self._ids = itertools.count(1)
        self._runtime_dir = tempfile.mkdtemp(prefix="sglang-ares-")
        self._process_context = process_context(server_args.device)
        # A lease for each worker process; one that was ended leaves its own behind.
        self._lease: Any = None
        self._leave_wishes = 0

    def leave(self) -> None:
        """Go when the worker is empty; asked twice: now."""
        self._leave_wishes += 1

    def close(self) -> None:
        """Leave nothing behind."""
        self._mailbox.close()
        self._context.destroy(linger=500)
        shutil.rmtree(self._runtime_dir, ignore_errors=True)

    def run(self) -> None:
        """Join and serve, again and again; :class:`JoinError` if the cluster refuses."""
        # The fork server imports SGLang when it is first used, longer than a lease lasts.
        first = self._process_context.Process(target=nothing)  # type: ignore[attr-defined]
        first.start()
        first.join()
        while not self._leave_wishes:
            asked_at, admission = self._join()
            if admission is None or self._serve(admission, asked_at) is End.LEAVES:
                return

    # --- joining ----------------------------------------------------------------------------

    def _join(self) -> tuple[float, Admission | None]:
        """When it was asked, and the cluster's consent (None: this host is to leave)."""
        config = self._config
        give_up_at = time.monotonic() + config.join_timeout_s
        told_at = time.monotonic()
        patience = ""
        dealer = connected_socket(self._context, zmq.DEALER, config.controller, keys=config.keys)
        try:
            while not self._leave_wishes:
                asked_at = lease_clock()
                status, document = self._ask(dealer)
                if status == 200:
                    return asked_at, msgspec.convert(document, Admission)
                if status == 409:
                    raise JoinError(document["reason"])
                if status == 503:
                    give_up_at = time.monotonic() + config.join_timeout_s
                    patience = document["reason"]
                now = time.monotonic()
                if now > give_up_at:
                    raise JoinError(
                        f"nobody answers at {config.controller} for {config.join_timeout_s:.0f} s. "
                        "Is the server running there with --ares-control-host, is --join the port "
                        "of its queries (--ares-control-port), and are --ares-curve-keys the same?"
                    )
                if now > told_at + _TOLD_EVERY_S:
                    told_at = now
                    logger.info("waiting to join: %s", patience or "no answer yet")
                time.sleep(_PATIENCE_S)
            return 0.0, None
        finally:
            dealer.close(linger=0)

    def _ask(self, dealer: Any) -> tuple[int | None, Any]:
        query_id = next(self._ids)
        query = JoinQuery(
            query_id=query_id,
            host_id=self._host_id,
            role=self._config.role,
            host=self._config.address,
            mailbox=self._mailbox.endpoint,
            settings=self._settings,
        )
        try:
            dealer.send(encode(query), flags=zmq.NOBLOCK)
        except zmq.Again:
            return None, None
        until = time.monotonic() + _ANSWER_S
        while (left := until - time.monotonic()) > 0 and not self._leave_wishes:
            if not dealer.poll(min(1e3 * left, _POLL_MS)):
                continue
            try:
                reply = self._replies.decode(dealer.recv(flags=zmq.NOBLOCK))
            except (zmq.Again, msgspec.MsgspecError):
                continue
            if reply.query_id == query_id:
                return reply.status, msgspec.json.decode(reply.body)
        return None, None

    # --- one worker -------------------------------------------------------------------------

    def _serve(self, admission: Admission, asked_at: float) -> End:
        times = LeaseTimes.of(admission.worker_timeout_s)
        self._lease = new_lease(self._process_context)
        self._lease.value = asked_at + times.lease_s
        # What an earlier controller there was not sent is not for this one.
        self._mailbox.disconnect(CONTROLLER)
        self._mailbox.connect(CONTROLLER, admission.controller_endpoint)
        worker = self._worker(admission)
        worker.spawn(admission.start_timeout_s)
        run = _Run(admission, times, worker)
        try:
            while run.end is None:
                self._step(run)
        except BaseException:
            run.reason = "failed on its host; see the log there"
            raise
        finally:
            leaves = run.end is not End.LOST or bool(self._leave_wishes)
            self._end(run, leaves=leaves)
        return End.LEAVES if leaves else End.LOST

    def _step(self, run: _Run) -> None:
        """Wait a little, and do what is due; sets ``run.end`` when the worker is to go."""
        poller = zmq.Poller()
        poller.register(self._mailbox.socket, zmq.POLLIN)
        for process in run.worker.processes:
            poller.register(process.sentinel, zmq.POLLIN)
        poller.poll(min(_POLL_MS, 1e3 * run.times.beat_s / 2))
        for frame in self._mailbox.drain():
            self._on_message(run, frame)
        if run.end is None:
            self._look_after(run)
        if run.end is None and self._leave_wishes:
            self._ask_to_leave(run)
        now = lease_clock()
        if now >= run.next_beat:
            run.next_beat = now + run.times.beat_s
            beat = run.sent(now)
            self._report(HostBeat(**run.ids, beat=beat))

    def _on_message(self, run: _Run, frame: bytes) -> None:
        try:
            message = self._inbound.decode(frame)
        except msgspec.MsgspecError as error:
            self._mailbox.dropped.count(str(error))
            return
        if (message.worker_id, message.incarnation) != (run.worker_id, run.incarnation):
            return  # to a worker that this host had earlier
        match message:
            case Lease():
                asked_at = run.asked_at(message.beat)
                if asked_at is not None:
                    self._lease.value = max(self._lease.value, asked_at + run.times.lease_s)
            case EndWorker():
                run.finish(End.LOST, "was ended on command of the controller")
            case MayLeave():
                logger.info("leaving: %s", message.reason)
                run.finish(End.LEAVES, f"left: {message.reason}")

    def _look_after(self, run: _Run) -> None:
        worker = run.worker
        if is_expired(self._lease):
            run.finish(End.LOST, "lost the controller, and with it its lease")
        elif run.started:
            if not worker.alive:
                run.finish(End.LOST, worker.cause_of_death)
        else:
            try:
                run.started = worker.poll_ready()
            except WorkerStartError as error:
                run.finish(End.LOST, f"could not be started: {error}")
                return
            if run.started:
                self._report_started(run)

    def _report_started(self, run: _Run) -> None:
        spec, info = run.worker.spec, run.worker.info
        logger.info("%s serves", run.worker.name)
        self._report(
            WorkerStarted(
                **run.ids,
                pids=run.worker.pids,
                kv_capacity=info["max_total_num_tokens"],
                max_input_tokens=info["max_req_input_len"],
                control_endpoint=spec.control_endpoint,
                bootstrap_host=spec.bootstrap_host,
                bootstrap_port=spec.bootstrap_port,
            )
        )

    def _ask_to_leave(self, run: _Run) -> None:
        if self._leave_wishes > 1 or not run.started:
            run.finish(End.LEAVES, "left at once")
        elif not run.asked_to_leave:
            run.asked_to_leave = True
            logger.info("waiting until the worker is empty; interrupt again to leave at once")
            self._report(HostLeaving(**run.ids))

    def _end(self, run: _Run, *, leaves: bool) -> None:
        """End the processes, wait until none is left, and say so."""
        run.worker.kill()
        for process in run.worker.processes:
            process.join(_REAP_S)
        logger.log(logging.INFO if leaves else logging.ERROR, "%s %s", run.worker.name, run.reason)
        if run.worker.gone:
            self._report(
                WorkerEnded(**run.ids, reason=run.reason[:MAX_REASON_CHARS], leaves=leaves)
            )

    def _report(self, message: Message) -> None:
        self._mailbox.send(CONTROLLER, encode(message))

    def _worker(self, admission: Admission) -> WorkerProcess:
        config = self._config
        bootstrap_port, nccl_port, control_port = self._ports_for(admission.incarnation)
        args = worker_server_args(
            self._server_args,
            config.role,
            0,
            config.address,
            (bootstrap_port, nccl_port),
            admission.decode_radix_cache,
        )
        endpoint = tcp_endpoint(config.address, control_port)
        port_args = private_port_args(args, self._runtime_dir)
        spec = WorkerSpec(
            worker_id=admission.worker_id,
            incarnation=admission.incarnation,
            role=config.role,
            server_args=args,
            control_endpoint=endpoint,
            control_bind=endpoint,
            curve_keys=config.keys,
            controller_endpoint=admission.controller_endpoint,
            outputs_endpoint=admission.outputs_endpoint,
            bootstrap_host=config.address,
            bootstrap_port=bootstrap_port,
            report_interval_s=admission.report_interval_s,
            heartbeat_interval_s=LeaseTimes.of(admission.worker_timeout_s).beat_s,
            limits=admission.limits,
            seeded_sampling=args.sampling_backend == "pytorch",
            cluster_size=admission.cluster_size,
            loads_instance_id=port_args.instance_id,
            fault_injection=admission.fault_injection,
            predictor=str(self._head(admission) or ""),
            record_states="",
            correct_drift=admission.predictor_correction,
            lease=self._lease,
        )
        return WorkerProcess(spec, port_args)

    def _head(self, admission: Admission) -> Path | None:
        """The head to run here; none if the server has turned predictions off."""
        if admission.predictor == OFF:
            return None
        if admission.predictor != AUTO and self._config.predictor == AUTO:
            logger.warning(
                "the server predicts output lengths with the head in %s; name the copy of it on "
                "this host with --ares-predictor, or this worker predicts other lengths, or none",
                admission.predictor,
            )
        return chosen_head(self._config.predictor, self._server_args.model_path)

    def _ports_for(self, incarnation: int) -> list[int]:
        """A worker that is started anew has new addresses, unless the operator fixed them: what
        is still on its way to the old ones must not reach it."""
        if self._config.port or incarnation == 0:
            return list(self._worker_ports)
        return free_ports(3, taken=self._ports)


class _Run:
    """One worker, from its start to its end."""

    def __init__(self, admission: Admission, times: LeaseTimes, worker: WorkerProcess) -> None:
        self.worker_id, self.incarnation = admission.worker_id, admission.incarnation
        self.times = times
        self.worker = worker
        self.started = self.asked_to_leave = False
        self.end: End | None = None
        self.reason = ""
        self.next_beat = 0.0
        self._beat = 0
        self._asked: dict[int, float] = {}

    @property
    def ids(self) -> dict[str, Any]:
        """The fields that name this run in messages."""
        return {"worker_id": self.worker_id, "incarnation": self.incarnation}

    def finish(self, end: End, reason: str) -> None:
        """The worker is to go."""
        self.end, self.reason = end, reason

    def sent(self, now: float) -> int:
        """A beat goes out; its number."""
        self._beat += 1
        self._asked[self._beat] = now
        return self._beat

    def asked_at(self, beat: int) -> float | None:
        """When an answered beat was sent; older ones are of no interest any more."""
        asked = self._asked.get(beat)
        self._asked = {b: t for b, t in self._asked.items() if b > beat}
        return asked
