"""What a worker's scheduler does in upstream's place, on stand-ins for the parts it works on."""

from __future__ import annotations

import sys
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares.srt.managers.scheduler import AresScheduler


def new_req(**fields: Any) -> Req:
    params = SamplingParams(max_new_tokens=50)
    params.normalize(None)
    return Req("r#00", "", array("q", [1, 2, 3]), params, **fields)


def scheduler_with(**parts: Any) -> Any:
    """A scheduler that was never constructed; a test gives it what it needs."""
    scheduler = object.__new__(AresScheduler)
    vars(scheduler).update(parts)
    return scheduler


# --- requests that do not come through upstream's queue -------------------------------------


@pytest.mark.parametrize("taken", ["for a migration", "to go on from its output"])
@pytest.mark.parametrize("low_first", [False, True])
def test_a_request_without_a_priority_has_the_least_wherever_it_is_queued(
    taken: str, low_first: bool
) -> None:
    moves = taken == "for a migration"
    scheduler = scheduler_with(
        enable_priority_scheduling=True,
        schedule_low_priority_values_first=low_first,
        _intake=SimpleNamespace(now=0.0),
        migrations=SimpleNamespace(take_built=lambda req, now: moves),
        resumed=SimpleNamespace(take_built=lambda req: True),
    )
    plain, urgent = new_req(), new_req(priority=5)
    for req in (plain, urgent):
        scheduler._add_request_to_queue(req)
    assert plain.priority == (sys.maxsize if low_first else -sys.maxsize - 1)
    assert urgent.priority == 5
    waiting = [plain, urgent]
    SchedulePolicy._sort_by_priority_and_fcfs(waiting, 1 if low_first else -1)
    assert waiting == [urgent, plain]


def test_without_priority_scheduling_a_priority_is_no_reason_to_refuse_a_moved_request() -> None:
    """Upstream would answer the client with an error, while the request decodes elsewhere."""
    scheduler = scheduler_with(
        enable_priority_scheduling=False,
        abort_on_priority_when_disabled=True,
        _intake=SimpleNamespace(now=0.0),
        migrations=SimpleNamespace(take_built=lambda req, now: True),
    )
    req = new_req(priority=5)
    scheduler._add_request_to_queue(req)
    assert req.priority == 5 and req.to_finish is None
