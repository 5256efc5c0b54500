"""A profile: the step times, memory and links of one kind of worker.

The simulator and emulated workers (``--ares-emulate``) run on it, ``python -m sglang_ares.bench
calibrate`` measures one.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sglang_ares.profiles.json_errors import described
from sglang_ares.srt.policy.types import StepTime

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]


class ProfileError(ValueError):
    """A profile that cannot be used; names the file, the line and the field."""


class PrefillTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Computing the KV of a prompt of ``n`` tokens takes ``fixed_ms + per_token_ms * n +
    per_square_ms * n**2`` milliseconds (arXiv 2505.11916: quadratic)."""

    fixed_ms: NotNegative
    per_token_ms: NotNegative
    per_square_ms: NotNegative

    def ms(self, tokens: float, cached: float = 0.0) -> float:
        """Milliseconds for a prompt of ``tokens`` of which the first ``cached`` have their KV."""
        return (
            self.fixed_ms
            + self.per_token_ms * (tokens - cached)
            + self.per_square_ms * (tokens**2 - cached**2)
        )


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of worker.

    ``decode``: law of the step times. ``prefill``: law of prefill times. ``kv_capacity_tokens``:
    tokens of KV memory. ``kv_bytes_per_token``: bytes of KV of one token, all layers.
    ``link_bytes_per_s``: bytes of KV per second between two workers. ``move_fixed_ms``: what a
    migration takes besides copying. ``move_pause_ms``: how long the moved request stands still.
    ``transfer_fixed_ms``: what handing a prompt's KV to the decode worker takes besides copying.
    ``max_running``: most requests in one batch. ``chunked_prefill_tokens``: tokens a prefill step
    takes at most. ``source``: where the numbers come from.
    """

    name: str
    hardware: str
    model: str
    source: str
    decode: StepTime
    prefill: PrefillTime
    kv_capacity_tokens: AtLeastOne
    kv_bytes_per_token: AtLeastOne
    link_bytes_per_s: Positive
    move_fixed_ms: NotNegative
    move_pause_ms: NotNegative
    transfer_fixed_ms: NotNegative
    max_running: AtLeastOne
    chunked_prefill_tokens: AtLeastOne

    @property
    def link_tokens_per_s(self) -> float:
        """Tokens of KV per second between two workers."""
        return self.link_bytes_per_s / self.kv_bytes_per_token


def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    files = resources.files(__package__).iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by name, or one from a JSON file. :class:`ProfileError` says what is
    wrong with it, and where."""
    if str(name_or_path) in shipped_profiles():
        text = resources.files(__package__).joinpath(f"{name_or_path}.json").read_bytes()
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise ProfileError(
                f"there is no profile {str(name_or_path)!r}: neither a file nor one of: "
                f"{', '.join(shipped_profiles())}."
            )
        text = path.read_bytes()
    try:
        return msgspec.json.decode(text, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {name_or_path}, {described(error, text)}") from None
