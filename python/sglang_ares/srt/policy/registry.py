"""Finds policies by name; the command line's choices come from here too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from sglang_ares.srt.policy.types import Move, NewRequest, RescheduleLimits, WorkerLoad


class PlacementPolicy(Protocol):
    """Chooses one of ``workers`` (at least one, all of one role) for ``request``; its id."""

    def __call__(self, request: NewRequest, workers: Sequence[WorkerLoad]) -> int: ...


class ReschedulingPolicy(Protocol):
    """Plans moves between ``workers`` (decode workers only), best first."""

    def __call__(
        self, workers: Sequence[WorkerLoad], limits: RescheduleLimits
    ) -> tuple[Move, ...]: ...


PolicyT = TypeVar("PolicyT")


class Registry(Generic[PolicyT]):
    """Name to policy, in order of registration."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._policies: dict[str, PolicyT] = {}

    def register(self, name: str) -> Callable[[PolicyT], PolicyT]:
        """Decorator: make the policy available as ``name``."""

        def add(policy: PolicyT) -> PolicyT:
            if name in self._policies:
                raise ValueError(f"{self._kind} policy {name!r} is registered twice")
            self._policies[name] = policy
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


PLACEMENT: Registry[PlacementPolicy] = Registry("placement")
RESCHEDULING: Registry[ReschedulingPolicy] = Registry("rescheduling")
