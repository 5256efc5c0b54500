"""What is simulated of changing roles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from sglang_ares.profiles.profile import Profile
from sglang_ares.srt.policy import elastic  # noqa: F401  (it registers)
from sglang_ares.srt.policy.elastic.decisions import REQUEST_SCHEDULING, ROLES, FlipRules

STATIC = "static"
# Every worker does both phases of the requests it is given; no policy of the controller.
COLOCATED = "colocated"
# How a worker changes.
RELABEL = "relabel"
EMPTY = "empty"


class RolesError(ValueError):
    """Settings of roles that cannot be simulated; the text names the field and the remedy."""


@dataclass(frozen=True, kw_only=True)
class RolesConfig:
    """``policy``: a name of ``ROLES``, or ``colocated``. ``scheduling``: a name of
    ``REQUEST_SCHEDULING``; "": the policy's own, ``minimal_load`` for fixed roles. ``change``: how
    a worker changes, ``relabel`` (at once; what it holds is finished under a local scheduler) or
    ``empty`` (moved away first, as the engine does); "": relabel for Arrow, else empty.

    ``most_changes``: workers that are being emptied at once. ``pass_s``: seconds between two
    plans. ``flip_s``: seconds an emptied worker takes to change. ``give_up_s``: a worker that is
    not empty by then keeps its role. ``hand_back_s``: what waits for prefill on a worker that is
    to decode goes elsewhere after so long. ``mixed_tokens``: most tokens of a step that decodes
    and prefills; 0: as many as keep a step with full memory within 90 % of the TPOT SLO.
    """

    policy: str = STATIC
    most_changes: int = 1
    scheduling: str = ""
    change: str = ""
    rules: FlipRules = field(default_factory=FlipRules)
    pass_s: float = 1.0
    flip_s: float = 0.05
    give_up_s: float = 60.0
    hand_back_s: float = 1.0
    mixed_tokens: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("policy", (*ROLES.names(), COLOCATED)),
            ("scheduling", ("", *REQUEST_SCHEDULING.names())),
            ("change", ("", RELABEL, EMPTY)),
        ):
            if getattr(self, name) not in choices:
                raise RolesError(
                    f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(choices)}."
                )
        for name in ("pass_s", "give_up_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise RolesError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("flip_s", "hand_back_s", "mixed_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise RolesError(f"{name} is {getattr(self, name)}; it must not be negative.")

    @property
    def scheduling_name(self) -> str:
        """The request scheduling that is used."""
        if self.scheduling:
            return self.scheduling
        return self.policy if self.policy in REQUEST_SCHEDULING.names() else "minimal_load"

    @property
    def relabels(self) -> bool:
        """Whether a change takes effect at once."""
        return self.change == RELABEL or (not self.change and self.policy == "arrow")

    def mixed_budget(self, profile: Profile, tpot_slo_ms: float) -> int:
        """Tokens of a step that decodes and prefills."""
        most = profile.chunked_prefill_tokens
        if self.mixed_tokens or not tpot_slo_ms or not profile.prefill.per_token_ms:
            return min(most, self.mixed_tokens or most)
        full_ms = profile.decode.ms(0, profile.kv_capacity_tokens)
        room_ms = 0.9 * tpot_slo_ms - full_ms
        return int(min(most, max(64.0, room_ms / profile.prefill.per_token_ms)))

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dict(msgspec.to_builtins(self))
