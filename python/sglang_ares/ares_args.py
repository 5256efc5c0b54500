"""The ``--ares-*`` flags: one frozen dataclass, read once and handed down."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from sglang_ares.srt.policy import elastic, placement, rescheduling  # noqa: F401  (they register)
from sglang_ares.srt.policy.admission import ADMISSIONS, SLO, WORKER
from sglang_ares.srt.policy.elastic.decisions import ROLES
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING

PROFILE_AT_START = ("auto", "off")
EMULATED_PREDICTIONS = ("none", "noisy", "true")
# Durations that belong to what is emulated; timeouts are the host's.
_POLICY_TIMES = (
    "reschedule_interval",
    "report_interval",
    "move_cooldown",
    "tpot_slo_ms",
    "ttft_slo_ms",
)


class AresArgsError(ValueError):
    """A flag, or a combination of flags, that cannot work; the text names the remedy."""


def _flag(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class AresArgs:
    """Configuration of the cluster. Each field is a flag, ``--ares-`` and its name."""

    prefill_workers: int = _flag(1, "Number of prefill workers.")
    decode_workers: int = _flag(2, "Number of decode workers.")
    placement: str = _flag(
        "least_tokens", "How a new request is placed.", choices=PLACEMENT.names()
    )
    admission: str = _flag(
        WORKER,
        "Where requests wait while no decode worker has KV memory for them. worker: on the worker "
        "they were placed on, first come, first served. slo: in the controller, until any worker "
        "has room; those that can still meet --ares-ttft-slo-ms go before those that are late.",
        choices=ADMISSIONS,
    )
    rescheduling: str = _flag(
        "reactive",
        "How running requests are moved between decode workers.",
        choices=RESCHEDULING.served_names(),
    )
    reschedule_interval: float = _flag(1.0, "Seconds between two rescheduling rounds.", metavar="S")
    report_interval: float = _flag(
        0.2, "Seconds between two load reports of a worker.", metavar="S"
    )
    reschedule_threshold: float = _flag(
        0.1,
        "A decode worker is overloaded when its resident tokens exceed the mean by this share.",
    )
    tpot_slo_ms: float = _flag(
        0.0,
        "Time per output token that requests are promised; the rescheduling policy ares then "
        "weighs what exceeds it. 0: none.",
        metavar="MS",
    )
    length_prior: bool = _flag(
        True,
        "Predict remaining lengths from the lengths of finished requests where the workers do not "
        "predict them.",
    )
    max_moves: int = _flag(
        0,
        "Most moves that one rescheduling round may start. 0: half as many as there are decode "
        "workers, but two at least.",
    )
    move_budget: int = _flag(
        0, "Most tokens of KV that the moves of one rescheduling round may copy; 0: no limit."
    )
    move_cooldown: float = _flag(
        2.0, "Seconds a request stays on a worker before it may be moved again.", metavar="S"
    )
    min_gap_tokens: int = _flag(
        128, "No move while the resident tokens of two workers differ by less than this."
    )
    memory_relief: bool = _flag(
        True,
        "Move requests away from a decode worker whose KV runs short, before requests are "
        "retracted; whatever --ares-rescheduling says.",
    )
    memory_floor: float = _flag(
        0.05, "Share of a decode worker's KV that memory relief keeps free at least."
    )
    predictor: str = _flag(
        "auto",
        "Folder with a head that predicts remaining output lengths (`python -m "
        "sglang_ares.predictor train` makes one). auto: the one that comes with the demo model, "
        "for other models none. off: none.",
        metavar="DIR",
    )
    predictor_correction: bool = _flag(
        True,
        "Correct the head's predictions by what requests that have ended show, should lengths "
        "drift from those it was trained on.",
    )
    predictor_record: str = _flag(
        "",
        "Append the hidden states of every 20th output token to files in this folder: data to "
        "train a head on.",
        metavar="DIR",
    )
    max_migrations_per_worker: int = _flag(
        8, "Most migrations that run at once into one worker, and out of one; more are refused."
    )
    migration_bandwidth: float = _flag(
        0.0,
        "Most 10^6 bytes of KV per second that one worker sends for migrations; 0: no limit.",
        metavar="MB/S",
    )
    migration_chunk_tokens: int = _flag(
        2048, "Most tokens whose KV a migration sends in one piece while the request decodes."
    )
    migration_memory_share: float = _flag(
        0.5,
        "Largest share of a worker's KV memory that migrations into it may hold reserved; "
        "more are refused.",
    )
    migration_copy: str = _flag(
        "live",
        "Copy KV while the request decodes, or only once it has stopped (for measurements).",
        choices=("live", "stopped"),
    )
    decode_radix_cache: str = _flag(
        "on",
        "Whether decode workers keep the KV of ended and moved requests for later ones "
        "(--disable-radix-cache turns it off too).",
        choices=("on", "off"),
    )
    migration_timeout: float = _flag(
        10.0,
        "Seconds a migration may take in one state before it is given up "
        "(the request then stays where it is).",
        metavar="S",
    )
    role_change_timeout: float = _flag(
        30.0,
        "Seconds a worker that is to change its role may take to finish or hand over its "
        "requests, before it stays what it is.",
        metavar="S",
    )
    roles: str = _flag(
        "static",
        "Who changes a worker's role: nobody but POST /ares/role; Arrow's algorithms as published; "
        "or ours, which forecasts both loads and empties decode workers by moving. The latter two "
        "need --ares-ttft-slo-ms and --ares-tpot-slo-ms.",
        choices=ROLES.names(),
    )
    ttft_slo_ms: float = _flag(
        0.0,
        "Time to the first token that requests are promised; --ares-admission and --ares-roles go "
        "by it. 0: none.",
        metavar="MS",
    )
    profile_cache: str = _flag(
        "~/.cache/sglang-ares/profiles",
        "Keep measured prefill and decode times in this directory, a file for each model, hardware "
        "and set of flags, so that the next start knows them. off: keep none.",
        metavar="DIR",
    )
    profile_at_start: str = _flag(
        "auto",
        "auto: a server whose roles are elastic and whose times are not known measures them with "
        "a few seconds of requests of its own before it serves. off: it learns while serving.",
        choices=PROFILE_AT_START,
    )
    role_emptying: str = _flag(
        "migrate",
        "How a decode worker that is to prefill gets rid of its requests: they are moved to the "
        "others, or finish where they are (for measurements).",
        choices=("migrate", "wait"),
    )
    worker_timeout: float = _flag(
        5.0,
        "Seconds without a sign of life after which a worker counts as dead: it is ended, its "
        "requests go on elsewhere, and it is started anew.",
        metavar="S",
    )
    max_restarts: int = _flag(
        5,
        "How often a worker that died is started anew before it is left out; ten minutes of "
        "service wipe the slate clean.",
    )
    max_attempts: int = _flag(
        5, "How often a request is recovered from failing workers before it is given up."
    )
    fault_injection: bool = _flag(
        False, "Accept POST /ares/fault, which holds or breaks migrations; for rehearsals."
    )
    worker_start_timeout: float = _flag(
        600.0, "Seconds a worker may take to load its model.", metavar="S"
    )
    kv_checksum: bool = _flag(
        False,
        "Compare a checksum of the KV at both ends of every move, and with CUDA of every transfer "
        "from prefill to decode; a request whose KV arrived wrong stays where it is. Costs time.",
    )
    emulate: str = _flag(
        "",
        "Run no model: workers sleep the step times of this profile (a shipped one by name, or a "
        "JSON file), and every request produces max_new_tokens tokens that mean nothing.",
        metavar="PROFILE",
    )
    emulate_predictions: str = _flag(
        "none",
        "With --ares-emulate: what workers predict of remaining lengths; noisy: the truth with the "
        "simulator's error, none: the controller's length prior is all there is.",
        choices=EMULATED_PREDICTIONS,
    )
    time_dilation: float = _flag(
        1.0,
        "With --ares-emulate: everything takes this many times as long, step times and the "
        "intervals of reports and policies alike, so that few cores keep up with many workers.",
        metavar="F",
    )
    control_host: str = _flag(
        "127.0.0.1",
        "Address the control sockets listen on. On loopback they are ipc sockets; any other "
        "address, or 0.0.0.0, makes them tcp sockets, which need --ares-curve-keys.",
        metavar="HOST",
    )
    control_port: int = _flag(
        0,
        "First TCP port of the control sockets: this one for queries (and for hosts that join), "
        "the next for reports, then one per worker, then one for the outputs of other hosts. 0: "
        "free ones if tcp is needed at all.",
        metavar="PORT",
    )
    curve_keys: str = _flag(
        "",
        "Directory with the keys of the control sockets, made by `python -m sglang_ares.keys DIR`; "
        "only holders of these keys are heard.",
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        for name, least in (
            ("prefill_workers", 1),
            ("decode_workers", 1),
            ("max_moves", 0),
            ("move_budget", 0),
            ("max_restarts", 0),
            ("max_attempts", 0),
            ("max_migrations_per_worker", 1),
            ("min_gap_tokens", 0),
            ("migration_chunk_tokens", 1),
            ("control_port", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise AresArgsError(
                    f"{flag_name(name)} is {value}; it must be at least {least}."
                    + (
                        " A cluster needs at least one worker of each role."
                        if name.endswith("_workers")
                        else ""
                    )
                )
        for name in (
            "reschedule_interval",
            "report_interval",
            "migration_timeout",
            "role_change_timeout",
            "worker_timeout",
            "worker_start_timeout",
        ):
            value = getattr(self, name)
            if not value > 0:
                raise AresArgsError(f"{flag_name(name)} is {value}; it must be above 0 seconds.")
        if not 0 < self.time_dilation < math.inf:
            raise AresArgsError(
                f"--ares-time-dilation is {self.time_dilation}; it must be above 0."
            )
        if not 0 <= self.memory_floor < 1:
            raise AresArgsError(
                f"{flag_name('memory_floor')} is {self.memory_floor}; it must be a share of the "
                "KV capacity, from 0 to below 1."
            )
        for name in (
            "reschedule_threshold",
            "move_cooldown",
            "migration_bandwidth",
            "tpot_slo_ms",
            "ttft_slo_ms",
        ):
            value = getattr(self, name)
            if not value >= 0:
                raise AresArgsError(f"{flag_name(name)} is {value}; it must not be negative.")
        if self.admission == SLO and (fault := self.why_not_by_slo):
            raise AresArgsError(fault)
        if self.roles != "static" and not (self.ttft_slo_ms and self.tpot_slo_ms):
            raise AresArgsError(
                f"--ares-roles {self.roles} weighs loads against what requests are promised; set "
                "--ares-ttft-slo-ms and --ares-tpot-slo-ms."
            )
        if not self.profile_cache.strip():
            raise AresArgsError("--ares-profile-cache is empty; name a directory, or off.")
        if not 0 < self.migration_memory_share <= 1:
            raise AresArgsError(
                f"--ares-migration-memory-share is {self.migration_memory_share}; "
                "it must be above 0 and at most 1."
            )
        for name, choices in (
            ("placement", PLACEMENT.names()),
            ("admission", ADMISSIONS),
            ("rescheduling", RESCHEDULING.served_names()),
            ("migration_copy", ("live", "stopped")),
            ("decode_radix_cache", ("on", "off")),
            ("emulate_predictions", EMULATED_PREDICTIONS),
            ("role_emptying", ("migrate", "wait")),
            ("profile_at_start", PROFILE_AT_START),
            ("roles", ROLES.names()),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise AresArgsError(
                    f"{flag_name(name)} is {value!r}; choose one of: {', '.join(choices)}."
                )

    def dilated(self) -> AresArgs:
        """With the intervals that policies go by in seconds of the wall, not emulated ones."""
        times = {name: getattr(self, name) * self.time_dilation for name in _POLICY_TIMES}
        return dataclasses.replace(self, **times)

    @property
    def why_not_by_slo(self) -> str | None:
        """What keeps these flags from an admission by SLO, and the remedy."""
        if not self.ttft_slo_ms:
            return f"--ares-admission {SLO} goes by what is promised; set --ares-ttft-slo-ms."
        if self.roles != "static":
            return (
                f"--ares-admission {SLO} keeps requests from the workers, and --ares-roles "
                f"{self.roles} forecasts by what waits there; leave one of them out."
            )
        return None

    @property
    def total_workers(self) -> int:
        """Prefill and decode workers together."""
        return self.prefill_workers + self.decode_workers

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        """Add every flag to ``parser``, as a group of its own."""
        group = parser.add_argument_group(
            "ARES", "The cluster of prefill and decode workers, and the moves between them."
        )
        for f in dataclasses.fields(cls):
            options = dict(f.metadata)
            help_text = options.pop("help")
            if isinstance(f.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            else:
                options["type"] = type(f.default)
            group.add_argument(
                flag_name(f.name),
                dest=f"ares_{f.name}",
                default=f.default,
                help=f"{help_text} Default: {f.default}.",
                **options,
            )

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> AresArgs:
        """The flags of a parsed command line."""
        return cls(
            **{f.name: getattr(namespace, f"ares_{f.name}") for f in dataclasses.fields(cls)}
        )

    @classmethod
    def pop_from_kwargs(cls, kwargs: dict[str, Any]) -> AresArgs:
        """Take the ``ares_*`` keyword arguments out of ``kwargs``; unknown ones are an error."""
        given = {k: kwargs.pop(k) for k in list(kwargs) if k.startswith("ares_")}
        known = {f"ares_{f.name}": f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise AresArgsError(
                f"unknown keyword argument {unknown[0]!r}; known are: {', '.join(sorted(known))}."
            )
        return cls(**{known[k]: v for k, v in given.items()})


def flag_name(field_name: str) -> str:
    """``decode_workers`` → ``--ares-decode-workers``."""
    return "--ares-" + field_name.replace("_", "-")
