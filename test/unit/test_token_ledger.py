"""The token ledger: one attempt speaks, and what went out is known exactly."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import BatchTokenIDOutput

from sglang_ares.srt.disaggregation.request_state import unpack_ids
from sglang_ares.srt.managers.detokenizer_manager import InOrder
from sglang_ares.srt.managers.io_struct import EmittedTokens, Fenced, FenceRequests
from sglang_ares.srt.managers.token_ledger import TokenLedger


def batch_of(*items: tuple[str, list[int], int, bool], **fields: Any) -> BatchTokenIDOutput:
    """A worker's message: (attempt, new tokens, tokens before them, finished) for each request."""
    values: dict[str, Any] = {
        f.name: None for f in msgspec.structs.fields(BatchTokenIDOutput) if f.required
    }
    values |= {
        "rids": [name for name, *_ in items],
        "output_ids": [array("q", tokens) for _, tokens, _, _ in items],
        "completion_tokens": [before + len(tokens) for _, tokens, before, _ in items],
        "finished_reasons": [{"type": "stop"} if end else None for *_, end in items],
        "cached_tokens": [5] * len(items),
        "reasoning_tokens": [len(tokens) + before for _, tokens, before, _ in items],
    }
    return BatchTokenIDOutput(**(values | fields))


class Line:
    """The ledger as the detokenizer uses it, and the client behind it."""

    def __init__(self, capacity: int = 1 << 16) -> None:
        self.ledger = TokenLedger(capacity)
        self.order = InOrder()
        self.streams: dict[str, list[int]] = {}
        self.ended: list[str] = []
        self._fences = 0

    def hear(self, *items: tuple[str, list[int], int, bool]) -> None:
        batch = self.ledger.admit(batch_of(*items))
        if not batch.rids:
            return
        for ordered in self.order.admit(batch):
            self.ledger.record(ordered)
            for i, rid in enumerate(ordered.rids):
                self.streams.setdefault(rid, []).extend(ordered.output_ids[i])
                if ordered.finished_reasons[i] is not None:
                    self.ended.append(rid)

    def fence(self, **attempts: int) -> dict[str, EmittedTokens]:
        self._fences += 1
        for rid in attempts:
            self.order.forget_early(rid)
        answer = self.ledger.fence(FenceRequests(fence_id=self._fences, attempts=attempts))
        assert isinstance(answer, Fenced) and answer.fence_id == self._fences
        assert [e.rid for e in answer.requests] == list(attempts)
        return {e.rid: e for e in answer.requests}


def tokens(emitted: EmittedTokens) -> list[int]:
    return list(unpack_ids(emitted.output_ids))


# --- who may speak --------------------------------------------------------------------------


def test_the_client_sees_its_own_rid() -> None:
    ledger = TokenLedger()
    batch = ledger.admit(batch_of(("a#00", [1], 0, False), ("b#00", [2], 0, True)))
    assert batch.rids == ["a", "b"] and ledger.fenced_off == 0


def test_what_was_never_renamed_passes() -> None:
    batch = TokenLedger().admit(batch_of(("HEALTH_CHECK_1", [1], 0, True)))
    assert batch.rids == ["HEALTH_CHECK_1"]


def test_behind_a_fence_only_the_new_attempt_speaks() -> None:
    line = Line()
    line.hear(("r#00", [0, 1], 0, False))
    assert tokens(line.fence(r=1)["r"]) == [0, 1]
    line.hear(("r#00", [2], 2, False))  # the dead worker's last words
    assert line.streams["r"] == [0, 1] and line.ledger.fenced_off == 1
    line.hear(("r#01", [2, 3], 2, True))
    assert line.streams["r"] == [0, 1, 2, 3] and line.ended == ["r"]


def test_an_end_that_comes_too_late_ends_nothing() -> None:
    line = Line()
    line.hear(("r#00", [0], 0, False))
    line.fence(r=1)
    line.hear(("r#00", [], 1, True))
    assert not line.ended
    line.hear(("r#01", [1], 1, True))
    assert line.ended == ["r"]


def test_a_void_attempt_does_not_silence_its_neighbours() -> None:
    line = Line()
    line.fence(void=1)
    line.hear(("x#00", [7], 0, False), ("void#00", [8], 0, False), ("y#00", [9], 0, True))
    assert line.streams == {"x": [7], "y": [9]} and line.ledger.fenced_off == 1


def test_a_batch_of_void_attempts_only_is_empty() -> None:
    ledger = TokenLedger()
    ledger.fence(FenceRequests(fence_id=1, attempts={"r": 3}))
    batch = ledger.admit(batch_of(("r#00", [1], 0, False), ("r#02", [1], 0, True)))
    assert batch.rids == [] and batch.output_ids == [] and ledger.fenced_off == 2


def test_what_waited_for_lost_tokens_does_not_follow_the_new_attempt() -> None:
    """Token 1 was lost with the source of a move; tokens 2 and 3 had overtaken it."""
    line = Line()
    line.hear(("r#00", [0], 0, False))
    line.hear(("r#00", [2, 3], 2, False))
    assert tokens(line.fence(r=1)["r"]) == [0], "what waits has not gone out"
    line.hear(("r#01", [1], 1, False))
    assert line.streams["r"] == [0, 1]
    line.hear(("r#01", [2, 3, 4], 2, True))
    assert line.streams["r"] == [0, 1, 2, 3, 4] and line.ended == ["r"]


