"""Whether two runs gave the same answers, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_ares.bench.replay import RequestResult


@dataclass(frozen=True)
class Mismatch:
    """The first place where an answer differs from the reference.

    ``position`` counts output tokens from 0; a token is None where that answer had ended.
    """

    rid: str
    position: int
    expected: int | None
    got: int | None

    def __str__(self) -> str:
        return (
            f"{self.rid} differs first at output token {self.position}: "
            f"expected {self.expected}, got {self.got}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first index at which two token sequences differ; None for equal ones."""
    for position, (a, b) in enumerate(zip(expected, got, strict=False)):
        if a != b:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def mismatches(
    reference: Sequence[RequestResult], results: Sequence[RequestResult]
) -> list[Mismatch]:
    """Answers that differ from the reference's, in the order of ``results``.

    Requests that failed in either run have no answer to compare; they are counted as failed.
    """
    expected = {r.rid: r for r in reference}
    unknown = [r.rid for r in results if r.rid not in expected]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not in the reference run; replay one workload twice")
    found = []
    for result in results:
        other = expected[result.rid]
        if not (result.completed and other.completed):
            continue
        position = first_difference(other.token_ids, result.token_ids)
        if position is not None:
            found.append(
                Mismatch(
                    rid=result.rid,
                    position=position,
                    expected=_at(other.token_ids, position),
                    got=_at(result.token_ids, position),
                )
            )
    return found


def _at(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
