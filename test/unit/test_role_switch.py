"""A worker changes its role by an order that names it, and by no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from sglang_ares.srt.managers.io_struct import ChangeRole
from sglang_ares.srt.managers.role_switch import RoleSwitch
from sglang_ares.srt.policy.types import DECODE, PREFILL
from sglang_ares.srt.security.dropped import DroppedFrames

ME, START = 3, 2


@pytest.fixture
def dropped() -> DroppedFrames:
    return DroppedFrames("worker-3")


@pytest.fixture
def switch(dropped: DroppedFrames) -> RoleSwitch:
    agent = SimpleNamespace(worker_id=ME, incarnation=START, role=DECODE, dropped=dropped)
    return RoleSwitch(cast(Any, SimpleNamespace(ares=agent)), patience_s=5.0)


def order(worker_id: int, incarnation: int) -> ChangeRole:
    return ChangeRole(change_id=1, worker_id=worker_id, incarnation=incarnation, role=PREFILL)


def test_an_order_that_names_the_worker_is_taken(
    switch: RoleSwitch, dropped: DroppedFrames
) -> None:
    switch.order(order(ME, START), now=0.0)
    assert switch.waiting and dropped.total == 0


@pytest.mark.parametrize(("worker_id", "incarnation"), [(ME + 1, START), (ME, START - 1)])
def test_an_order_for_another_worker_or_an_earlier_start_is_dropped(
    switch: RoleSwitch, dropped: DroppedFrames, worker_id: int, incarnation: int
) -> None:
    switch.order(order(worker_id, incarnation), now=0.0)
    assert not switch.waiting and dropped.total == 1
