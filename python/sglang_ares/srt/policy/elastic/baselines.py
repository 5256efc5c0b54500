"""What elastic roles are compared with: fixed roles, and requests placed by load or in turn."""

from __future__ import annotations

from sglang_ares.srt.policy.elastic.decisions import (
    REQUEST_SCHEDULING,
    ROLES,
    Assignment,
    Flip,
    FlipMemory,
    Moment,
    RequestScheduling,
)


@ROLES.register("static")
def keep_roles(moment: Moment) -> tuple[Flip | None, FlipMemory]:
    """Never a flip."""
    return None, moment.memory


def least_prefill(prompt_ms: float, moment: Moment) -> Assignment:
    """The prefill worker with the least prefill work, in predicted time."""
    rows = moment.instances.pool(decodes=False)
    return Assignment(int(rows[moment.instances.prefill_ms[rows].argmin()]))


def least_decode(tokens: int, prefill_row: int, moment: Moment) -> Assignment:
    """The decode worker with the fewest resident tokens."""
    rows = moment.instances.pool(decodes=True)
    return Assignment(int(rows[moment.instances.decode_tokens[rows].argmin()]))


def prefill_in_turn(prompt_ms: float, moment: Moment) -> Assignment:
    """The prefill worker whose turn it is."""
    rows = moment.instances.pool(decodes=False)
    return Assignment(int(rows[moment.sequence % len(rows)]))


def decode_in_turn(tokens: int, prefill_row: int, moment: Moment) -> Assignment:
    """The decode worker whose turn it is."""
    rows = moment.instances.pool(decodes=True)
    return Assignment(int(rows[moment.sequence % len(rows)]))


REQUEST_SCHEDULING.register("minimal_load")(RequestScheduling(least_prefill, least_decode))
REQUEST_SCHEDULING.register("round_robin")(RequestScheduling(prefill_in_turn, decode_in_turn))
