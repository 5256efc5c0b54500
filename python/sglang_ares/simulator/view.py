"""What the policies see of the simulated decode workers: the columns the controller would build."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any, overload

import numpy as np

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.decode_pool import DecodePool
from sglang_ares.simulator.migrations import Migrations
from sglang_ares.simulator.prediction import Predictor
from sglang_ares.simulator.request_log import RequestLog
from sglang_ares.srt.policy.snapshot import (
    MEDIAN,
    Floats,
    Ints,
    RequestTable,
    Snapshot,
    WorkerTable,
)
from sglang_ares.srt.policy.types import Remaining


class _Rids(Sequence[str]):
    """Names of the requests with the given numbers, made when asked for."""

    def __init__(self, requests: Ints) -> None:
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return _Rids(self._requests[index])
        return str(self._requests[index])


class _ReportedWorkers(WorkerTable):
    """Sums predictions only for a placement that reads them, when it does first: few do, and it is
    the dear part."""

    def __init__(self, sum_remaining: Callable[[], Floats], columns: Mapping[str, Any]) -> None:
        self.__dict__.update(columns)
        self.__dict__["_sum_remaining"] = sum_remaining

    @cached_property
    def remaining_tokens(self) -> Floats:
        total: Floats = self.__dict__["_sum_remaining"]()
        return total

    def take(self, rows: Ints) -> WorkerTable:
        names = (f.name for f in fields(WorkerTable) if f.name != "remaining_tokens")
        columns = {name: getattr(self, name)[rows] for name in names}
        return _ReportedWorkers(lambda: self.remaining_tokens[rows], columns)


class DecodeView:
    """The decode workers as reported; what was placed since counts as queued."""

    def __init__(
        self,
        config: SimulationConfig,
        log: RequestLog,
        pool: DecodePool,
        migrations: Migrations,
        predictor: Predictor,
    ) -> None:
        law = config.profile.decode
        count = config.decode_workers
        self._a, self._b, self._c = (
            ms * 1e-3 for ms in (law.fixed_ms, law.per_request_ms, law.per_token_ms)
        )
        self._log = log
        self._pool = pool
        self._settled = np.zeros((9, count))
        self._migrations = migrations
        self._predictor = predictor
        self._interval_s = config.report_interval_s
        self._ids = np.arange(count)
        self._capacity = np.full(count, config.profile.kv_capacity_tokens, np.int64)
        self._step_ms = np.tile((law.fixed_ms, law.per_request_ms, law.per_token_ms), (count, 1))
        # Predicted lengths of requests that do not run yet: by request, and summed by worker.
        self._expected: dict[int, float] = {}
        self._queued_remaining = np.zeros(count)
        self._table: WorkerTable | None = None
        # When the loads that a placement sees were reported.
        self.reported_s = 0.0

    def workers(self, now: float) -> WorkerTable:
        """The workers as a placement sees them."""
        if self._table is None or now >= self.reported_s + self._interval_s:
            columns, steps = self._read(now)
            self._table = _ReportedWorkers(
                lambda: self._sum_remaining(self._requests(now, steps)), columns
            )
            self.reported_s = now
        return self._table

    def report(self) -> None:
        """The workers report before their time."""
        self._table = None

    def note_dispatch(self, request: int, row: int, remaining: Remaining | None) -> None:
        """``request`` was placed on worker ``row``, which will report it later."""
        table = self._table
        if remaining is not None:
            self._expected[request] = remaining[MEDIAN]
            self._queued_remaining[row] += remaining[MEDIAN]
        if table is not None:
            table.queued[row] += 1
            table.queued_tokens[row] += self._log.prompt[request]
            if remaining is not None and "remaining_tokens" in table.__dict__:
                table.remaining_tokens[row] += remaining[MEDIAN]

    def note_first_token(self, request: int, row: int) -> None:
        """``request`` runs: what was expected of it on arrival gives way to predictions."""
        expected = self._expected.pop(request, None)
        if expected is not None:
            self._queued_remaining[row] -= expected

    def snapshot(self, now: float) -> Snapshot:
        """Workers and running requests as they are now."""
        columns, steps = self._read(now)
        requests = self._requests(now, steps)
        sums = self._sum_remaining(requests)
        return Snapshot(WorkerTable(**columns, remaining_tokens=sums), requests)

    def resident_tokens(self, now: float) -> Ints:
        """``(W,)`` tokens of the running requests."""
        columns = self._columns()
        tokens = columns[2] + columns[3] * self._steps_done(columns, now)
        return tokens.astype(np.int64)

    def _columns(self) -> Floats:
        """``(9, W)``: clock, steps, tokens, running, promised, coming, waiting tokens, waiting
        requests, steps due. Brought up to date where a worker has changed."""
        changed, workers = self._pool.changed, self._pool.workers
        if changed:
            which = list(changed)
            rows = [
                (
                    w.clock,
                    w.steps,
                    w.tokens,
                    len(w.running),
                    w.promised,
                    w.coming,
                    w.waiting_tokens,
                    len(w.waiting),
                    w.due,
                )
                for w in map(workers.__getitem__, which)
            ]
            self._settled[:, which] = np.array(rows, np.float64).T
            changed.clear()
        return self._settled

    def _steps_done(self, columns: Floats, now: float) -> Floats:
        """``(W,)`` whole steps done by ``now`` since each worker's settled boundary."""
        clock, _, tokens, n = columns[:4]
        wait = np.maximum(now - clock, 0.0)
        growth = self._c * n
        half = self._a + self._b * n + self._c * tokens - growth / 2
        done: Floats = np.floor(2 * wait / (half + np.sqrt(half * half + 2 * growth * wait)))
        return np.minimum(done, columns[8])

    def _read(self, now: float) -> tuple[dict[str, Any], Ints]:
        """The columns of the workers but for predictions, and their ``(W,)`` steps by now."""
        columns = self._columns()
        done = self._steps_done(columns, now)
        _, steps, tokens, n, promised, coming, waiting_tokens, waiting, _ = columns
        kv_tokens = (tokens + n * done + promised).astype(np.int64)
        # What is on the move counts where it goes, as in the controller.
        for migration in self._migrations.under_way.values():
            kv_tokens[migration.source] -= migration.resident
        table = {
            "worker_id": self._ids,
            "kv_tokens": kv_tokens,
            "kv_capacity": self._capacity,
            "running": n.astype(np.int64),
            "queued": (coming + waiting).astype(np.int64),
            "queued_tokens": waiting_tokens.astype(np.int64),
            "step_ms": self._step_ms,
        }
        return table, (steps + done).astype(np.int64)

    def _requests(self, now: float, steps: Ints) -> RequestTable:
        log = self._log
        numbers: list[int] = []
        last: list[int] = []
        for worker in self._pool.workers:
            numbers.extend(worker.running)
            last.extend(worker.running.values())
        requests = np.array(numbers, np.int64)
        counts = [len(w.running) for w in self._pool.workers]
        row = np.repeat(self._ids, counts)
        to_come = np.maximum(0, np.array(last, np.int64) - steps[row])
        output = log.wanted_column[requests] - to_come
        moving = self._migrations.under_way
        movable = np.ones(len(requests), np.bool_)
        if moving:
            movable = ~np.isin(requests, np.fromiter(moving, np.int64, len(moving)))
        return RequestTable(
            rids=_Rids(requests),
            worker=row,
            tokens=log.prompt_column[requests] + output,
            output_tokens=output,
            remaining=self._predictor.remaining(requests, output, to_come),
            since_move_s=now - log.moved_s[requests],
            movable=movable,
        )

    def _sum_remaining(self, requests: RequestTable) -> Floats:
        """``(W,)`` predicted tokens to come on each worker, queued requests included."""
        median = np.nan_to_num(requests.remaining[:, MEDIAN])
        running = np.bincount(requests.worker, weights=median, minlength=len(self._ids))
        return running + self._queued_remaining
