"""What is simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sglang_ares.profiles.profile import Profile, load_profile
from sglang_ares.simulator.prediction import PREDICTIONS, ErrorModel
from sglang_ares.simulator.roles.config import RolesConfig
from sglang_ares.srt.policy import placement, rescheduling  # noqa: F401  (they register)
from sglang_ares.srt.policy.admission import ADMISSIONS, SLO, WORKER
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING
from sglang_ares.srt.policy.types import MoveCost, RescheduleLimits, moves_per_round

# The policy whose moves cost nothing and whose predictions are the truth.
ORACLE = "oracle"


class SimulationError(ValueError):
    """A configuration that cannot be simulated; the text names the field and the remedy."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """One cluster and its policies.

    ``profile``: of every worker. ``prediction``: one of :data:`PREDICTIONS`; ``error`` describes
    the ``noisy`` one and ``error_scale`` multiplies it. ``report_interval_s``: how old loads may be
    that a placement sees (requests placed since are counted). ``admission``: one of
    :data:`~sglang_ares.srt.policy.admission.ADMISSIONS`. ``max_moves``: moves per round, 0
    for half as many as there are decode workers and at least 2. ``budget_tokens``: KV tokens that
    the moves of a round may copy, 0 for no limit. ``max_migrations_per_worker``: at once into one
    worker, and out of one. ``reserved_tokens``: free KV that admission leaves per request.
    ``free_moves``: a migration takes no time and no bandwidth and pauses nothing; None: for the
    oracle only. ``ttft_slo_ms``, ``tpot_slo_ms``: what a request is promised, 0 for nothing.
    ``warmup_s``: requests that arrive earlier are simulated, and left out of the statistics.
    ``sample_interval_s``: seconds between samples of the load, 0 for 300 samples in all. ``roles``:
    how workers change their roles, and then where requests run; None: fixed pools, and requests
    are placed as the engine does.
    """

    prefill_workers: int = 1
    decode_workers: int = 4
    profile: Profile = field(default_factory=lambda: load_profile("24gb-qwen2.5-7b"))
    placement: str = "round_robin"
    admission: str = WORKER
    prefill_placement: str = "least_tokens"
    rescheduling: str = "none"
    prediction: str = "none"
    error: ErrorModel = field(default_factory=ErrorModel)
    error_scale: float = 1.0
    report_interval_s: float = 0.2
    reschedule_interval_s: float = 1.0
    max_moves: int = 0
    threshold: float = 0.1
    min_gap_tokens: int = 128
    headroom_tokens: int = 256
    cooldown_s: float = 2.0
    budget_tokens: int = 0
    max_migrations_per_worker: int = 8
    reserved_tokens: int = 512
    free_moves: bool | None = None
    ttft_slo_ms: float = 0.0
    tpot_slo_ms: float = 0.0
    warmup_s: float = 0.0
    sample_interval_s: float = 0.0
    seed: int = 0
    record_stays: bool = False
    roles: RolesConfig | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("prefill_workers", 1),
            ("decode_workers", 1),
            ("max_moves", 0),
            ("min_gap_tokens", 0),
            ("headroom_tokens", 0),
            ("budget_tokens", 0),
            ("max_migrations_per_worker", 1),
            ("reserved_tokens", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise SimulationError(
                    f"{name} is {getattr(self, name)}; it must be at least {least}."
                )
        for name in ("report_interval_s", "reschedule_interval_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise SimulationError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in (
            "error_scale",
            "threshold",
            "cooldown_s",
            "ttft_slo_ms",
            "tpot_slo_ms",
            "warmup_s",
            "sample_interval_s",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise SimulationError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name, choices in (
            ("placement", PLACEMENT.names()),
            ("admission", ADMISSIONS),
            ("prefill_placement", PLACEMENT.names()),
            ("rescheduling", RESCHEDULING.names()),
            ("prediction", PREDICTIONS),
        ):
            if getattr(self, name) not in choices:
                raise SimulationError(
                    f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(choices)}."
                )
        if self.rescheduling == ORACLE and self.prediction != "true":
            raise SimulationError(
                f"rescheduling is {ORACLE!r} and prediction {self.prediction!r}; the oracle knows "
                "the true lengths: set prediction to 'true'."
            )

        if self.admission == SLO and not self.ttft_slo_ms:
            raise SimulationError(
                f"admission is {SLO!r}, by what is promised for the first token; set ttft_slo_ms."
            )
        if self.roles is not None:
            self._check_roles()

    def _check_roles(self) -> None:
        for name in ("ttft_slo_ms", "tpot_slo_ms"):
            if not getattr(self, name):
                raise SimulationError(f"roles weigh loads against both SLOs; set {name}.")
        if self.admission != WORKER:
            raise SimulationError(
                f"admission is {self.admission!r} and roles are simulated; with roles requests "
                f"wait where they are placed: set admission to {WORKER!r}."
            )
        if self.rescheduling != "none":
            raise SimulationError(
                f"rescheduling is {self.rescheduling!r} and roles are simulated; with roles only "
                "the moves that empty a worker are: set rescheduling to 'none'."
            )

    @property
    def moves_are_free(self) -> bool:
        """Whether migrations cost nothing."""
        return self.rescheduling == ORACLE if self.free_moves is None else self.free_moves

    @property
    def limits(self) -> RescheduleLimits:
        """What the rescheduling policy is told."""
        profile = self.profile
        cost = (
            MoveCost(tokens_per_s=0.0, fixed_s=0.0, pause_s=0.0)
            if self.moves_are_free
            else MoveCost(
                tokens_per_s=profile.link_tokens_per_s,
                fixed_s=profile.move_fixed_ms * 1e-3,
                pause_s=profile.move_pause_ms * 1e-3,
                budget_tokens=self.budget_tokens,
            )
        )
        return RescheduleLimits(
            max_moves=moves_per_round(self.decode_workers, self.max_moves),
            threshold=self.threshold,
            min_gap_tokens=self.min_gap_tokens,
            headroom_tokens=self.headroom_tokens,
            reserved_tokens=self.reserved_tokens,
            cooldown_s=self.cooldown_s,
            interval_s=self.reschedule_interval_s,
            tpot_slo_ms=self.tpot_slo_ms,
            cost=cost,
        )
