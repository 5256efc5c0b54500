"""New weights while workers come and go: who is waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sglang.srt.managers.io_struct import (
    ActiveRanksOutput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_ares.srt.managers.tokenizer_manager import AresTokenizerManager

WORKERS = 3


class Front(AresTokenizerManager):
    """The real one, as far as weight updates go; ``sent`` is what workers would get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Any] = []
        self.elastic_worker_count = self.serving = self.workers_here = WORKERS
        self.model_update_result, self.model_update_tmp = None, []
        monkeypatch.setattr(
            TokenizerManager, "_dispatch_to_scheduler", lambda front, obj: front.sent.append(obj)
        )

    def update_control_communicator_fan_out(self, fan_out: int) -> None: ...

    def _update_model_path_info(self, model_path: str, load_format: str) -> None: ...

    def serve(self, *status: bool) -> None:
        self.update_active_ranks(ActiveRanksOutput(status=list(status)))

    def answer(self, success: bool = True) -> None:
        self._handle_update_weights_from_disk_req_output(
            UpdateWeightFromDiskReqOutput(success=success, message="loaded", num_paused_requests=0)
        )


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Front:
    return Front(monkeypatch)


async def begin(front: Front) -> asyncio.Task[Any]:
    update = UpdateWeightFromDiskReqInput(model_path="new", load_format="auto")
    task = asyncio.create_task(front._wait_for_model_update_from_disk(update))
    await asyncio.sleep(0)
    assert front.sent == [update]
    return task


async def ended(task: asyncio.Task[Any]) -> bool:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task.done()


async def test_every_worker_that_serves_is_waited_for(front: Front) -> None:
    task = await begin(front)
    for _ in range(WORKERS - 1):
        front.answer()
        assert not await ended(task)
    front.answer(success=False)
    assert await ended(task) and task.result()[0] is False


@pytest.mark.parametrize("left", [1, 2])
async def test_one_that_was_lost_before_is_not_waited_for(front: Front, left: int) -> None:
    front.serve(*[True] * left, *[False] * (WORKERS - left))
    task = await begin(front)
    for _ in range(left):
        assert not await ended(task)
        front.answer()
    assert await ended(task) and task.result()[0] is True


@pytest.mark.parametrize("answered", [0, 1, 2])
async def test_one_that_is_lost_meanwhile_is_not_waited_for(front: Front, answered: int) -> None:
    task = await begin(front)
    for _ in range(answered):
        front.answer()
    front.serve(True, True, False)
    # It starts anew, and was not asked.
    front.serve(True, True, True)
    for _ in range(WORKERS - 1 - answered):
        assert not await ended(task)
        front.answer()
    assert await ended(task) and task.result()[0] is True
