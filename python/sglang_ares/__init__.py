"""SGLang-ARES: SGLang with decode-phase rescheduling built in.

Public surface: :class:`Engine` (the cluster, embedded) and ``__version__``. The server is
``python -m sglang_ares.launch_server``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_ares.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    """Import :class:`Engine` on first use: it pulls in torch and all of SGLang."""
    if name == "Engine":
        from sglang_ares.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
