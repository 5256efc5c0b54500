"""What a worker's server arguments are made from the operator's."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_ares.engine import default_server_args
from sglang_ares.srt.managers.cluster import worker_server_args
from sglang_ares.srt.policy.types import DECODE, PREFILL


def operator(**given: Any) -> ServerArgs:
    return ServerArgs(**{**default_server_args(), **given})


@pytest.mark.parametrize(
    "role,given,ares,expected",
    [
        (DECODE, {}, True, True),
        (DECODE, {}, False, False),
        (DECODE, {"disable_radix_cache": True}, True, False),
        (DECODE, {"disaggregation_decode_enable_radix_cache": True}, False, True),
        (PREFILL, {}, True, False),
    ],
)
def test_decode_workers_keep_a_radix_cache_unless_it_is_turned_off(
    role: str, given: dict[str, Any], ares: bool, expected: bool
) -> None:
    args = worker_server_args(operator(**given), role, 1, (20_001, 20_003), ares)
    assert args.disaggregation_decode_enable_radix_cache is expected


def test_a_worker_has_its_role_and_its_bootstrap_port() -> None:
    args = worker_server_args(operator(), DECODE, 2, (20_002, 20_004))
    assert (args.disaggregation_mode, args.disaggregation_bootstrap_port) == ("decode", 20_002)
