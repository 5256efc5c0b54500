"""Names of attempts: every rid a client can think of comes back as it was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.srt.managers.attempts import internal_rid, public_rid, split_rid
from sglang_ares.srt.managers.cluster_state import ClusterState
from sglang_ares.srt.managers.cluster_views import WorkerView

RIDS = st.text(max_size=20) | st.sampled_from(["", "#", "#00", "r#07", "r#07#08", "a\nb#01", "é#1"])

ROLES = ("prefill", "decode")


@given(rid=RIDS, attempt=st.integers(0, 10_000))
def test_a_name_says_which_attempt_at_which_request_it_is(rid: str, attempt: int) -> None:
    name = internal_rid(rid, attempt)
    assert split_rid(name) == (rid, attempt)
    assert public_rid(name) == rid


@given(
    first=st.tuples(RIDS, st.integers(0, 10_000)),
    second=st.tuples(RIDS, st.integers(0, 10_000)),
)
def test_different_attempts_have_different_names(
    first: tuple[str, int], second: tuple[str, int]
) -> None:
    assert (internal_rid(*first) == internal_rid(*second)) == (first == second)


@given(rid=RIDS, attempt=st.integers(0, 10_000))
def test_a_name_begins_with_the_rid(rid: str, attempt: int) -> None:
    """Upstream aborts by prefix."""
    assert internal_rid(rid, attempt).startswith(rid)


@pytest.mark.parametrize("name", ["HEALTH_CHECK_1", "r#7", "r#007x", "r# 1", "r#٣٤x", "r"])
def test_what_was_never_renamed_is_its_own_first_attempt(name: str) -> None:
    assert split_rid(name) == (name, 0)


def test_a_rid_that_is_used_again_gets_names_of_its_own() -> None:
    """Or a worker that was told to discard r#00 would drop the later request unheard."""
    state = ClusterState([WorkerView(i, role, [], 100) for i, role in enumerate(ROLES)])
    first = state.new_owner("r", None)
    first.prefill, first.decode = 0, 1
    state.note_dispatch(first, 1)
    first.attempt += 1
    state.forget("r")
    second = state.new_owner("r", None)
    assert second.name == "r#02" and second.first_attempt == 2
    assert state.new_owner("never recovered", None).name == "never recovered#00"


def test_a_rid_that_is_used_again_before_its_worker_has_told_of_the_end_goes_on_counting() -> None:
    """Its client had the end at once; reports come at intervals."""
    state = ClusterState([WorkerView(i, role, [], 100) for i, role in enumerate(ROLES)])
    first = state.new_owner("r", None)
    first.prefill, first.decode = 0, 1
    state.note_dispatch(first, 1)
    first.attempt += 1
    state.note_dispatch(first, 1)
    second = state.new_owner("r", None)
    assert second.name == "r#02" and second.first_attempt == 2
    assert not state.owners, "the first has ended"
    assert state.new_owner("r", None).name == "r#02", "the second was refused"
