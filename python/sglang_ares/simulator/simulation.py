"""The event loop: arrivals, and what follows from them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from heapq import heappop

import msgspec
import numpy as np

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.decode_pool import DecodePool
from sglang_ares.simulator.events import (
    ADMIT,
    DECODE,
    HANDOVER,
    JOIN,
    PREFILL,
    ROUND,
    STEP,
    EventQueue,
)
from sglang_ares.simulator.events import SAMPLE as SAMPLE_EVENT
from sglang_ares.simulator.held_requests import HeldRequests
from sglang_ares.simulator.migrations import Migrations
from sglang_ares.simulator.prediction import predictor_of
from sglang_ares.simulator.prefill_pool import PrefillPool
from sglang_ares.simulator.request_log import RequestLog
from sglang_ares.simulator.result import Result
from sglang_ares.simulator.verdict import Verdict
from sglang_ares.simulator.view import DecodeView
from sglang_ares.srt.policy.admission import SLO
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING
from sglang_ares.srt.policy.snapshot import Ints, WorkerTable
from sglang_ares.srt.policy.types import NewRequest

# Called with the number of requests that have ended, a hundred times or so.
Progress = Callable[[int], None]
_PROGRESS_CALLS = 100
# Samples of the load unless the configuration says how often.
_SAMPLES = 300


class Simulation:
    """One cluster serving one stream, from empty until every request has ended."""

    def __init__(self, config: SimulationConfig, stream: RequestStream) -> None:
        self._config = config
        self._stream = stream
        self._log = log = RequestLog(stream, record_stays=config.record_stays)
        self._events = events = EventQueue()
        self._predictor = predictor_of(
            config.prediction, error=config.error, scale=config.error_scale, seed=config.seed
        )
        self._prefill = PrefillPool(config, log, events)
        self._decode = DecodePool(config, log, events)
        self._migrations = Migrations(config, log, events, self._decode)
        self._decode.on_gone = self._migrations.cancel
        self._decode.on_finished = self._finished
        self._verdict: Verdict | None = None
        self._progress: Progress | None = None
        self._progress_every = max(1, len(stream) // _PROGRESS_CALLS)
        self._view = DecodeView(config, log, self._decode, self._migrations, self._predictor)
        self._place = PLACEMENT.get(config.placement)
        self._held = (
            HeldRequests(config, events, self._view, self._bind)
            if config.admission == SLO
            else None
        )
        self._plan = RESCHEDULING.get(config.rescheduling)
        self._limits = config.limits
        self._rounds = 0
        self._sample_s: list[float] = []
        self._samples: list[Ints] = []
        last = float(stream.arrival_s[-1]) if len(stream) else 0.0
        self._sample_interval_s = config.sample_interval_s or max(last / _SAMPLES, 1e-3)

    def run(self, progress: Progress | None = None, verdict: Verdict | None = None) -> Result:
        """Simulate; the same result for the same arguments, but for the time taken. With a
        ``verdict`` only until it is decided: what has not happened by then is NaN."""
        self._verdict, self._progress = verdict, progress
        started, cpu_started = time.perf_counter(), time.process_time()
        # Nothing here is cyclic, and there are millions of small objects to look at.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._loop()
        finally:
            if collecting:
                gc.enable()
        return self._result(time.perf_counter() - started, time.process_time() - cpu_started)

    def _loop(self) -> None:
        config, events, log = self._config, self._events, self._log
        heap, arrivals = events.heap, log.arrival_s
        count, arrived = len(arrivals), 0
        verdict = self._verdict
        if config.rescheduling != "none":
            events.push(config.reschedule_interval_s, ROUND)
        events.push(0.0, SAMPLE_EVENT)
        decode, prefill, migrations, view = (
            self._decode,
            self._prefill,
            self._migrations,
            self._view,
        )
        while True:
            if arrived < count and (not heap or arrivals[arrived] <= heap[0][0]):
                events.now = arrivals[arrived]
                self._arrive(arrived)
                arrived += 1
                continue
            if not log.unfinished or not heap or (verdict is not None and verdict.decided):
                break
            now, _, kind, x, y = heappop(heap)
            events.now = now
            if kind == DECODE:
                decode.on_due(x, y)
            elif kind == JOIN:
                view.note_first_token(x, y)
                decode.join(x, y)
            elif kind == STEP:
                prefill.end_step(x)
            elif kind == PREFILL:
                prefill.add(x)
            elif kind == HANDOVER:
                migrations.hand_over(x, y)
            elif kind == ROUND:
                self._round(now)
                events.push(now + config.reschedule_interval_s, ROUND)
            elif kind == ADMIT:
                assert self._held is not None
                self._held.on_reports()
            else:
                self._sample_s.append(now)
                self._samples.append(view.resident_tokens(now))
                events.push(now + self._sample_interval_s, SAMPLE_EVENT)

    def _arrive(self, request: int) -> None:
        """Place a new request, or reject one that could never end."""
        log = self._log
        prompt, output = log.prompt[request], log.wanted[request]
        if prompt + output > self._config.profile.kv_capacity_tokens:
            log.rejected.append(request)
            log.unfinished -= 1
            if self._verdict is not None:
                self._verdict.rejected(log.arrival_s[request])
            self._report()
            return
        remaining = self._predictor.at_arrival(output)
        new = NewRequest(prompt_tokens=prompt, sequence=request, remaining=remaining)
        if self._held is not None:
            self._held.arrive(new)
        else:
            self._bind(new, self._view.workers(self._events.now))

    def _bind(self, new: NewRequest, workers: WorkerTable) -> None:
        """Place a request on one of ``workers``; it is prefilled once there is memory for it."""
        request = new.sequence
        row = int(workers.worker_id[self._place(new, workers)])
        self._view.note_dispatch(request, row, new.remaining)
        if self._decode.dispatch(request, row):
            self._prefill.add(request)

    def _finished(self, request: int) -> None:
        """A request has all its tokens."""
        self._predictor.observe(self._log.wanted[request])
        if self._held is not None:
            self._held.on_end()
        if self._verdict is not None:
            self._verdict.ended(request, self._log)
        self._report()

    def _report(self) -> None:
        """Tell who watches how many requests have ended."""
        unfinished = self._log.unfinished
        if self._progress is not None and unfinished % self._progress_every == 0:
            self._progress(len(self._log) - unfinished)

    def _round(self, now: float) -> None:
        """Let the policy plan, and begin what it planned."""
        self._rounds += 1
        limits = self._limits
        if self._held is not None and self._held.kept is not None:
            limits = msgspec.structs.replace(limits, closed=frozenset({self._held.kept}))
        for move in self._plan(self._view.snapshot(now), limits):
            self._migrations.start(move)

    def _result(self, wall_s: float, cpu_s: float) -> Result:
        log, stream, migrations = self._log, self._stream, self._migrations
        workers = np.array(log.worker, np.int64)
        workers[log.rejected] = -1
        return Result(
            config=self._config,
            workload=f"{stream.name}: {stream.origin}",
            arrival_s=stream.arrival_s,
            prompt_tokens=stream.prompt_tokens,
            output_tokens=stream.output_tokens,
            prefilled_s=np.array(log.prefilled_s),
            first_token_s=np.array(log.first_token_s),
            finished_s=np.array(log.finished_s),
            longest_gap_s=np.array(log.longest_gap_s),
            retractions=np.array(log.retractions, np.int64),
            moves=np.array(log.moves, np.int64),
            worker=workers,
            sample_s=np.array(self._sample_s),
            sample_tokens=np.array(self._samples, np.int64).reshape(
                len(self._samples), self._config.decode_workers
            ),
            counters={
                "rounds": self._rounds,
                "migrations": migrations.completed,
                "migrations_refused": migrations.refused,
                "migrations_cancelled": migrations.cancelled,
                "moved_tokens": migrations.moved_tokens,
                "retractions": self._decode.retractions,
            },
            wall_s=wall_s,
            cpu_s=cpu_s,
            stays=tuple(log.stays) if log.stays is not None else None,
        )
