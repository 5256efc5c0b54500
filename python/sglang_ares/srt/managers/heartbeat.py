"""A worker's heartbeat: a thread that says "not stopped" until the process is.

A step may take longer than the time after which a silent worker counts as dead, so the
scheduler's loop cannot be the one to speak. A loop that hangs for minutes is upstream's
watchdog's business (``--watchdog-timeout``): it ends the process, which is noticed at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence

import zmq

from sglang_ares.srt.managers.io_struct import Heartbeat, encode
from sglang_ares.srt.managers.lease import end_when_expired
from sglang_ares.srt.managers.worker_spec import WorkerSpec
from sglang_ares.srt.security.sockets import LossWatch, connected_socket

logger = logging.getLogger(__name__)


def start_heartbeat(
    spec: WorkerSpec, rank: int, lifelines: Sequence[LossWatch] = ()
) -> threading.Thread:
    """Start the thread of one tensor-parallel rank. It ends the process when the worker's lease is
    over, or one of the ``lifelines`` was lost: what was sent there may be lost, too."""
    thread = threading.Thread(
        target=_beat, args=(spec, rank, lifelines), name="ares-heartbeat", daemon=True
    )
    thread.start()
    return thread


def _beat(spec: WorkerSpec, rank: int, lifelines: Sequence[LossWatch]) -> None:
    frame = encode(Heartbeat(worker_id=spec.worker_id, incarnation=spec.incarnation, rank=rank))
    socket = connected_socket(
        zmq.Context.instance(), zmq.PUSH, spec.controller_endpoint, keys=spec.curve_keys
    )
    while True:
        with contextlib.suppress(zmq.Again):
            socket.send(frame, flags=zmq.NOBLOCK)
        end_when_expired(spec.lease)
        if any(watch.lost for watch in lifelines):
            logger.error("the worker has lost its connection to the front's host, and ends")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(spec.heartbeat_interval_s)
