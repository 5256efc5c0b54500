"""Creates or completes the CPU environment; ``make venv`` calls it with the system's Python 3.11.

Every step looks first at what is already there, so a call after an interrupted one continues
where that one stopped, and a call on a complete environment changes nothing. Nothing outside
the environment's folder is written. Standard library only.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
PUBLIC_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 6 * 2**30  # 3.6 GB installed, the rest for pip's temporary files
NEEDED_GLIBC = (2, 34)  # sglang's wheel is manylinux_2_34
STEPS = 5

CHECK = """
import torch
assert torch.version.cuda is None and torch.version.hip is None, "GPU build"
import sglang_ares
import sglang.bench_serving
import sglang.srt.managers.scheduler
import sglang_router
"""


class SetupError(Exception):
    """A step failed; the message says what was expected and what to do."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder to create")
    parser.add_argument("--torch-index", default="", help="package index that has a CPU torch")
    parser.add_argument("--stamp", type=Path, help="file to write once everything is in place")
    args = parser.parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        Setup(args.venv.absolute(), args.torch_index.strip()).run()
    except SetupError as error:
        sys.exit(f"\nThe set-up stopped: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. The next `make venv` continues from here.")
        sys.exit(130)
    if args.stamp is not None:
        for old in args.stamp.parent.glob(".ready-*"):
            old.unlink()
        args.stamp.touch()
    print(f"Environment ready in {args.venv} after {time.monotonic() - started:.0f} s.")


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


