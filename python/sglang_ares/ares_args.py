"""The ``--ares-*`` flags: one frozen dataclass, read once and handed down."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sglang_ares.srt.policy import placement, rescheduling  # noqa: F401  (they register)
from sglang_ares.srt.policy.registry import PLACEMENT, RESCHEDULING


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
    rescheduling: str = _flag(
        "reactive",
        "How running requests are moved between decode workers.",
        choices=RESCHEDULING.names(),
    )
    reschedule_interval: float = _flag(1.0, "Seconds between two rescheduling rounds.", metavar="S")
    report_interval: float = _flag(
        0.2, "Seconds between two load reports of a worker.", metavar="S"
    )
    reschedule_threshold: float = _flag(
        0.1,
        "A decode worker is overloaded when its resident tokens exceed the mean by this share.",
    )
    max_moves: int = _flag(2, "Most moves that one rescheduling round may start.")
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
    control_host: str = _flag(
        "127.0.0.1",
        "Address the control sockets listen on. On loopback they are ipc sockets; any other "
        "address, or 0.0.0.0, makes them tcp sockets, which need --ares-curve-keys.",
        metavar="HOST",
    )
    control_port: int = _flag(
        0,
        "First TCP port of the control sockets: this one for queries, the next for reports, then "
        "one per worker. 0: free ones if tcp is needed at all.",
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
            "worker_timeout",
            "worker_start_timeout",
        ):
            value = getattr(self, name)
            if not value > 0:
                raise AresArgsError(f"{flag_name(name)} is {value}; it must be above 0 seconds.")
        if not 0 <= self.memory_floor < 1:
            raise AresArgsError(
                f"{flag_name('memory_floor')} is {self.memory_floor}; it must be a share of the "
                "KV capacity, from 0 to below 1."
            )
        for name in ("reschedule_threshold", "move_cooldown", "migration_bandwidth"):
            value = getattr(self, name)
            if not value >= 0:
                raise AresArgsError(f"{flag_name(name)} is {value}; it must not be negative.")
        if not 0 < self.migration_memory_share <= 1:
            raise AresArgsError(
                f"--ares-migration-memory-share is {self.migration_memory_share}; "
                "it must be above 0 and at most 1."
            )
        for name, choices in (
            ("placement", PLACEMENT.names()),
            ("rescheduling", RESCHEDULING.names()),
            ("migration_copy", ("live", "stopped")),
            ("decode_radix_cache", ("on", "off")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise AresArgsError(
                    f"{flag_name(name)} is {value!r}; choose one of: {', '.join(choices)}."
                )

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
