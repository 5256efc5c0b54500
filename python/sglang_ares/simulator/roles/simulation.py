"""The event loop of a cluster whose workers change their roles."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop

import msgspec
import numpy as np

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.events import DECODE, HANDOVER, JOIN, PREFILL, SAMPLE, EventQueue
from sglang_ares.simulator.migrations import Migrations
from sglang_ares.simulator.request_log import RequestLog
from sglang_ares.simulator.result import Result
from sglang_ares.simulator.roles.changes import RoleChanges
from sglang_ares.simulator.roles.config import COLOCATED, STATIC
from sglang_ares.simulator.roles.instances import InstanceView
from sglang_ares.simulator.roles.pool import AGAIN, CHANGED, COMPUTED, FOLLOW, PASS, ElasticPool
from sglang_ares.srt.policy.elastic.arrow import flipped
from sglang_ares.srt.policy.elastic.decisions import (
    REQUEST_SCHEDULING,
    ROLES,
    FlipMemory,
    Moment,
)
from sglang_ares.srt.policy.elastic.forecast import ArrivalForecast
from sglang_ares.srt.policy.elastic.instances import Slo
from sglang_ares.srt.policy.snapshot import Ints

_SAMPLES = 300
_PROGRESS_EVERY = 1000


class RolesSimulation:
    """One cluster of ``prefill_workers + decode_workers`` workers, the first of them prefilling at
    the start, serving one stream until every request has ended. Both SLOs must be set.

    ``give_up_below``: end as soon as fewer than this share of the requests can meet both SLOs; the
    result then counts those that have not ended as misses.
    """

    def __init__(
        self, config: SimulationConfig, stream: RequestStream, *, give_up_below: float = 0.0
    ) -> None:
        assert config.roles is not None
        self._config = config
        self._stream = stream
        self._settings = settings = config.roles
        total = replace(config, decode_workers=config.prefill_workers + config.decode_workers)
        self._log = log = RequestLog(stream, record_stays=config.record_stays)
        self._events = events = EventQueue()
        self._pool = pool = ElasticPool(total, log, events)
        self._migrations = Migrations(total, log, events, pool)
        self._roles = roles = RoleChanges(config, log, events, pool, self._migrations)
        roles.to_prefill, roles.to_decode = self._to_prefill, self._to_decode
        pool.on_gone = self._migrations.cancel
        self._slo = Slo(ttft_ms=config.ttft_slo_ms, tpot_ms=config.tpot_slo_ms)
        self._view = InstanceView(total, self._slo, pool)
        self._forecast = ArrivalForecast()
        pool.on_finished = self._forecast.finished
        if give_up_below:
            pool.on_first_token, pool.on_gone = self._judge_first, self._judge_gone
        self._misses_left = int((1 - give_up_below) * len(stream))
        self._late: set[int] = set()
        self._colocated = settings.policy == COLOCATED
        self._plan = None if settings.policy in (STATIC, COLOCATED) else ROLES.get(settings.policy)
        self._scheduling = REQUEST_SCHEDULING.get(settings.scheduling_name)
        self._rules = msgspec.structs.replace(settings.rules, cost=config.limits.cost)
        self._memory = FlipMemory()
        self._arrived: list[int] = []
        self._placed = [0, 0]
        self._passes = 0
        self._sample_s: list[float] = []
        self._samples: list[Ints] = []
        last = float(stream.arrival_s[-1]) if len(stream) else 0.0
        self._sample_interval_s = config.sample_interval_s or max(last / _SAMPLES, 1e-3)

    def run(self, progress: Callable[[int], None] | None = None) -> Result:
        """Simulate; the same result for the same arguments, but for the time taken."""
        started, cpu_started = time.perf_counter(), time.process_time()
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._loop(progress)
        finally:
            if collecting:
                gc.enable()
        return self._result(time.perf_counter() - started, time.process_time() - cpu_started)

    def _loop(self, progress: Callable[[int], None] | None) -> None:
        events, log, pool = self._events, self._log, self._pool
        heap, arrivals = events.heap, log.arrival_s
        count, arrived = len(arrivals), 0
        events.push(self._settings.pass_s, PASS)
        events.push(0.0, SAMPLE)
        handlers: dict[int, Callable[[int, int], None]] = {
            DECODE: pool.on_due,
            JOIN: pool.join,
            PREFILL: lambda request, _: pool.send(request),
            HANDOVER: self._migrations.hand_over,
            COMPUTED: self._computed,
            AGAIN: lambda request, _: self._to_prefill(request),
            PASS: self._pass,
            FOLLOW: self._roles.follow,
            CHANGED: self._roles.changed,
            SAMPLE: self._sample,
        }
        while True:
            if arrived < count and (not heap or arrivals[arrived] <= heap[0][0]):
                events.now = arrivals[arrived]
                self._arrive(arrived)
                arrived += 1
                if progress is not None and (arrived % _PROGRESS_EVERY == 0 or arrived == count):
                    progress(arrived)
                continue
            if not log.unfinished or not heap or self._misses_left < 0:
                return
            events.now, _, kind, x, y = heappop(heap)
            handlers[kind](x, y)

    # --- requests ---------------------------------------------------------------------------

    def _arrive(self, request: int) -> None:
        log = self._log
        if log.prompt[request] + log.wanted[request] > self._config.profile.kv_capacity_tokens:
            log.rejected.append(request)
            log.unfinished -= 1
            return
        self._arrived.append(log.prompt[request])
        self._to_prefill(request)

    def _computed(self, request: int, row: int) -> None:
        if self._pool.computed(request, row):
            if self._colocated:
                self._pool.decode_at(request, row)
            else:
                self._to_decode(request)

    def _moment(self, rows: Ints | None, sequence: int = 0) -> Moment:
        now = self._events.now
        return Moment(
            instances=self._view.table(now, self._roles.decodes, rows),
            slo=self._slo,
            rules=self._rules,
            memory=self._memory,
            demand=self._forecast.demand,
            now=now,
            sequence=sequence,
        )

    def _serving(self) -> Ints | None:
        """Rows that may be given work; None for all."""
        return np.flatnonzero(self._roles.serves) if self._roles.under_way else None

    def _to_prefill(self, request: int) -> None:
        """Choose where the prompt of ``request`` is computed."""
        tokens = self._log.resident(request) - 1
        rows = self._serving()
        moment = self._moment(rows, self._placed[0])
        self._placed[0] += 1
        if self._colocated:
            table = moment.instances
            work = table.prefill_ms / self._slo.ttft_ms
            work = work + table.decode_tokens / np.maximum(1, table.max_tokens)
            self._pool.enqueue(request, int(work.argmin()))
            return
        chosen = self._scheduling.prefill(self._config.profile.prefill.ms(tokens), moment)
        row = chosen.row if rows is None else int(rows[chosen.row])
        if chosen.flip:
            reason = "no prefill worker meets the TTFT SLO"
            if not self._flip(row, False, "prefill", reason) or not self._roles.serves[row]:
                row = self._soonest()
        self._pool.enqueue(request, row)

    def _soonest(self) -> int:
        """The prefill worker that will be done first."""
        rows = self._roles.serving(decodes=False)
        workers = self._pool.elastic
        return int(min(rows.tolist(), key=lambda r: (workers[r].queued_ms, r)))

    def _to_decode(self, request: int) -> None:
        """Choose where a computed ``request`` decodes."""
        rows = self._serving()
        moment = self._moment(rows, self._placed[1])
        self._placed[1] += 1
        source = self._pool.source[request]
        at = source
        if rows is not None:
            at = int(np.searchsorted(rows, source))
            if not self._roles.serves[source]:
                # Its worker takes no work now: it is told of one that prefills, in its place.
                at = int(moment.instances.pool(decodes=False)[0])
        chosen = self._scheduling.decode(self._log.resident(request), at, moment)
        row = chosen.row if rows is None else int(rows[chosen.row])
        if chosen.flip:
            reason = "no decode worker meets the TPOT SLO"
            if not self._flip(row, True, "decode", reason) or not self._roles.serves[row]:
                row = self._emptiest()
        self._pool.decode_at(request, row)

    def _emptiest(self) -> int:
        rows = self._roles.serving(decodes=True)
        workers = self._pool.elastic
        return int(min(rows.tolist(), key=lambda r: (workers[r].tokens + workers[r].promised, r)))

    def _judge_first(self, request: int) -> None:
        log = self._log
        if 1e3 * (self._events.now - log.arrival_s[request]) > self._slo.ttft_ms:
            self._late.add(request)
            self._misses_left -= 1

    def _judge_gone(self, request: int) -> None:
        self._migrations.cancel(request)
        log = self._log
        intervals = log.wanted[request] - 1
        if request in self._late or not intervals or math.isnan(log.finished_s[request]):
            return
        span_ms = 1e3 * (log.finished_s[request] - log.first_token_s[request])
        if span_ms / intervals > self._slo.tpot_ms:
            self._misses_left -= 1

    # --- roles ------------------------------------------------------------------------------

    def _flip(self, row: int, to_decode: bool, cause: str, reason: str) -> bool:
        if not self._roles.flip(row, to_decode=to_decode, cause=cause, reason=reason):
            return False
        self._memory = flipped(self._memory, self._events.now, to_decode=to_decode)
        return True

    def _pass(self, _x: int, _y: int) -> None:
        """Observe what has arrived, and plan."""
        settings, prompts = self._settings, self._arrived
        law = self._config.profile.prefill
        self._forecast.observe(
            settings.pass_s, len(prompts), sum(prompts), sum(map(law.ms, prompts))
        )
        self._arrived = []
        self._events.push(self._events.now + settings.pass_s, PASS)
        if self._plan is None:
            return
        self._passes += 1
        moment = self._moment(None)
        tokens = float(moment.instances.decode_tokens.sum())
        self._forecast.observe_resident(settings.pass_s, tokens)
        flip, memory = self._plan(replace(moment, demand=self._forecast.demand))
        if flip is not None and not self._flip(flip.row, flip.to_decode, "plan", flip.reason):
            memory = msgspec.structs.replace(self._memory, held_passes=0)
        self._memory = memory

    def _sample(self, _x: int, _y: int) -> None:
        now = self._events.now
        table = self._view.table(now, self._roles.decodes)
        self._sample_s.append(now)
        self._samples.append(table.kv_tokens)
        self._roles.sample()
        self._events.push(now + self._sample_interval_s, SAMPLE)

    def _result(self, wall_s: float, cpu_s: float) -> Result:
        log, stream, migrations = self._log, self._stream, self._migrations
        workers = np.array(log.worker, np.int64)
        workers[log.rejected] = -1
        flips = self._roles.history.flips
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
            sample_tokens=np.array(self._samples, np.int64).reshape(len(self._samples), -1),
            counters={
                "rounds": self._passes,
                "migrations": migrations.completed,
                "migrations_refused": migrations.refused,
                "migrations_cancelled": migrations.cancelled,
                "moved_tokens": migrations.moved_tokens,
                "retractions": self._pool.retractions,
                "flips": len(flips),
            },
            wall_s=wall_s,
            cpu_s=cpu_s,
            stays=tuple(log.stays) if log.stays is not None else None,
            roles=self._roles.history,
        )
