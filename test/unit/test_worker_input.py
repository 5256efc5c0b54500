"""The controller never waits for a worker that is gone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq
from sglang.srt.managers.io_struct import AbortReq, sock_recv, sock_send

from sglang_ares.srt.managers.worker_input import WorkerInput


@pytest.mark.timeout(20)
def test_it_never_waits(tmp_path: Path) -> None:
    """Before a worker has connected, while it is there, and after it has died."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = f"ipc://{tmp_path}/input"
    line = WorkerInput(context, endpoint)
    sock_send(line, AbortReq(rid="nobody is there yet"))
    worker = context.socket(zmq.PULL)
    worker.connect(endpoint)
    deadline = time.monotonic() + 10
    while not worker.poll(20) and time.monotonic() < deadline:
        sock_send(line, AbortReq(rid="heard"))
    assert sock_recv(worker).rid == "heard"
    worker.close(linger=0)
    time.sleep(0.2)
    for _ in range(3):
        sock_send(line, AbortReq(rid="it has died"))
    line.close()
    context.term()
