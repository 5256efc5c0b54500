"""The processes of a server: on a CPU they fork from one that has imported SGLang; signals to all
of them are the front's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_ares.srt.managers.fork_server import begin_imports_of_command, has_begun, in_environment

# A process, its child and its grandchild say who their parent is and what their environment says.
FAMILY = """
import json, os, sys
from sglang_ares.srt.managers import fork_server

def say(generation):
    said = {"pid": os.getpid(), "ppid": os.getppid(), "MARK": os.environ.get("MARK"),
            "GONE": os.environ.get("GONE")}
    print(json.dumps(said), flush=True)
    if generation < 2:
        fork_server.begin_imports("cpu")
        os.environ["MARK"] = f"of generation {generation}"
        os.environ.pop("GONE", None)
        process = fork_server.process_context("cpu").Process(
            target=fork_server.in_environment, args=(dict(os.environ), say, generation + 1))
        process.start()
        process.join()
        sys.exit(process.exitcode)

if __name__ == "__main__":
    fork_server._PRELOAD.clear()
    fork_server.begin_imports("cpu")
    assert fork_server.has_begun()
    say(0)
"""

# A front with two processes; one of them leaves signals to it, the other only once it is gone.
FRONT = """
import multiprocessing as mp, signal, time
import sglang.srt.utils
from sglang_ares.srt.managers.worker_process import leave_signals_to_the_front

def follow(late):
    if late:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mp.parent_process().join()
    leave_signals_to_the_front()
    print("outlives it" if late else "follows", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("the front decides", flush=True))
    for late in (False, True):
        mp.get_context("fork").Process(target=follow, args=(late,)).start()
    time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> list[dict[str, Any]]:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        env={**os.environ, "GONE": "soon"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_who_was_forked_has_others_forked_from_the_same_process(
    family: list[dict[str, Any]],
) -> None:
    first, second, third = family
    assert second["ppid"] not in (first["pid"], first["ppid"])
    assert third["ppid"] == second["ppid"]


def test_each_has_the_environment_of_whom_it_was_forked_for(family: list[dict[str, Any]]) -> None:
    assert [p["MARK"] for p in family] == [None, "of generation 0", "of generation 1"]
    assert [p["GONE"] for p in family] == ["soon", None, None]


INTERRUPTED = """
import os, signal, time
from multiprocessing import forkserver
from sglang_ares.srt.managers import fork_server

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork_server._PRELOAD[:] = ["slow_to_import"]
    fork_server.begin_imports("cpu")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGINT)
    time.sleep(0.3)
    os.kill(server, signal.SIGINT)
    process = fork_server.process_context("cpu").Process(target=print, args=("forked",))
    process.start()
    process.join(20)
    assert forkserver._forkserver._forkserver_pid == server
"""


def test_ctrl_c_while_it_imports_does_not_end_it(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(1)")
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("forked\n", 0), done.stderr


def test_an_environment_is_taken_over_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setenv("DROPPED", "yes")
    wanted = {k: v for k, v in os.environ.items() if k != "DROPPED"} | {"NEW": "1"}
    before = dict(os.environ)
    seen: list[dict[str, str]] = []
    try:
        in_environment(wanted, lambda: seen.append(dict(os.environ)))
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert seen == [wanted]


def test_help_starts_nothing() -> None:
    begin_imports_of_command(["--help"])
    assert not has_begun()


def test_a_build_for_gpus_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.13.0")
    begin_imports_of_command([])
    assert not has_begun()


def test_sigterm_to_all_processes_is_the_fronts_and_its_death_ends_them_all(
    tmp_path: Path,
) -> None:
    script = tmp_path / "front.py"
    script.write_text(FRONT)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, process_group=0
    ) as front:
        assert front.stdout is not None
        try:
            assert front.stdout.readline() == "follows\n"
            os.killpg(front.pid, signal.SIGTERM)
            assert front.stdout.readline() == "the front decides\n"
            with pytest.raises(subprocess.TimeoutExpired):
                front.communicate(timeout=0.5)
            front.kill()
            # The end of the output: nobody is left who could write any.
            assert front.communicate(timeout=100) == ("", None)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(front.pid, signal.SIGKILL)
