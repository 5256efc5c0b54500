"""Rescheduling policies: which running requests move where. One per file."""

from __future__ import annotations

from sglang_ares.srt.policy.rescheduling import none, reactive

__all__ = ["none", "reactive"]
