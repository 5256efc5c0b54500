"""The CPU platform: where it takes effect, and what it fills in for the operator."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from sglang.srt.server_args import ServerArgs

from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.launch_server import parse_args
from sglang_ares.srt.platforms import cpu

NIXL_PARAMS = "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS"


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without one, whatever this machine has."""
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("xpu", "npu", "musa", "hpu"):
        if hasattr(torch, name):
            monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)


# --- where ----------------------------------------------------------------------------------


def test_it_is_chosen_without_an_accelerator() -> None:
    assert cpu.activate() == "sglang_ares.srt.platforms.cpu.AresCpuPlatform"


def test_upstreams_cpu_engine_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert cpu.activate() is None
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "0")
    assert cpu.activate() is not None


def test_it_declines_beside_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu.accelerator_present()
    assert cpu.activate() is None


def test_it_declines_on_apple_silicon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cpu.activate() is None


@pytest.mark.parametrize("name", ["xpu", "npu", "musa", "hpu"])
@pytest.mark.parametrize("available", [True, False])
def test_it_declines_beside_other_accelerators(
    name: str, available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(is_available=lambda: available)
    monkeypatch.setattr(torch, name, device, raising=False)
    assert cpu.accelerator_present() is available
    assert (cpu.activate() is None) is available


def test_the_entry_point_names_this_function() -> None:
    from importlib.metadata import entry_points

    (entry,) = [e for e in entry_points(group="sglang.srt.platforms") if e.name == "ares_cpu"]
    assert entry.load() is cpu.activate


def test_the_platform_is_upstreams_kind_of_platform() -> None:
    from sglang.srt.platforms.interface import SRTPlatform

    platform = cpu.AresCpuPlatform
    assert issubclass(platform, SRTPlatform)
    assert f"{platform.__module__}.{platform.__qualname__}" == cpu.activate()
    assert cpu.AresCpuPlatform is platform, "one class, however often it is looked up"


def test_other_names_are_unknown() -> None:
    with pytest.raises(AttributeError, match="NoSuchThing"):
        cpu.NoSuchThing  # noqa: B018


# --- what is filled in ----------------------------------------------------------------------


def parsed(*argv: str) -> ServerArgs:
    """The server arguments of a command line, nothing derived yet."""
    return parse_args(list(argv))[0]


def test_untouched_fields_are_filled_in() -> None:
    args = parsed()
    assert {name: getattr(args, name) for name in cpu.CPU_DEFAULTS} == cpu.CPU_DEFAULTS


def test_nothing_is_filled_in_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args, upstream = parsed(), ServerArgs(model_path="m")
    for name in cpu.CPU_DEFAULTS:
        assert getattr(args, name) == getattr(upstream, name), name
    assert args.disaggregation_transfer_backend == "nixl"


CHOSEN: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "attention_backend": "flashinfer",
    "sampling_backend": "flashinfer",
    "mem_fraction_static": 0.25,
    "max_total_tokens": 1234,
    "disaggregation_transfer_backend": "mooncake",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_operators_choice_stays(name: str) -> None:
    args = parsed(f"--{name.replace('_', '-')}", str(CHOSEN[name]))
    assert getattr(args, name) == CHOSEN[name]
    others = {n: v for n, v in cpu.CPU_DEFAULTS.items() if n != name}
    assert {n: getattr(args, n) for n in others} == others


def test_the_operators_choice_stays_where_it_is_upstreams_default() -> None:
    """Given is given: also the value that upstream would have taken by itself."""
    assert parsed("--dtype", "auto").dtype == "auto"


def test_nothing_else_is_touched() -> None:
    args = msgspec.structs.asdict(parsed())
    upstream = msgspec.structs.asdict(ServerArgs(model_path=str(MODEL_DIR)))
    changed = {name for name in args if args[name] != upstream[name]}
    assert changed <= set(cpu.CPU_DEFAULTS) | {"disaggregation_transfer_backend"}


def test_every_default_differs_from_upstreams() -> None:
    """Or its row would say nothing."""
    args = ServerArgs(model_path="m")
    for name, value in cpu.CPU_DEFAULTS.items():
        assert getattr(args, name) != value, name


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, {"num_threads": "0"}),
        ('{"device_list": "eth0"}', {"num_threads": "0", "device_list": "eth0"}),
        ('{"num_threads": "4"}', {"num_threads": "4"}),
    ],
)
def test_nixl_senders_get_no_threads_unless_the_operator_wants_them(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: dict[str, str]
) -> None:
    monkeypatch.setenv(NIXL_PARAMS, chosen or "")  # so that what is written below is undone
    if chosen is None:
        monkeypatch.delenv(NIXL_PARAMS)
    cpu._no_transfer_threads()
    assert json.loads(os.environ[NIXL_PARAMS]) == expected


@pytest.mark.parametrize("wrong", ["{", "[1]", "8"])
def test_what_upstream_refuses_reaches_it_unchanged(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(NIXL_PARAMS, wrong)
    cpu._no_transfer_threads()
    assert os.environ[NIXL_PARAMS] == wrong
