"""Rescheduling policies: which running requests move where. One per file."""

from sglang_ares.srt.policy.rescheduling import none, reactive

__all__ = ["none", "reactive"]
