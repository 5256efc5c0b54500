"""What CPU workers fork from: a process that has imported SGLang once.

Nothing heavy is imported here, so that a process can start the server before its own imports.
"""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

_PRELOAD: Final = ["sglang_ares.srt.managers.preload"]


def process_context(device: str) -> BaseContext:
    """How to start workers. On a CPU they fork from a server that has imported SGLang once;
    with an accelerator each starts afresh, as upstream does."""
    if device != "cpu":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def begin_imports(device: str) -> None:
    """Start the server, if workers will fork from one; it imports while the caller goes on."""
    if device == "cpu":
        process_context(device)
        forkserver.ensure_running()
