"""What the elastic policies see of the simulated workers: the columns the controller builds."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.roles.pool import ElasticPool
from sglang_ares.srt.policy.elastic.instances import InstanceTable, Slo
from sglang_ares.srt.policy.snapshot import Bools, Floats, Ints
from sglang_ares.srt.policy.types import StepTime

# What is read of each worker: clock, tokens and number of running requests, steps until its batch
# changes, length of the next step (s), tokens and number of requests that are promised or wait,
# tokens held by prompts, tokens and milliseconds of prompts not computed.
_READ = 10


class InstanceView:
    """Reads the workers, as of now. Rows of changed workers are read anew, the others go on as
    their laws say."""

    def __init__(self, config: SimulationConfig, slo: Slo, pool: ElasticPool) -> None:
        count = config.decode_workers
        self._law = config.profile.decode
        self._slo = slo
        self._pool = pool
        self._ids = np.arange(count)
        self._capacity = np.full(count, config.profile.kv_capacity_tokens, np.int64)
        self._settled = np.zeros((_READ, count))

    def table(self, now: float, decodes: Bools, rows: Ints | None = None) -> InstanceTable:
        """The workers with these labels; only those of ``rows``, if given. Valid until something
        changes."""
        changed, workers = self._pool.changed, self._pool.elastic
        for row in changed:
            w = workers[row]
            self._settled[:, row] = (
                w.clock,
                w.tokens,
                len(w.running),
                w.due,
                w.step_s(),
                w.promised - w.held + w.waiting_tokens,
                w.coming - w.prompts + len(w.waiting),
                w.held - w.waiting_tokens,
                w.queued_tokens,
                w.queued_ms,
            )
        changed.clear()
        ids, capacity, settled = self._ids, self._capacity, self._settled
        if rows is not None:
            ids, capacity, settled, decodes = (
                ids[rows],
                capacity[rows],
                settled[:, rows],
                decodes[rows],
            )
        return _SimulatedInstances(now, self._law, self._slo, ids, capacity, decodes, settled)


class _SimulatedInstances(InstanceTable):
    """Computes a column when a policy reads it; most read few."""

    def __init__(
        self,
        now: float,
        law: StepTime,
        slo: Slo,
        ids: Ints,
        capacity: Ints,
        decodes: Bools,
        settled: Floats,
    ) -> None:
        self.__dict__.update(
            worker_id=ids,
            decodes=decodes,
            kv_capacity=capacity,
            prefill_ms=settled[9],
            _now=now,
            _law=law,
            _slo=slo,
            _settled=settled,
        )

    @cached_property
    def _grown(self) -> Floats:
        """``(N,)`` tokens that the running requests have by now."""
        clock, tokens, n, due, step = self.__dict__["_settled"][:5]
        wait = np.maximum(self.__dict__["_now"] - clock, 0.0)
        grown: Floats = tokens + n * np.minimum(np.floor(wait / np.maximum(step, 1e-9)), due)
        return grown

    @cached_property
    def prefill_tokens(self) -> Ints:
        return np.asarray(self.__dict__["_settled"][8].astype(np.int64))

    @cached_property
    def decode_tokens(self) -> Ints:
        return np.asarray((self._grown + self.__dict__["_settled"][5]).astype(np.int64))

    @cached_property
    def decode_requests(self) -> Ints:
        settled = self.__dict__["_settled"]
        return np.asarray((settled[2] + settled[6]).astype(np.int64))

    @cached_property
    def kv_tokens(self) -> Ints:
        settled = self.__dict__["_settled"]
        return np.asarray((self._grown + settled[5] + settled[7]).astype(np.int64))

    @cached_property
    def max_tokens(self) -> Ints:
        """As :func:`sglang_ares.srt.policy.elastic.instances.max_tokens`, of all workers."""
        law, capacity = self.__dict__["_law"], self.kv_capacity
        room_ms = (
            self.__dict__["_slo"].tpot_ms - law.fixed_ms - law.per_request_ms * self.decode_requests
        )
        if law.per_token_ms <= 0:
            return np.where(room_ms >= 0, capacity, 0)
        most = np.minimum(capacity, np.maximum(0.0, room_ms / law.per_token_ms))
        return np.asarray(most.astype(np.int64))

    @cached_property
    def token_ms(self) -> Floats:
        """The length of the step that a worker is in; of one that has no memory for the next step,
        how long it has stood still."""
        clock, tokens, n, due, step = self.__dict__["_settled"][:5]
        growth_ms = self.__dict__["_law"].per_token_ms * (self._grown - tokens)
        still_ms = 1e3 * (self.__dict__["_now"] - clock)
        ms = np.where(due == 0, still_ms, 1e3 * step + growth_ms)
        return np.where(n > 0, ms, 0.0)