# --- what went out --------------------------------------------------------------------------


def test_nothing_is_known_of_a_request_that_has_not_spoken() -> None:
    emitted = Line().fence(r=1)["r"]
    assert emitted == EmittedTokens(
        rid="r", ended=False, output_ids=b"", cached_tokens=0, reasoning_tokens=0
    )


def test_tokens_of_all_attempts_and_the_usage_so_far() -> None:
    line = Line()
    line.hear(("r#00", [10, 11], 0, False))
    line.fence(r=1)
    line.hear(("r#01", [12], 2, False))
    emitted = line.fence(r=2)["r"]
    assert tokens(emitted) == [10, 11, 12] and not emitted.ended
    assert (emitted.cached_tokens, emitted.reasoning_tokens) == (5, 3)


def test_an_ended_request_says_so() -> None:
    line = Line()
    line.hear(("r#00", [1, 2], 0, False))
    line.hear(("r#00", [3], 2, True))
    emitted = line.fence(r=1)["r"]
    assert emitted.ended and emitted.output_ids == b""


def test_several_requests_at_one_fence() -> None:
    line = Line()
    line.hear(("a#00", [1], 0, False), ("b#00", [2], 0, True), ("c#00", [3], 0, False))
    emitted = line.fence(b=1, a=1)
    assert (tokens(emitted["a"]), emitted["b"].ended) == ([1], True)
    line.hear(("c#00", [4], 1, False))
    assert line.streams["c"] == [3, 4], "it was not fenced"


def test_a_rid_may_be_used_again() -> None:
    line = Line()
    line.hear(("r#00", [1], 0, False))
    line.fence(r=1)
    line.hear(("r#01", [2], 1, True))
    line.hear(("r#00", [7], 0, False))
    assert tokens(line.fence(r=1)["r"]) == [7]


def test_a_rid_used_again_whose_worker_dies_before_the_first_token() -> None:
    """The end on record is that of the earlier request."""
    line = Line()
    line.hear(("r#00", [1], 0, True))
    request = FenceRequests(fence_id=1, attempts={"r": 2}, first_attempts={"r": 1})
    (emitted,) = line.ledger.fence(request).requests
    assert not emitted.ended and not emitted.output_ids


def test_memory_is_bounded() -> None:
    line = Line(capacity=4)
    for i in range(50):
        line.hear((f"r{i}#00", [1], 0, False))
        line.fence(**{f"s{i}": 1})
    assert len(line.ledger._entries) <= 4 and len(line.ledger._attempts) <= 4
    assert tokens(line.fence(r49=1)["r49"]) == [1]


def test_a_stream_is_remembered_however_many_requests_come_and_go_meanwhile() -> None:
    line = Line(capacity=4)
    line.hear(("long#00", [0], 0, False))
    for n in range(1, 20):
        line.hear((f"short{n}#00", [7], 0, False), (f"lost{n}#00", [7], 0, False))
        line.hear((f"short{n}#00", [8], 1, True))
        line.hear(("long#00", [n], n, False))
    emitted = line.fence(long=1)["long"]
    assert tokens(emitted) == line.streams["long"] == list(range(20)) and not emitted.incomplete


def test_an_end_is_remembered_while_many_requests_run() -> None:
    line = Line(capacity=4)
    line.hear(("r#00", [1], 0, True))
    for n in range(20):
        line.hear((f"s{n}#00", [7], 0, False))
    line.hear(("r#00", [2], 1, False))  # void, and late
    assert line.fence(r=1)["r"].ended


def test_what_is_forgotten_is_not_taken_for_the_whole_output() -> None:
    """More requests are live than the ledger can remember."""
    line = Line(capacity=4)
    for start in range(2):
        for n in range(5):
            line.hear((f"r{n}#00", [7], start, False))
    emitted = line.fence(r4=1)["r4"]
    assert emitted.incomplete and tokens(emitted) == [7]


# --- any history ----------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.data())
def test_the_client_gets_each_token_once(data: Any) -> None:
    """Attempts decode from what a fence said, on connections of their own that keep their order;
    void ones go on speaking; fences come at any time."""
    line = Line()
    length = data.draw(st.integers(1, 8))
    connections: list[list[tuple[str, list[int], int, bool]]] = []

    def begin(attempt: int, start: int) -> None:
        queue, sent = [], start
        while sent < length:
            count = data.draw(st.integers(1, length - sent))
            last = sent + count == length
            queue.append((f"r#{attempt:02d}", list(range(sent, sent + count)), sent, last))
            sent += count
        connections.append(queue)

    begin(0, 0)
    attempt = 0
    while "r" not in line.ended:
        if attempt < 4 and data.draw(st.integers(0, 3)) == 0:
            attempt += 1
            emitted = line.fence(r=attempt)["r"]
            assert tokens(emitted) == line.streams.get("r", [])
            begin(attempt, len(tokens(emitted)))
        speakers = [q for q in connections if q]
        line.hear(data.draw(st.sampled_from(speakers)).pop(0))
    assert line.streams["r"] == list(range(length)) and line.ended == ["r"]
    assert line.fence(r=attempt + 1)["r"].ended
