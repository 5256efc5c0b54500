"""Keeps the workers' laws: read from disk at start, handed to new workers, refreshed by reports,
written back now and then."""

from __future__ import annotations

import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sglang_ares.profiles.laws import OFF, LawFile, Laws, tells_of_length, tells_of_load
from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.step_law import mean_law
from sglang_ares.srt.policy.types import DECODE, PREFILL, StepTime

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from sglang_ares.ares_args import AresArgs
    from sglang_ares.profiles.profile import Profile
    from sglang_ares.srt.managers.io_struct import WorkerReport

logger = logging.getLogger(__name__)

# Seconds between two writes, and by how much a time must have changed to be written.
_WRITE_EVERY_S = 60.0
_CHANGED = 0.02

# Where the laws that workers start with are from.
FROM_CACHE = "cache"
EMULATED = "emulated"
NOT_KNOWN = "none"


class LawKeeper:
    """``file``: where the laws are kept, if they are; ``emulated``: those of the profile that runs
    in place of a model. Times are monotonic seconds."""

    def __init__(self, file: LawFile | None, emulated: Laws | None = None) -> None:
        self._file = file if emulated is None else None
        read = self._file.read() if self._file is not None else None
        self.current = emulated or read or Laws()
        self.source = EMULATED if emulated else FROM_CACHE if read else NOT_KNOWN
        self._written = self.current
        self._next_write = float("-inf")
        # What workers were started with: told by them, it is no news.
        self._given: list[StepTime] = []
        self._decode: dict[int, StepTime] = {}
        if read is not None and self._file is not None:
            logger.info("prefill and decode times are known from %s", self._file.path)

    def for_worker(self) -> Laws:
        """What a worker that starts now begins with."""
        if self.current.decode is not None and self.current.decode not in self._given:
            self._given.append(self.current.decode)
        return self.current

    def on_report(self, report: WorkerReport) -> None:
        """A worker of this host's; those of other hosts may be of another kind. A law from one
        length or load only is good for what it was found from, and is not kept."""
        prefill, decode = self.current.prefill, self.current.decode
        if report.prefill_law is not None and report.load.role == PREFILL:
            fixed, per_token, per_square = report.prefill_law
            told = PrefillTime(fixed_ms=fixed, per_token_ms=per_token, per_square_ms=per_square)
            prefill = told if tells_of_length(told) else prefill
        step = report.load.step
        news = step is not None and step not in self._given and tells_of_load(step)
        if step is not None and news and report.load.role == DECODE:
            self._decode[report.worker_id] = step
            decode = mean_law(list(self._decode.values()))
        self.current = Laws(prefill=prefill, decode=decode)

    def write_when_due(self, now: float) -> None:
        """Write what has changed, at most once a minute."""
        if now >= self._next_write and self.current.differs_from(self._written, _CHANGED):
            self._next_write = now + _WRITE_EVERY_S
            self.write()

    def write(self) -> None:
        """Write what is known; a disk that cannot be written to costs one warning."""
        if self._file is None or self.current == self._written:
            return
        try:
            self._file.write(self.current)
            self._written = self.current
        except OSError as error:
            logger.warning(
                "prefill and decode times cannot be kept in %s (%s); name another directory with "
                "--ares-profile-cache, or off",
                self._file.path,
                error.strerror or error,
            )
            self._file = None

    def status(self) -> dict[str, Any]:
        """The member ``profile`` of ``GET /ares/status``."""
        return {
            "source": self.source,
            "file": str(self._file.path) if self._file is not None else None,
            **msgspec.to_builtins(self.current),
        }


def open_keeper(
    server_args: ServerArgs,
    ares_args: AresArgs,
    settings: dict[str, str],
    emulated: Profile | None,
) -> LawKeeper:
    """As the flags say. ``settings``: what all workers have in common."""
    if emulated is not None:
        laws = Laws(prefill=emulated.prefill, decode=emulated.decode)
        return LawKeeper(None, laws.scaled(ares_args.time_dilation))
    if ares_args.profile_cache == OFF:
        return LawKeeper(None)
    name = Path(server_args.model_path).name
    key = cache_key(settings, hardware_of(server_args), server_args.device, ares_args)
    return LawKeeper(LawFile(Path(ares_args.profile_cache), name, key))


def cache_key(
    settings: dict[str, str], hardware: str, device: str, ares_args: AresArgs
) -> dict[str, str]:
    """What the laws of a worker depend on: the model, software and flags, the hardware, and what
    of our flags changes a step's time. Workers on CPUs share cores, so their number counts."""
    key = {
        **settings,
        "hardware": hardware,
        "--ares-predictor": ares_args.predictor,
        "--ares-predictor-record": str(bool(ares_args.predictor_record)),
    }
    if device == "cpu":
        key["workers"] = str(ares_args.total_workers)
    return key


def hardware_of(server_args: ServerArgs) -> str:
    """The device that workers run on, by name."""
    if server_args.device != "cpu":
        from sglang.srt.utils import get_device_name

        return str(get_device_name(server_args.base_gpu_id))
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return f"{_processor()}, {cores} cores, {threads or 'all'} per worker"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
