"""Elastic roles: workers that change between prefill and decode with the load.

After Arrow (arXiv 2505.11916). Pure functions: request scheduling decides where the prefill and
where the decode phase of a request run, role planning which workers change their role.
"""

from __future__ import annotations

from sglang_ares.srt.policy.elastic import ares, arrow, baselines

__all__ = ["ares", "arrow", "baselines"]
