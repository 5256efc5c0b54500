"""What a policy reads: the cluster at one moment, as columns.

A row of :class:`WorkerTable` is a worker, a row of :class:`RequestTable` a request. The controller
builds both from its workers' reports (:meth:`Snapshot.of`), the simulator from its own arrays; a
policy cannot tell which. Nobody may write into the columns a policy was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sglang_ares.srt.policy.types import LEVELS, WorkerLoad

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

MEDIAN = LEVELS.index(0.5)


@dataclass(frozen=True, eq=False)
class WorkerTable:
    """Columns of shape ``(W,)``; meanings and units as in :class:`WorkerLoad`.

    ``remaining_tokens``: sum over the worker's requests of the median predicted remaining length,
    requests without a prediction counting 0; queued requests count too. ``step_ms``, shape
    ``(W, 3)``: the step-time law (:class:`StepTime`), zeros where it is not known yet.
    """

    worker_id: Ints
    kv_tokens: Ints
    kv_capacity: Ints
    running: Ints
    queued: Ints
    queued_tokens: Ints
    remaining_tokens: Floats
    step_ms: Floats

    def __len__(self) -> int:
        return len(self.worker_id)

    @property
    def load_tokens(self) -> Ints:
        """``(W,)`` resident tokens plus those already on their way."""
        return self.kv_tokens + self.queued_tokens

    @property
    def free_tokens(self) -> Ints:
        """``(W,)`` tokens of KV memory neither held nor promised; never negative."""
        return np.maximum(0, self.kv_capacity - self.load_tokens)

    def take(self, rows: Ints) -> WorkerTable:
        """The workers of these rows, in that order."""
        return WorkerTable(**{f.name: getattr(self, f.name)[rows] for f in fields(WorkerTable)})

    @classmethod
    def of(cls, loads: Sequence[WorkerLoad]) -> WorkerTable:
        """The workers of ``loads``, in that order."""
        return cls(
            worker_id=np.array([w.worker_id for w in loads], np.int64),
            kv_tokens=np.array([w.kv_tokens for w in loads], np.int64),
            kv_capacity=np.array([w.kv_capacity for w in loads], np.int64),
            running=np.array([w.running for w in loads], np.int64),
            queued=np.array([w.queued for w in loads], np.int64),
            queued_tokens=np.array([w.queued_tokens for w in loads], np.int64),
            remaining_tokens=np.array([w.remaining_tokens for w in loads], np.float64),
            step_ms=np.array(
                [
                    (w.step.fixed_ms, w.step.per_request_ms, w.step.per_token_ms)
                    if w.step is not None
                    else (0.0, 0.0, 0.0)
                    for w in loads
                ],
                np.float64,
            ).reshape(len(loads), 3),
        )


@dataclass(frozen=True, eq=False)
class RequestTable:
    """Columns of shape ``(R,)``; meanings and units as in :class:`RequestLoad`.

    ``worker``: row of the request's worker in the :class:`WorkerTable`. ``remaining``, shape
    ``(R, len(LEVELS))``: quantiles of the tokens still to be produced, NaN where nothing is known.
    """

    rids: Sequence[str]
    worker: Ints
    tokens: Ints
    output_tokens: Ints
    remaining: Floats
    since_move_s: Floats
    movable: Bools

    def __len__(self) -> int:
        return len(self.worker)

    @classmethod
    def of(cls, loads: Sequence[WorkerLoad]) -> RequestTable:
        """The requests of ``loads``, worker by worker."""
        requests = [r for w in loads for r in w.requests]
        unknown = (np.nan,) * len(LEVELS)
        return cls(
            rids=[r.rid for r in requests],
            worker=np.repeat(np.arange(len(loads)), [len(w.requests) for w in loads]),
            tokens=np.array([r.tokens for r in requests], np.int64),
            output_tokens=np.array([r.output_tokens for r in requests], np.int64),
            remaining=np.array(
                [r.remaining if r.remaining is not None else unknown for r in requests], np.float64
            ).reshape(len(requests), len(LEVELS)),
            since_move_s=np.array([r.since_move_s for r in requests], np.float64),
            movable=np.array([r.movable for r in requests], np.bool_),
        )


@dataclass(frozen=True, eq=False)
class RowsOfWorker:
    """``rows[w]``: rows of the requests of the worker in row ``w``. ``order``: all of them, worker
    by worker; ``starts``, shape ``(W + 1,)``: where each worker's begin."""

    order: Ints
    starts: Ints

    def __getitem__(self, worker: int) -> Ints:
        return self.order[self.starts[worker] : self.starts[worker + 1]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The workers of one role and their requests."""

    workers: WorkerTable
    requests: RequestTable

    @classmethod
    def of(cls, loads: Sequence[WorkerLoad]) -> Snapshot:
        """The cluster that the reports in ``loads`` describe."""
        return cls(WorkerTable.of(loads), RequestTable.of(loads))

    def with_remaining(self, remaining: Floats) -> Snapshot:
        """The same with other predictions, shape ``(R, len(LEVELS))``."""
        requests = replace(self.requests, remaining=remaining)
        medians = np.nan_to_num(remaining[:, MEDIAN])
        sums = np.bincount(requests.worker, weights=medians, minlength=len(self.workers))
        workers = replace(self.workers, remaining_tokens=sums.astype(np.float64))
        return Snapshot(workers, requests)

    def sums_by_worker(self, values: Floats) -> Floats:
        """Sums over each worker's requests of ``values``, shape ``(R, K)``: ``(W, K)``."""
        where, count = self.requests.worker, len(self.workers)
        columns = [np.bincount(where, values[:, k], count) for k in range(values.shape[1])]
        return np.stack(columns, axis=1).astype(np.float64, copy=False)

    @cached_property
    def rows_of_worker(self) -> RowsOfWorker:
        """For every worker, the rows of its requests, in ascending order."""
        order = np.argsort(self.requests.worker, kind="stable")
        counts = np.bincount(self.requests.worker, minlength=len(self.workers))
        return RowsOfWorker(order, np.concatenate([[0], np.cumsum(counts)]))