class Setup:
    """The five steps, in order."""

    def __init__(self, venv: Path, torch_index: str) -> None:
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.site = venv / "lib" / "python3.11" / "site-packages"
        self.log = venv / "setup.log"
        self.lock = -1
        self.torch_index = torch_index
        self.pins = dict(
            line.strip().split("==")
            for line in LOCK.read_text().splitlines()
            if "==" in line and not line.startswith("#")
        )

    def run(self) -> None:
        """Run all steps."""
        preflight(self.venv)
        self.wait_for_others()
        self.create()
        self.remove_half_installed()
        self.install_torch()
        self.install_lock()
        self.install_project()
        self.check()

    def wait_for_others(self) -> None:
        """Hold a lock on the parent folder, so that two set-ups do not write at once.

        pip inherits it: one that outlives its killed parent is waited for as well.
        """
        self.lock = os.open(self.venv.parent, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is at work here; waiting for it.", flush=True)
            fcntl.flock(self.lock, fcntl.LOCK_EX)

    def create(self) -> None:
        """Create the virtual environment, anew if what is there is not a working one of 3.11."""
        announce(1, f"virtual environment in {self.venv}")
        probe = "import sys, pip; assert sys.version_info[:2] == (3, 11)"
        if self.python.exists() and quiet(self.python, "-c", probe):
            return
        result = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", self.venv],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise SetupError(
                f"{sys.executable} -m venv failed. On Debian and Ubuntu its module is in the "
                f"package python3.11-venv.\n{result.stdout}{result.stderr}"
            )

    def remove_half_installed(self) -> None:
        """Forget packages whose installation was cut off, so that pip installs them again.

        pip writes RECORD last; without it the metadata alone would pass for an installed package.
        """
        for info in self.site.glob("*.dist-info"):
            if not (info / "RECORD").exists():
                shutil.rmtree(info)

    def install_torch(self) -> None:
        """Install the CPU build of torch, and refuse to download a CUDA one."""
        pin = f"torch=={self.pins['torch']}"
        announce(2, f"PyTorch for CPU ({pin}, about 200 MB)")
        if self.installed("torch", self.pins["torch"]):
            return
        vision = f"torchvision=={self.pins['torchvision']}"
        if self.torch_index:
            self.pip("--index-url", self.torch_index, pin, vision)
            return
        if platform.machine() != "x86_64":
            self.pip(pin)
            return
        # "+cpu" matches CPU builds alone: an index without one answers at once.
        try:
            self.pip(f"{pin}+cpu")
        except SetupError:
            if "No matching distribution found" not in self.log.read_text():
                raise
            print(f"      the package index has no CPU build of torch; asking {PUBLIC_CPU_INDEX}")
            try:
                self.pip("--index-url", PUBLIC_CPU_INDEX, pin, vision)
            except SetupError as error:
                raise SetupError(
                    f"no CPU build of {pin} found: neither in the package index pip is "
                    f"configured for nor at {PUBLIC_CPU_INDEX}. Name an index that has one: "
                    f"make venv TORCH_INDEX=https://...\n{error}"
                ) from None

    def install_lock(self) -> None:
        """Install every package of the lock."""
        announce(3, f"{len(self.pins)} packages of {LOCK.relative_to(ROOT)}")
        self.pip("-r", str(LOCK), count=len(self.pins))

    def install_project(self) -> None:
        """Install this project, editable."""
        announce(4, "sglang-ares itself, editable")
        self.pip("--no-build-isolation", "-e", str(ROOT), wheels_only=False)

    def check(self) -> None:
        """Import what a worker imports (also compiles it to bytecode for the first start)."""
        announce(5, "check: imports SGLang as a worker does")
        result = self.wait([str(self.python), "-W", "ignore", "-c", CHECK], lambda line: "")
        if result == 0:
            return
        log = self.log.read_text()
        if "GPU build" in log:
            raise SetupError(
                "the torch that was installed is built for a GPU, a CPU build was expected. "
                f"Name an index that has one: make clean-venv venv TORCH_INDEX={PUBLIC_CPU_INDEX}"
            )
        raise SetupError(f"SGLang cannot be imported.\n{tail(log)}")

    def installed(self, name: str, version: str) -> bool:
        """Whether this version is in place (any build of it)."""
        return any(self.site.glob(f"{name}-{version}*.dist-info"))

    def pip(self, *arguments: str, count: int = 1, wheels_only: bool = True) -> None:
        """Run ``pip install --no-deps`` and show how far it is."""
        command = [
            *(str(self.python), "-m", "pip", "install", "--no-deps", "--progress-bar=off"),
            *(["--only-binary=:all:"] if wheels_only else []),
            *arguments,
        ]
        seen = 0
        before = self.complete_packages()

        def describe(line: str) -> str:
            nonlocal seen
            if line.startswith(("Collecting", "Requirement already satisfied")):
                seen += 1
                return f"looking up and downloading {seen}/{count}"
            if line.startswith("Installing collected"):
                pending = line.count(",") + 1
                return f"installing {{}}/{pending}"
            return ""

        status = self.wait(command, describe, lambda: self.complete_packages() - before)
        if status != 0:
            raise SetupError(f"pip failed; its messages are in {self.log}.\n{tail(self.log)}")

    def complete_packages(self) -> int:
        """How many packages are completely installed."""
        return sum(1 for _ in self.site.glob("*.dist-info/RECORD"))

    def wait(
        self,
        command: Sequence[str],
        describe: Callable[[str], str],
        progress: Callable[[], int] = lambda: 0,
    ) -> int:
        """Run a command into the log, telling about it meanwhile; returns its exit status.

        ``describe`` turns a line of output into a state ("" keeps the last one), in which
        ``{}`` stands for the number that ``progress`` gives.
        """
        env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_USER="0")
        env.pop("PYTHONPATH", None)
        state = "working"
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=ROOT,
            pass_fds=[self.lock],
        )

        def read() -> None:
            nonlocal state
            assert process.stdout is not None
            with self.log.open("w") as log:
                for line in process.stdout:
                    log.write(line)
                    state = describe(line) or state

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        terminal = sys.stdout.isatty()
        started = told = time.monotonic()
        try:
            while reader.is_alive():
                reader.join(0.5)
                now = time.monotonic()
                text = f"      {now - started:4.0f} s  {state.format(progress())}"
                if terminal:
                    print(f"\r{text:<70}", end="", flush=True)
                elif now - told >= 10:
                    told = now
                    print(text, flush=True)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            if terminal:
                print("\r" + " " * 70 + "\r", end="", flush=True)
        return process.wait()


def preflight(venv: Path) -> None:
    """Refuse early what would fail late."""
    if sys.version_info[:2] != (3, 11):
        raise SetupError(f"Python 3.11 is needed, this is {platform.python_version()}.")
    if platform.system() != "Linux":
        raise SetupError(f"SGLang's wheels are for Linux, this is {platform.system()}.")
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if name == "glibc" and numbers < NEEDED_GLIBC:
        raise SetupError(
            f"sglang's wheel needs glibc 2.34 or newer (Debian 12, Ubuntu 22.04), not {version}."
        )
    if not (venv / "pyvenv.cfg").exists():
        free = shutil.disk_usage(venv.parent).free
        if free < NEEDED_BYTES:
            raise SetupError(
                f"{NEEDED_BYTES / 2**30:.0f} GB of free disk are needed, "
                f"{venv.parent} has {free / 2**30:.1f} GB."
            )


def announce(step: int, text: str) -> None:
    """Say which step begins."""
    print(f"[{step}/{STEPS}] {text}", flush=True)


def quiet(*command: str | Path) -> bool:
    """Whether the command succeeds."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def tail(log: Path | str, lines: int = 15) -> str:
    """The end of a log."""
    text = log.read_text() if isinstance(log, Path) else log
    return "\n".join(text.splitlines()[-lines:])


if __name__ == "__main__":
    main()
