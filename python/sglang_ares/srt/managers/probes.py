"""Requests of the server's own: how they are told from those of users."""

from __future__ import annotations

from typing import Final

PROBE_RID: Final = "ARES_PROBE"


def is_probe(rid: str) -> bool:
    """Whether a rid, public or internal, names a request that only measures."""
    return rid.startswith(PROBE_RID)
