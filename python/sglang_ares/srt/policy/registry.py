"""Finds policies by name; the command line's choices come from here too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from sglang_ares.srt.policy.snapshot import Snapshot, WorkerTable
from sglang_ares.srt.policy.types import Move, NewRequest, RescheduleLimits


class PlacementPolicy(Protocol):
    """Chooses one of ``workers`` (at least one, all of one role) for ``request``; its row."""

    def __call__(self, request: NewRequest, workers: WorkerTable) -> int: ...


class ReschedulingPolicy(Protocol):
    """Plans moves between the workers of ``cluster`` (decode workers only), best first."""

    def __call__(self, cluster: Snapshot, limits: RescheduleLimits) -> tuple[Move, ...]: ...


PolicyT = TypeVar("PolicyT")


class Registry(Generic[PolicyT]):
    """Name to policy, in order of registration."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._policies: dict[str, PolicyT] = {}
        self._simulated_only: set[str] = set()

    def register(self, name: str, *, simulated_only: bool = False) -> Callable[[PolicyT], PolicyT]:
        """Decorator: make the policy available as ``name``; ``simulated_only``: it needs to know
        what no controller does."""

        def add(policy: PolicyT) -> PolicyT:
            if name in self._policies:
                raise ValueError(f"{self._kind} policy {name!r} is registered twice")
            self._policies[name] = policy
            if simulated_only:
                self._simulated_only.add(name)
            return policy

        return add

    def get(self, name: str) -> PolicyT:
        """The policy called ``name``; :class:`KeyError` names the choices."""
        try:
            return self._policies[name]
        except KeyError:
            choices = ", ".join(self._policies)
            raise KeyError(
                f"unknown {self._kind} policy {name!r}; choose one of: {choices}"
            ) from None

    def names(self) -> tuple[str, ...]:
        """All names, in order of registration."""
        return tuple(self._policies)

    def served_names(self) -> tuple[str, ...]:
        """The names of those that a controller can run."""
        return tuple(name for name in self._policies if name not in self._simulated_only)


PLACEMENT: Registry[PlacementPolicy] = Registry("placement")
RESCHEDULING: Registry[ReschedulingPolicy] = Registry("rescheduling")
