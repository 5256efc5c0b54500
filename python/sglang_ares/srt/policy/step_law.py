"""The workers' step-time laws as a policy needs them: filled in where nothing is known yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_ares.srt.policy.snapshot import Floats, WorkerTable
from sglang_ares.srt.policy.types import StepTime

# Where no worker's law is known: a step over the mean load takes this long (ms), all of it by
# tokens. So loads are compared by tokens.
_UNKNOWN_MS = 20.0


def mean_law(laws: Sequence[StepTime]) -> StepTime | None:
    """The mean of what some workers have found; None without any."""
    if not laws:
        return None
    return StepTime(
        fixed_ms=sum(law.fixed_ms for law in laws) / len(laws),
        per_request_ms=sum(law.per_request_ms for law in laws) / len(laws),
        per_token_ms=sum(law.per_token_ms for law in laws) / len(laws),
    )


def step_laws(workers: WorkerTable) -> Floats:
    """``(W, 3)``: ``fixed_ms, per_request_ms, per_token_ms`` of every worker; those that do not
    know theirs get the mean of the others."""
    known = workers.step_ms.any(axis=1)
    if known.all():
        return workers.step_ms
    laws = workers.step_ms.copy()
    if known.any():
        laws[~known] = laws[known].mean(axis=0)
    else:
        laws[:] = 0.0, 0.0, _UNKNOWN_MS / max(1.0, float(workers.load_tokens.mean()))
    return laws


def step_times_ms(workers: WorkerTable) -> Floats:
    """``(W,)`` milliseconds that a step over all of a worker's requests takes now."""
    laws = step_laws(workers)
    requests = workers.running + workers.queued
    return np.asarray(laws[:, 0] + laws[:, 1] * requests + laws[:, 2] * workers.load_tokens)


def steps_per_s(workers: WorkerTable) -> Floats:
    """``(W,)`` decode steps per second now; of idle workers, as if at least one token was there."""
    return np.asarray(1e3 / np.maximum(step_times_ms(workers), 1e-3))
