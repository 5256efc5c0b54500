"""GPU kernels of SGLang-ARES, installed as ``sglang_ares_kernels``."""

from __future__ import annotations

from sglang_ares_kernels.mlp import fused_mlp
from sglang_ares_kernels.reference import reference_mlp

__all__ = ["fused_mlp", "reference_mlp"]
