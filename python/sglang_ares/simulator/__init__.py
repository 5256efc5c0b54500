"""Discrete-event simulation of a cluster: the controller's policies on modelled workers."""

from __future__ import annotations

from sglang_ares.simulator.config import SimulationConfig
from sglang_ares.simulator.result import Result
from sglang_ares.simulator.simulation import Simulation

__all__ = ["Result", "Simulation", "SimulationConfig"]
