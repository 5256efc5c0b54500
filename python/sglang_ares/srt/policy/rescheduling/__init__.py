"""Rescheduling policies: which running requests move where. One per file."""

from __future__ import annotations

from sglang_ares.srt.policy.rescheduling import ares, none, oracle, reactive, star

__all__ = ["ares", "none", "oracle", "reactive", "star"]
