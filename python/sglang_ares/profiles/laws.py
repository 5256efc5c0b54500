"""The two laws that the elastic policies go by, as one thing: measured, kept on disk, or emulated.

On disk there is a JSON file for each model, hardware and set of flags. A file that cannot be read
is no reason not to start: it is ignored with a warning, and replaced once there is something to
write.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sglang_ares.profiles.profile import PrefillTime
from sglang_ares.srt.policy.types import StepTime

logger = logging.getLogger(__name__)

OFF = "off"
# Loads at which two laws are compared: prompt lengths; (requests, resident tokens).
_PROMPTS = (64, 1024, 8192)
_LOADS = ((1, 256), (8, 4096), (64, 65536))


class Laws(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's prefill times and decode-step times, as far as they are known."""

    prefill: PrefillTime | None = None
    decode: StepTime | None = None

    @property
    def complete(self) -> bool:
        """Whether both are known."""
        return self.prefill is not None and self.decode is not None

    def scaled(self, factor: float) -> Laws:
        """The laws of a worker that takes ``factor`` times as long."""
        prefill, decode = self.prefill, self.decode
        return Laws(
            prefill=prefill
            and PrefillTime(
                fixed_ms=factor * prefill.fixed_ms,
                per_token_ms=factor * prefill.per_token_ms,
                per_square_ms=factor * prefill.per_square_ms,
            ),
            decode=decode
            and StepTime(
                fixed_ms=factor * decode.fixed_ms,
                per_request_ms=factor * decode.per_request_ms,
                per_token_ms=factor * decode.per_token_ms,
            ),
        )

    def differs_from(self, other: Laws, share: float) -> bool:
        """Whether any time they tell of some usual loads differs by more than ``share``."""
        mine, others = self._times(), other._times()
        return len(mine) != len(others) or any(
            abs(a - b) > share * max(a, b) for a, b in zip(mine, others, strict=True)
        )

    def _times(self) -> list[float]:
        prefill = [self.prefill.ms(n) for n in _PROMPTS] if self.prefill else []
        return prefill + ([self.decode.ms(n, t) for n, t in _LOADS] if self.decode else [])


def tells_of_length(law: PrefillTime) -> bool:
    """Whether a prefill law is from prompts of several lengths; those of one make it
    proportional."""
    return sum(c > 0 for c in (law.fixed_ms, law.per_token_ms, law.per_square_ms)) > 1


def tells_of_load(law: StepTime) -> bool:
    """Whether a step law is from several loads; one makes it a constant."""
    return law.per_request_ms > 0 or law.per_token_ms > 0


NO_LAWS = Laws()


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``key``: the settings that the laws depend on, in clear."""

    key: dict[str, str]
    saved_at: str
    laws: Laws


class LawFile:
    """The file of one ``key`` in ``directory``, which need not be there yet; ``name`` begins the
    file's name."""

    def __init__(self, directory: Path, name: str, key: dict[str, str]) -> None:
        self._key = key
        digest = hashlib.sha256(msgspec.json.encode(key, order="sorted")).hexdigest()
        stem = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:64]
        self.path = directory.expanduser() / f"{stem or 'model'}-{digest[:16]}.json"

    def read(self) -> Laws | None:
        """What the file says; None if there is none, or none that can be believed."""
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_File)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._ignored(str(error))
            return None
        if content.key != self._key:
            self._ignored("it is of other settings")
        elif content.laws.prefill is not None and content.laws.prefill.ms(1024) <= 0:
            self._ignored("its prompts take no time")
        elif content.laws.decode is not None and content.laws.decode.ms(8, 4096) <= 0:
            self._ignored("its decode steps take no time")
        else:
            return content.laws
        return None

    def _ignored(self, why: str) -> None:
        logger.warning(
            "the cached profile %s is ignored (%s); it will be replaced once prefill and decode "
            "times are known (--ares-profile-cache)",
            self.path,
            why,
        )

    def write(self, laws: Laws) -> None:
        """Replace the file, all at once: a reader sees the old content or the new. Raises
        :class:`OSError`."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        body = msgspec.json.encode(_File(key=self._key, saved_at=now, laws=laws))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f".{self.path.stem}-", suffix=".tmp", dir=self.path.parent
        )
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(msgspec.json.format(body, indent=2) + b"\n")
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
