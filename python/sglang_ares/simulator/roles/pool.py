"""All workers: prompts in their queues, KV on its way, batches that decode.

The order of phases is Arrow's: a prompt is queued on arrival, its first token reaches the client
when it is computed, and only then is it decided where it decodes. Until that worker has memory, its
KV stays where it was computed and takes memory there.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.decode_pool import DecodePool
from sglang_ares.simulator.decode_worker import IDLE, DecodeWorker
from sglang_ares.simulator.events import DECODE, JOIN, EventQueue
from sglang_ares.simulator.request_log import RETRACTED, RequestLog
from sglang_ares.simulator.roles.worker import ElasticWorker

# Kinds of events besides those of :mod:`sglang_ares.simulator.events`, with their two numbers.
COMPUTED = 16  # a prompt is computed: request, worker
AGAIN = 17  # a retracted request wants its prompt computed anew: request, -
PASS = 18  # roles are planned: -, -
FOLLOW = 19  # a change of role is followed: worker, id of the change
CHANGED = 20  # an emptied worker serves in its new role: worker, id of the change


class ElasticPool(DecodePool):
    """``source``: which worker holds the KV of a request that is computed and does not decode yet.
    ``waits``: of these, which wait for memory where they are to decode."""

    def __init__(self, config: SimulationConfig, log: RequestLog, events: EventQueue) -> None:
        super().__init__(config, log, events)
        assert config.roles is not None
        profile = config.profile
        self.elastic = [
            ElasticWorker(
                profile.decode,
                profile.prefill,
                chunk_tokens=profile.chunked_prefill_tokens,
                mixed_tokens=config.roles.mixed_budget(profile, config.tpot_slo_ms),
                capacity=profile.kv_capacity_tokens,
                max_running=profile.max_running,
                reserved=config.reserved_tokens,
                gaps=log.longest_gap_s,
            )
            for _ in range(config.decode_workers)
        ]
        self.workers = list[DecodeWorker](self.elastic)
        self._seconds_per_token = 1 / profile.link_tokens_per_s
        self._transfer_fixed_s = profile.transfer_fixed_ms * 1e-3
        self._link_free_s = [0.0] * config.decode_workers
        self.source: dict[int, int] = {}
        self.waits: set[int] = set()
        # A request's first token has reached the client.
        self.on_first_token: Callable[[int], None] = lambda request: None

    def touch(self, row: int) -> DecodeWorker:
        worker = super().touch(row)
        self._report_computed(row)
        return worker

    def arm(self, row: int) -> None:
        worker = self.elastic[row]
        if worker.waiting:
            self._admit(worker)
        while len(worker.running) > 1 and worker.short_of_memory():
            self._retract(row)
        worker.plan_step()
        self.changed.add(row)
        worker.version += 1
        due_s = worker.schedule()
        if due_s < IDLE:
            self._events.push(due_s, DECODE, row, worker.version)

    def on_due(self, row: int, version: int) -> None:
        worker = self.elastic[row]
        if version != worker.version:
            return
        worker.advance(worker.due)
        while (request := worker.ended()) is not None:
            self._finish(row, request)
        self._report_computed(row)
        self.arm(row)

    def _report_computed(self, row: int) -> None:
        worker = self.elastic[row]
        if worker.computed:
            # The boundary may lie ahead of the event that led to it.
            for request in worker.computed:
                self._events.push(worker.clock, COMPUTED, request, row)
            worker.computed.clear()

    def enqueue(self, request: int, row: int) -> None:
        """``request`` needs KV for all its tokens but the last, from worker ``row``."""
        self.touch(row)
        self.elastic[row].add(request, self._log.resident(request) - 1)
        self.arm(row)

    def hand_back(self, row: int) -> list[int]:
        """Take the prompts that are not begun off worker ``row``; who they are of."""
        self.touch(row)
        gone = self.elastic[row].hand_back()
        self.arm(row)
        return gone

    def computed(self, request: int, row: int) -> bool:
        """The prompt of ``request`` is computed, now, on worker ``row``: whether it is to be
        decoded somewhere. The first time, the client gets its first token."""
        log, now = self._log, self._events.now
        log.prefilled_s[request] = now
        if log.output[request] == 0:
            log.output[request] = 1
            log.first_token_s[request] = log.left_s[request] = now
            self.on_first_token(request)
        if log.output[request] < log.wanted[request]:
            self.source[request] = row
            return True
        log.worker[request] = row
        self._let_go(request, row)
        self._end(request, now)
        return False

    def decode_at(self, request: int, row: int) -> None:
        """A computed ``request`` is to decode on worker ``row``: at once where its KV is, else when
        there is memory for it and its KV has arrived."""
        source = self.source[request]
        if source != row:
            if self.dispatch(request, row):
                self.send(request)
            else:
                self.waits.add(request)
            return
        del self.source[request]
        self._log.worker[request] = row
        self.elastic[row].keep(self._log.resident(request) - 1)
        super().join(request, row)

    def recall(self, request: int) -> None:
        """A request that waits for memory on the worker it was to decode on waits no more."""
        row = self._log.worker[request]
        worker = self.workers[row]
        worker.waiting.remove(request)
        worker.waiting_tokens -= self._log.resident(request)
        self.waits.remove(request)
        self.changed.add(row)

    def send(self, request: int) -> None:
        """Memory is promised to ``request``: its KV goes out, one after another per worker."""
        now, source = self._events.now, self.source[request]
        tokens = self._log.resident(request) - 1
        sent_s = max(now, self._link_free_s[source]) + tokens * self._seconds_per_token
        self._link_free_s[source] = sent_s
        self._events.push(sent_s + self._transfer_fixed_s, JOIN, request, self._log.worker[request])

    def join(self, request: int, row: int) -> None:
        source = self.source.pop(request, None)
        if source is not None:
            self._let_go(request, source)
        super().join(request, row)

    def _let_go(self, request: int, row: int) -> None:
        self.touch(row)
        self.elastic[row].let_go(self._log.resident(request) - 1)
        self.arm(row)

    def _admit(self, worker: DecodeWorker) -> None:
        before = list(worker.waiting)
        super()._admit(worker)
        self.waits.difference_update(before[: len(before) - len(worker.waiting)])

    def _retract(self, row: int) -> None:
        """Throw out the request that upstream would; its prompt and output are computed anew, at
        the end of some queue."""
        worker, log = self.workers[row], self._log
        running = worker.running
        request = min(
            running, key=lambda r: (log.wanted[r] - running[r] + worker.steps, -log.prompt[r], r)
        )
        self.leave(row, request, RETRACTED)
        log.retractions[request] += 1
        self.retractions += 1
        self.on_gone(request)
        self._events.push(max(self._events.now, worker.clock), AGAIN, request)
