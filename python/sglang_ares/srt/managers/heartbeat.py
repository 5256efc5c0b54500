"""A worker's heartbeat: a thread that says "not stopped" until the process is.

A step may take longer than the time after which a silent worker counts as dead, so the
scheduler's loop cannot be the one to speak. A loop that hangs for minutes is upstream's
watchdog's business (``--watchdog-timeout``): it ends the process, which is noticed at once.
"""

from __future__ import annotations

import contextlib
import threading
import time

import zmq

from sglang_ares.srt.managers.io_struct import Heartbeat, encode
from sglang_ares.srt.managers.worker_spec import WorkerSpec
from sglang_ares.srt.security.sockets import connected_socket


def start_heartbeat(spec: WorkerSpec, rank: int) -> threading.Thread:
    """Start the thread of one tensor-parallel rank."""
    thread = threading.Thread(target=_beat, args=(spec, rank), name="ares-heartbeat", daemon=True)
    thread.start()
    return thread


def _beat(spec: WorkerSpec, rank: int) -> None:
    frame = encode(Heartbeat(worker_id=spec.worker_id, incarnation=spec.incarnation, rank=rank))
    socket = connected_socket(
        zmq.Context.instance(), zmq.PUSH, spec.controller_endpoint, keys=spec.curve_keys
    )
    while True:
        with contextlib.suppress(zmq.Again):
            socket.send(frame, flags=zmq.NOBLOCK)
        time.sleep(spec.heartbeat_interval_s)
