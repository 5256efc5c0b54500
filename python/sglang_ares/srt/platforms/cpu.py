"""An SGLang platform for machines without an accelerator: plain PyTorch, KV in host memory.

Upstream finds it through the entry point group ``sglang.srt.platforms``; :func:`activate`
declines wherever an accelerator is present. Upstream's own CPU mode
(``SGLANG_USE_CPU_ENGINE=1``) needs kernels built from source and takes precedence when set.
"""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch

logger = logging.getLogger(__name__)

CPU_MAX_TOTAL_TOKENS = 65_536
NIXL_PROGRESS_DELAY_US = 1000

# What a CPU worker needs of upstream's server arguments, where the operator says nothing.
CPU_DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "disable_cuda_graph": True,
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    # Upstream takes memory that other processes use for the model's, and workers that start
    # together take it from each other; the pool's size is set by max_total_tokens anyway.
    "mem_fraction_static": 0.9,
    "max_total_tokens": CPU_MAX_TOTAL_TOKENS,
    # A copy sends each page in one piece per layer; with pages of one token, requests that decode
    # together would lie in memory token by token in turn.
    "page_size": 16,
    "disable_overlap_schedule": True,
    "sleep_on_idle": True,
    "disaggregation_decode_retraction_backup": "cpu_tensor",
}


def activate() -> str | None:
    """Entry point: the platform class's path, or None where an accelerator is present."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or accelerator_present():
        return None
    return f"{__name__}.AresCpuPlatform"


def give_cores_to_ranks(tp_size: int) -> None:
    """Name the cores of each tensor-parallel rank of a worker, unless the operator has.

    Upstream wants a NUMA node per rank otherwise. Without upstream's own CPU kernels the names
    bind nothing; all workers share the cores.
    """
    if tp_size == 1:
        return
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::tp_size] or [cores[rank % len(cores)]] for rank in range(tp_size)]
    named = "|".join(",".join(map(str, share)) for share in shares)
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", named)


def transfer_over_interface_of(address: str) -> None:
    """Have KV transfers use the network interface with this address, unless the operator has named
    another. UCX would take any, one that other hosts cannot reach among them; it uses neither
    bridges nor needs help with loopback."""
    if ipaddress.ip_address(address).is_loopback:
        return
    for name, addresses in psutil.net_if_addrs().items():
        is_bridge = Path(f"/sys/class/net/{name}/bridge").exists()
        if not is_bridge and any(a.address.split("%")[0] == address for a in addresses):
            os.environ.setdefault("UCX_NET_DEVICES", name)


def accelerator_present() -> bool:
    """Whether torch sees a CUDA, ROCm, XPU, NPU, MUSA, HPU or MPS device."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return True
    return any(
        getattr(torch, name, None) is not None and getattr(torch, name).is_available()
        for name in ("xpu", "npu", "musa", "hpu")
    )


class _HostEvent:
    """What upstream asks of a CUDA event, for a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True


def _run_in_order() -> None:
    """Upstream's prefill loop records CUDA events by name; on a CPU nothing is asynchronous."""
    torch.cuda.Event = _HostEvent
    torch.cuda.current_stream = lambda *args, **kwargs: None


def _register_kv_as_dram() -> None:
    """Upstream registers the KV pool with NIXL as device memory; here it is host memory."""
    if importlib.util.find_spec("nixl") is None:
        return
    from nixl._api import nixl_agent

    def as_dram(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, descs: Any, mem_type: str | None = None, *rest: Any, **kw: Any) -> Any:
            kw.pop("mem_kind", None)
            return method(self, descs, "DRAM" if mem_type == "VRAM" else mem_type, *rest, **kw)

        call.__ares_dram__ = True  # type: ignore[attr-defined]
        return call

    for name in ("register_memory", "get_xfer_descs", "get_reg_descs"):
        method = getattr(nixl_agent, name)
        if not getattr(method, "__ares_dram__", False):
            setattr(nixl_agent, name, as_dram(method))


def _calm_progress_threads() -> None:
    """NIXL's progress threads poll without a pause, which suits a host with a core for each.
    Here they share few cores with the model: let them look once in a while."""
    if importlib.util.find_spec("nixl") is None:
        return
    bindings = importlib.import_module("nixl._api").nixlBind
    if getattr(bindings.nixlAgentConfig, "__ares_calm__", False):
        return

    class CalmAgentConfig(bindings.nixlAgentConfig):  # type: ignore[name-defined]
        """The agent's configuration, whose delay (µs) is ours."""

        __ares_calm__ = True

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, NIXL_PROGRESS_DELAY_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = CalmAgentConfig


def _no_transfer_threads() -> None:
    """Upstream gives a sender's NIXL agent eight threads with a connection each. Between moves,
    which are few, nobody reads the connections that these open among themselves, and UCX then has
    the progress thread poll without a pause: half a core and more, after a few moves under load."""
    name = "SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS"
    try:
        chosen = json.loads(os.environ.get(name, "{}"))
    except ValueError:
        return  # upstream says what is wrong
    if isinstance(chosen, dict):
        os.environ[name] = json.dumps({"num_threads": "0", **chosen})


def _platform_class() -> type:
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class AresCpuPlatform(CpuDeviceMixin, SRTPlatform):
        """Plain CPU: torch_native attention, no graphs, gloo collectives."""

        _enum: ClassVar[Any] = PlatformEnum.OOT

        def __init__(self) -> None:
            _run_in_order()
            _register_kv_as_dram()
            _calm_progress_threads()
            _no_transfer_threads()

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def is_pin_memory_available(self, device: Any = None) -> bool:
            return False

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            from sglang_ares.srt.platforms.paged_allocator import CpuPagedAllocator

            return CpuPagedAllocator

    AresCpuPlatform.__module__ = __name__
    AresCpuPlatform.__qualname__ = "AresCpuPlatform"
    return AresCpuPlatform


def __getattr__(name: str) -> Any:
    """Build the platform class on first use: upstream imports this module while its own
    platform package is still loading."""
    if name == "AresCpuPlatform":
        cls = _platform_class()
        setattr(sys.modules[__name__], name, cls)
        return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
