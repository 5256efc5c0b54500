"""What a worker's server arguments are made from the operator's."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs

from sglang_ares.engine import default_server_args
from sglang_ares.srt.managers.cluster import why_roles_are_fixed, worker_server_args
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
        (PREFILL, {}, True, True),
        (PREFILL, {}, False, False),
        (PREFILL, {"ep_size": 2}, True, False),
    ],
)
def test_decode_workers_keep_a_radix_cache_unless_it_is_turned_off(
    role: str, given: dict[str, Any], ares: bool, expected: bool
) -> None:
    args = worker_server_args(operator(**given), role, 1, "127.0.0.1", (20_001, 20_003), ares)
    assert args.disaggregation_decode_enable_radix_cache is expected


def test_workers_can_change_their_role_unless_something_fixes_it() -> None:
    for role in (PREFILL, DECODE):
        args = worker_server_args(operator(), role, 1, "127.0.0.1", (20_001, 20_003))
        assert args.enable_pd_role_switch and args.disaggregation_decode_extra_slots == 0
        args = worker_server_args(
            operator(max_running_requests=8), role, 1, "127.0.0.1", (20_001, 20_003)
        )
        assert args.disaggregation_decode_extra_slots == 16
    fixed = worker_server_args(operator(ep_size=2), PREFILL, 1, "127.0.0.1", (20_001, 20_003))
    assert not fixed.enable_pd_role_switch and fixed.disaggregation_decode_extra_slots is None
    assert "--ep-size" in (why_roles_are_fixed(operator(ep_size=2), decode_radix_cache=True) or "")
    cacheless = why_roles_are_fixed(operator(), decode_radix_cache=False)
    assert cacheless is not None and "--ares-decode-radix-cache" in cacheless
    plain = operator(disable_radix_cache=True)
    assert why_roles_are_fixed(plain, decode_radix_cache=False) is None


def test_a_worker_has_its_role_and_its_bootstrap_port() -> None:
    args = worker_server_args(operator(), DECODE, 2, "10.0.0.5", (20_002, 20_004))
    assert (args.disaggregation_mode, args.disaggregation_bootstrap_port) == ("decode", 20_002)
    assert args.host == "10.0.0.5"
