"""The decode workers: admission, joining, ends, retraction."""

from __future__ import annotations

from collections.abc import Callable

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.decode_worker import IDLE, DecodeWorker
from sglang_ares.simulator.events import DECODE, PREFILL, EventQueue
from sglang_ares.simulator.request_log import FINISHED, RETRACTED, RequestLog, Stay


class DecodePool:
    """All decode workers, by number.

    Whoever changes a worker *touches* it first (it goes to a step boundary, ended requests leave)
    and *arms* it after (admission, retraction, its next event). ``on_gone`` is called with each
    request that ends or is retracted, ``on_finished`` with each that has ended.
    """

    def __init__(self, config: SimulationConfig, log: RequestLog, events: EventQueue) -> None:
        profile = config.profile
        self._log = log
        self._events = events
        self.workers = [
            DecodeWorker(
                profile.decode,
                capacity=profile.kv_capacity_tokens,
                max_running=profile.max_running,
                reserved=config.reserved_tokens,
                gaps=log.longest_gap_s,
            )
            for _ in range(config.decode_workers)
        ]
        self.retractions = 0
        # Workers that were changed since whoever reads this last cleared it.
        self.changed = set(range(config.decode_workers))
        # When the running requests came; for the record of stays only.
        self._since: dict[int, float] = {}
        self.on_gone: Callable[[int], None] = lambda request: None
        self.on_finished: Callable[[int], None] = lambda request: None

    def touch(self, row: int) -> DecodeWorker:
        """Bring worker ``row`` to the first step boundary that is not in the past."""
        worker = self.workers[row]
        worker.settle(self._events.now)
        while (request := worker.ended()) is not None:
            self._finish(row, request)
        return worker

    def arm(self, row: int) -> None:
        """Let in who waits and fits, retract what the next step has no memory for, and schedule
        the worker's next event."""
        worker = self.workers[row]
        if worker.waiting:
            self._admit(worker)
        while len(worker.running) > 1 and worker.short_of_memory():
            self._retract(row)
        self.changed.add(row)
        worker.version += 1
        due_s = worker.schedule()
        if due_s < IDLE:
            self._events.push(due_s, DECODE, row, worker.version)

    def on_due(self, row: int, version: int) -> None:
        """The batch of worker ``row`` changes by itself, unless something came first."""
        worker = self.workers[row]
        if version != worker.version:
            return
        worker.advance(worker.due)
        while (request := worker.ended()) is not None:
            self._finish(row, request)
        self.arm(row)

    def dispatch(self, request: int, row: int) -> bool:
        """A new request for worker ``row``: true if it has memory for it (its prefill may start);
        otherwise it waits there."""
        worker, log = self.workers[row], self._log
        log.worker[request] = row
        self.changed.add(row)
        resident = log.resident(request)
        if not worker.waiting:
            if worker.has_room(resident, worker.due):
                worker.promise(resident)
                return True
            self.touch(row)
            fits = worker.has_room(resident)
            if fits:
                worker.promise(resident)
            self.arm(row)
            if fits:
                return True
        worker.waiting.append(request)
        worker.waiting_tokens += resident
        return False

    def join(self, request: int, row: int) -> None:
        """The KV of ``request`` has arrived at worker ``row``, which promised room for it. The
        first time, the token that prefill computed goes to the client now."""
        worker, log = self.touch(row), self._log
        resident = log.resident(request)
        worker.release(resident)
        if log.output[request] == 0:
            log.output[request] = 1
            log.first_token_s[request] = worker.clock
            log.left_s[request] = worker.clock
        remaining = log.wanted[request] - log.output[request]
        if remaining:
            worker.take(request, resident, remaining, worker.clock - log.left_s[request])
            if log.stays is not None:
                self._since[request] = worker.clock
        else:
            self._end(request, worker.clock)
        self.arm(row)

    def resident(self, row: int, request: int) -> int:
        """Tokens of a running request at the settled boundary of worker ``row``."""
        worker, log = self.workers[row], self._log
        to_come = worker.running[request] - worker.steps
        return log.prompt[request] + log.wanted[request] - to_come

    def leave(self, row: int, request: int, why: str) -> float:
        """``request`` leaves the settled worker ``row``; when that is."""
        worker, log = self.workers[row], self._log
        resident = self.resident(row, request)
        log.output[request] = resident - log.prompt[request]
        if log.stays is not None:
            log.stays.append(Stay(request, row, self._since.pop(request), worker.clock, why))
        worker.leave(request, resident)
        log.left_s[request] = worker.clock
        return worker.clock

    def _finish(self, row: int, request: int) -> None:
        left_s = self.leave(row, request, FINISHED)
        self._end(request, left_s)

    def _end(self, request: int, time_s: float) -> None:
        log = self._log
        log.finished_s[request] = time_s
        log.unfinished -= 1
        self.on_gone(request)
        self.on_finished(request)

    def _admit(self, worker: DecodeWorker) -> None:
        """Promise memory to waiting requests, in order, as far as it goes."""
        log = self._log
        while worker.waiting:
            request = worker.waiting[0]
            resident = log.resident(request)
            if not worker.has_room(resident):
                return
            worker.waiting.popleft()
            worker.waiting_tokens -= resident
            worker.promise(resident)
            self._events.push(max(self._events.now, worker.clock), PREFILL, request)

    def _retract(self, row: int) -> None:
        """Throw out, as upstream does, the request with the least output, of these the one with
        the longest prompt; it waits in front and is computed anew."""
        worker, log = self.workers[row], self._log
        running = worker.running
        request = min(
            running, key=lambda r: (log.wanted[r] - running[r] + worker.steps, -log.prompt[r], r)
        )
        self.leave(row, request, RETRACTED)
        log.retractions[request] += 1
        self.retractions += 1
        worker.waiting.appendleft(request)
        worker.waiting_tokens += log.resident(request)
        self.on_gone(request)
