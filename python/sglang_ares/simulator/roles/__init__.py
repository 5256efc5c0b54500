"""Simulation of workers that change between prefill and decode: every worker can do both."""

from __future__ import annotations

from sglang_ares.simulator.roles.config import COLOCATED, RolesConfig

__all__ = ["COLOCATED", "RolesConfig"]
