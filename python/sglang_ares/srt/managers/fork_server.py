"""What a CPU server's processes fork from: one that has imported SGLang once.

Nothing heavy is imported here, so that a process can start the server before its own imports.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing as mp
import os
import signal
from multiprocessing import forkserver
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.context import BaseContext

_PRELOAD: Final = ["sglang_ares.srt.managers.preload"]


def process_context(device: str) -> BaseContext:
    """How to start workers. On a CPU they fork from a server that has imported SGLang once;
    with an accelerator each starts afresh, as upstream does."""
    if device != "cpu":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    if forkserver.get_inherited_fds() is None:
        context.set_forkserver_preload(_PRELOAD)
    else:
        # This process was forked from the server itself, which then serves it too. Python 3.11
        # documents that and starts another one nevertheless.
        forkserver._forkserver.ensure_running = _runs  # type: ignore[method-assign]
    return context


def _runs() -> None:
    """The server runs: who forked from it does not outlive it."""


def begin_imports(device: str) -> None:
    """Start the server, if workers will fork from one; it imports while the caller goes on."""
    if device == "cpu" and forkserver.get_inherited_fds() is None:
        process_context(device)
        # It ignores Ctrl-C once it has imported; a terminal's reaches it while it does, too.
        mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, mine)


def begin_imports_of_command(argv: Sequence[str]) -> None:
    """As :func:`begin_imports`, at the start of a command whose arguments are not read yet: where
    torch is a build for CPUs. Every process of the command then forks from the server."""
    if {"-h", "--help"} & {*argv} or not importlib.metadata.version("torch").endswith("+cpu"):
        return
    # Read when torch is imported: workers share few cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begin_imports("cpu")


def has_begun() -> bool:
    """Whether this process has started the server."""
    return forkserver._forkserver._forkserver_pid is not None  # type: ignore[attr-defined]


def in_environment(
    environment: Mapping[str, str], run: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    """What a process runs that may be forked from the server: that has the environment of its own
    start, not the one of whom it forks for."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    # What is equal is left where it lies: from there a process finds where its title is kept.
    os.environ.update({k: v for k, v in environment.items() if os.environ.get(k) != v})
    run(*args, **kwargs)
