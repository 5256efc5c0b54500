"""The prefill workers: placement among them, their steps, the KV that leaves them."""

from __future__ import annotations

import numpy as np

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.events import JOIN, STEP, EventQueue
from sglang_ares.simulator.prefill_worker import PrefillWorker
from sglang_ares.simulator.request_log import RequestLog
from sglang_ares.srt.policy.registry import PLACEMENT
from sglang_ares.srt.policy.snapshot import WorkerTable
from sglang_ares.srt.policy.types import NewRequest


class PrefillPool:
    """All prefill workers. Each sends KV to decode workers over one link, one after another."""

    def __init__(self, config: SimulationConfig, log: RequestLog, events: EventQueue) -> None:
        profile = config.profile
        count = config.prefill_workers
        self._log = log
        self._events = events
        self._place = PLACEMENT.get(config.prefill_placement)
        self._workers = [
            PrefillWorker(profile.prefill, profile.chunked_prefill_tokens) for _ in range(count)
        ]
        self._seconds_per_token = 1 / profile.link_tokens_per_s
        self._transfer_fixed_s = profile.transfer_fixed_ms * 1e-3
        self._link_free_s = [0.0] * count
        self._sequence = 0
        # Kept up to date in place: prefill workers hold nothing but their queue.
        self._table = WorkerTable(
            worker_id=np.arange(count),
            kv_tokens=np.zeros(count, np.int64),
            kv_capacity=np.full(count, profile.kv_capacity_tokens, np.int64),
            running=np.zeros(count, np.int64),
            queued=np.zeros(count, np.int64),
            queued_tokens=np.zeros(count, np.int64),
            remaining_tokens=np.zeros(count),
            step_ms=np.zeros((count, 3)),
        )

    def add(self, request: int) -> None:
        """``request`` needs KV for all its tokens but the last."""
        tokens = self._log.resident(request) - 1
        table = self._table
        row = self._place(NewRequest(prompt_tokens=tokens, sequence=self._sequence), table)
        self._sequence += 1
        worker = self._workers[row]
        worker.add(request, tokens)
        table.queued[row] += 1
        table.queued_tokens[row] += tokens
        if not worker.busy:
            self._begin_step(row)

    def end_step(self, row: int) -> None:
        """A step of worker ``row`` ends: KV goes out, the next step starts."""
        worker, log, now = self._workers[row], self._log, self._events.now
        done = worker.end_step()
        for request in done:
            log.prefilled_s[request] = now
            tokens = log.resident(request) - 1
            sent_s = max(now, self._link_free_s[row]) + tokens * self._seconds_per_token
            self._link_free_s[row] = sent_s
            self._events.push(sent_s + self._transfer_fixed_s, JOIN, request, log.worker[request])
        table = self._table
        table.queued[row] = len(worker.queue)
        table.queued_tokens[row] = worker.queued_tokens
        if worker.queue:
            self._begin_step(row)

    def _begin_step(self, row: int) -> None:
        self._events.push(self._events.now + self._workers[row].begin_step(), STEP, row)
