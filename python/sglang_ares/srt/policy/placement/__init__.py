"""Placement policies: which worker takes a new request. One per file."""

from __future__ import annotations

from sglang_ares.srt.policy.placement import (
    least_requests,
    least_tokens,
    power_of_two,
    predicted_load,
    round_robin,
)

__all__ = ["least_requests", "least_tokens", "power_of_two", "predicted_load", "round_robin"]
