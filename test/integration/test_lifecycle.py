"""Starting and ending: clear errors before anything starts, no orphans afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from integration.fault_world import PROMPTS, FaultWorld, Stream, kill
from integration.servers import start_server, stop_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

# Flags -> what the error must name: the flag, and the remedy. One of each check; what a check says
# of every flag is a unit test's.
BAD_STARTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("--ares-decode-workers", "0"): ("--ares-decode-workers is 0", "at least 1"),
    ("--model-path", "/no/such/model"): ("--model-path", "/no/such/model", "does not exist"),
    ("--port", "TAKEN"): ("--port", "choose another"),
    ("--speculative-algorithm", "NGRAM"): ("--speculative-algorithm", "Drop"),
    ("--ares-control-host", "0.0.0.0"): ("--ares-control-host", "sglang_ares.keys"),
}


def test_bad_starts_name_the_flag_and_the_remedy() -> None:
    """Each ends at once with status 2 and one line, before any worker starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with ThreadPoolExecutor(4) as pool:
            runs = list(pool.map(lambda flags: launch(*flags, port=port), BAD_STARTS))
    for (flags, expected), run in zip(BAD_STARTS.items(), runs, strict=True):
        assert run.returncode == 2, (flags, run.stderr[-2000:])
        error = next(x for x in run.stderr.splitlines() if x.startswith("error: "))
        assert all(part in error for part in expected), (flags, error)


def launch(*flags: str, port: str = "") -> subprocess.CompletedProcess[str]:
    """Run the server's command line, which is expected to end by itself."""
    given = [port if f == "TAKEN" else f for f in flags]
    command = [sys.executable, "-m", "sglang_ares.launch_server", *given]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)


def test_help_shows_the_ares_flags_as_a_group() -> None:
    """``--help`` lists them apart from upstream's."""
    run = launch("--help")
    assert run.returncode == 0
    group = run.stdout.split("ARES:")[1]
    assert "--ares-decode-workers" in group and "--model-path" in run.stdout


def test_engine_leaves_no_process_behind(tmp_path: Path) -> None:
    """The embedded engine, as a script would use it: a context manager that cleans up."""
    script = tmp_path / "use_engine.py"
    script.write_text(
        textwrap.dedent(
            """
            from sglang_ares import Engine

            def main():
                with Engine(ares_decode_workers=1, ares_profile_cache="off") as engine:
                    answer = engine.generate("sort 9 3 5\\n", {"temperature": 0})
                    assert answer["meta_info"]["finish_reason"]["type"] == "stop", answer
                    workers = engine.ares_status()["workers"]
                    print("PIDS", *(pid for w in workers for pid in w["pids"]), flush=True)

            if __name__ == "__main__":
                main()
            """
        )
    )
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(x for x in run.stdout.splitlines() if x.startswith("PIDS"))
    pids = [int(p) for p in line.split()[1:]]
    assert len(pids) == 2
    # Dead, if not yet reaped: their parent died with them, and that is the init process's work.
    assert not any(runs(p) for p in pids)


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone(family: list[psutil.Process], timeout_s: float = 20) -> bool:
    """Whether all these processes end in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not [p for p in family if p.is_running() and p.status() != "zombie"]:
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize("how", ["ctrl-c", "controller killed", "fork server killed"])
def test_server_ends_with_all_its_processes(tmp_path: Path, how: str) -> None:
    """Ctrl-C, the death of the controller, and of the process that all others fork from, end every
    process of the server."""
    process, _ = start_server(tmp_path / "log", "--ares-decode-workers=1")
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4
        # They fork from one process, which has imported SGLang once.
        assert len({p.ppid() for p in family if p.name().startswith("sglang::")}) == 1
        if how == "ctrl-c":
            os.kill(process.pid, signal.SIGINT)
        else:
            controller = next(p for p in family if "data_parallel_controller" in p.name())
            victim = controller if how == "controller killed" else controller.parent()
            assert victim is not None and victim.pid != process.pid
            victim.kill()
        process.wait(90)
        assert gone(family)
    finally:
        stop_server(process)


@pytest.mark.parametrize("to", [os.kill, os.killpg], ids=["its main process", "its group"])
def test_sigterm_finishes_what_runs_and_takes_nothing_new(
    tmp_path: Path, to: Callable[[int, int], None]
) -> None:
    """A running stream ends normally; a new request gets 503; then all processes are gone."""
    process, server = start_server(tmp_path / "log", "--ares-decode-workers=1")

    async def scenario() -> Stream:
        async with FaultWorld(server).client() as client:
            stream = Stream("last-one", PROMPTS[0], max_new_tokens=1500)
            task = asyncio.create_task(stream.run(client))
            await stream.has(20)
            to(process.pid, signal.SIGTERM)
            await asyncio.sleep(0.5)
            late = await client.post("/generate", json={"text": "sort 2 1\n"}, timeout=30)
            assert late.status_code == 503, late.text
            return await task

    try:
        family = psutil.Process(process.pid).children(recursive=True)
        stream = asyncio.run(scenario())
        assert not stream.error and len(stream.output_ids) == 1500, stream
        process.wait(90)
        assert gone(family)
        assert "starting" not in server.log.read_text().split("Gracefully exiting")[-1]
    finally:
        stop_server(process)


def test_503_when_a_role_has_no_worker_left(tmp_path: Path) -> None:
    """Without restarts, the death of the only decode worker leaves nobody to serve."""
    process, server = start_server(
        tmp_path / "log", "--ares-decode-workers=1", "--ares-max-restarts=0"
    )

    async def scenario() -> None:
        async with FaultWorld(server).client() as client:
            stream = Stream("lost", PROMPTS[0], max_new_tokens=1500)
            task = asyncio.create_task(stream.run(client))
            await stream.has(20)
            victim = next(w for w in server.status()["workers"] if w["role"] == "decode")
            kill(victim, signal.SIGKILL)
            await task
            assert "no decode worker is left" in stream.error, stream
            answer = await client.post("/generate", json={"text": "sort 2 1\n"}, timeout=30)
            assert answer.status_code == 503, answer.text
            assert "no decode worker is left" in answer.text
            worker = next(w for w in server.status()["workers"] if w["role"] == "decode")
            assert worker["state"] == "failed" and "exit code -9" in worker["reason"]

    try:
        asyncio.run(scenario())
    finally:
        stop_server(process)
