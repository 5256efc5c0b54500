"""Placement policies: which worker takes a new request. One per file."""

from __future__ import annotations

from sglang_ares.srt.policy.placement import least_tokens, round_robin

__all__ = ["least_tokens", "round_robin"]
