"""What the mover tells the rescheduling policy."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_ares.ares_args import AresArgs
from sglang_ares.simulator import SimulationConfig
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import WorkerView
from sglang_ares.srt.managers.length_predictions import LengthPredictions
from sglang_ares.srt.managers.mover import Mover
from sglang_ares.srt.policy.types import DECODE, RescheduleLimits


def limits_told(decode_workers: int, **args: Any) -> RescheduleLimits:
    workers = [WorkerView(i, DECODE, pids=[], kv_capacity=1000) for i in range(decode_workers)]
    mover = Mover(
        ClusterState(workers),
        AresArgs(**args),
        512,
        lambda *_: None,
        LengthPredictions(use_prior=True),
        now=0.0,
    )
    told: list[RescheduleLimits] = []

    def policy(cluster: Any, limits: RescheduleLimits) -> tuple[()]:
        told.append(limits)
        return ()

    mover._policy = policy
    mover.run_round()
    return told[0]


@pytest.mark.parametrize("decode_workers, moves", [(1, 2), (4, 2), (5, 2), (8, 4), (64, 32)])
def test_moves_of_a_round_grow_with_the_cluster_as_in_the_simulator(
    decode_workers: int, moves: int
) -> None:
    assert limits_told(decode_workers).max_moves == moves
    assert SimulationConfig(decode_workers=decode_workers).limits.max_moves == moves


def test_moves_of_a_round_are_as_many_as_the_operator_says() -> None:
    assert limits_told(8, max_moves=3).max_moves == 3


def test_the_promise_of_each_token_is_told() -> None:
    assert limits_told(2, tpot_slo_ms=40.0).tpot_slo_ms == 40.0
