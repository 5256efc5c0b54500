"""Tokens of a request in order, whichever worker's message comes first."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.detokenizer_manager import LimitedCapacityDict
from sglang.srt.managers.io_struct import (
    BatchTokenIDOutput,
    PickleWrapper,
    unwrap_from_pickle,
    wrap_as_pickle,
)

from sglang_ares.srt.managers.detokenizer_manager import AresDetokenizerManager, InOrder, select
from sglang_ares.srt.managers.io_struct import FenceRequests
from sglang_ares.srt.managers.token_ledger import TokenLedger


def batch_of(*items: tuple[str, list[int], int, bool], **fields: Any) -> BatchTokenIDOutput:
    """A worker's message: (rid, new tokens, tokens before them, finished) for each request."""
    values: dict[str, Any] = {
        f.name: None for f in msgspec.structs.fields(BatchTokenIDOutput) if f.required
    }
    values |= {
        "rids": [rid for rid, *_ in items],
        "output_ids": [array("q", tokens) for _, tokens, _, _ in items],
        "completion_tokens": [before + len(tokens) for _, tokens, before, _ in items],
        "finished_reasons": [{"type": "stop"} if end else None for *_, end in items],
        "decoded_texts": [rid for rid, *_ in items],
    }
    return BatchTokenIDOutput(**(values | fields))


def contents(batches: list[BatchTokenIDOutput]) -> list[tuple[str, list[int]]]:
    return [
        (rid, list(tokens))
        for batch in batches
        for rid, tokens in zip(batch.rids, batch.output_ids, strict=True)
    ]


def test_what_is_in_order_passes_untouched() -> None:
    order = InOrder()
    for batch in (
        batch_of(("a", [0], 0, False), ("b", [0, 1], 0, False)),
        batch_of(("b", [2], 2, False), ("a", [1], 1, True)),
    ):
        (passed,) = order.admit(batch)
        assert passed is batch
    assert order.held == 0


def test_what_comes_early_waits_and_its_neighbours_do_not() -> None:
    order = InOrder()
    order.admit(batch_of(("moved", [0, 1], 0, False)))
    early = batch_of(("x", [0], 0, False), ("moved", [3, 4], 3, False), ("y", [0], 0, True))
    assert contents(order.admit(early)) == [("x", [0]), ("y", [0])]
    assert order.held == 1
    assert contents(order.admit(batch_of(("moved", [2], 2, False)))) == [
        ("moved", [2]),
        ("moved", [3, 4]),
    ]
    assert order.held == 0


def test_nothing_is_passed_on_when_all_is_early() -> None:
    order = InOrder()
    assert order.admit(batch_of(("a", [1], 1, True))) == []
    assert contents(order.admit(batch_of(("a", [0], 0, False)))) == [("a", [0]), ("a", [1])]


def test_an_abort_without_new_tokens_waits_for_the_tokens_before_it() -> None:
    order = InOrder()
    order.admit(batch_of(("a", [0], 0, False)))
    assert order.admit(batch_of(("a", [], 3, True))) == []
    assert contents(order.admit(batch_of(("a", [1, 2], 1, False)))) == [("a", [1, 2]), ("a", [])]


def test_an_empty_batch_passes() -> None:
    batch = batch_of()
    assert InOrder().admit(batch) == [batch]


def test_a_rid_may_be_used_again() -> None:
    order = InOrder()
    for _ in range(2):
        assert len(order.admit(batch_of(("a", [0, 1], 0, False)))) == 1
        assert len(order.admit(batch_of(("a", [2], 2, True)))) == 1


def test_memory_is_bounded() -> None:
    order = InOrder(capacity=3)
    for i in range(50):
        order.admit(batch_of((f"r{i}", [0], 0, False)))
        order.admit(batch_of((f"r{i}", [9], 9, False)))
    assert order.held <= 3 and len(order._passed) <= 3


def test_requests_that_never_began_are_forgotten_too() -> None:
    """Their first tokens were lost with a worker; only what came early is known of them."""
    order = InOrder(capacity=3)
    for i in range(50):
        order.admit(batch_of((f"r{i}", [9], 9, False)))
    assert order.held <= 3


@settings(max_examples=150)
@given(st.data())
def test_any_interleaving_of_connections_comes_out_in_order(data: Any) -> None:
    """Each request's tokens are spread over connections by its moves; each connection keeps its
    order, the connections among each other none."""
    connections: list[list[list[tuple[str, list[int], int, bool]]]] = [[], [], []]
    lengths: dict[str, int] = {}
    for r in range(data.draw(st.integers(1, 3))):
        rid, sent = f"r{r}", 0
        lengths[rid] = data.draw(st.integers(1, 12))
        while sent < lengths[rid]:
            worker = data.draw(st.integers(0, 2))
            count = data.draw(st.integers(1, lengths[rid] - sent))
            item = (rid, list(range(sent, sent + count)), sent, sent + count == lengths[rid])
            sent += count
            queue = connections[worker]
            last = queue[-1] if queue else None
            if last is not None and all(i[0] != rid for i in last) and data.draw(st.booleans()):
                last.append(item)  # one message carries several requests
            else:
                queue.append([item])
    order = InOrder()
    streams: dict[str, list[int]] = {rid: [] for rid in lengths}
    ended: list[str] = []
    while any(connections):
        queue = data.draw(st.sampled_from([c for c in connections if c]))
        for batch in order.admit(batch_of(*queue.pop(0))):
            for rid, tokens, end in zip(
                batch.rids, batch.output_ids, batch.finished_reasons, strict=True
            ):
                assert rid not in ended
                streams[rid] += list(tokens)
                if end:
                    ended.append(rid)
    assert streams == {rid: list(range(n)) for rid, n in lengths.items()}
    assert sorted(ended) == sorted(lengths)
    assert order.held == 0 and not order._passed


# --- texts ----------------------------------------------------------------------------------


class Letters:
    """A tokenizer: token 0 is "a"."""

    is_fast = True

    def batch_decode(self, ids: list[list[int]], **_: bool) -> list[str]:
        return ["".join(chr(97 + i) for i in row) for row in ids]


class Texts:
    """The detokenizer and its clients. A prompt is always "xyz"; the first message of each attempt
    has it, as upstream's has."""

    def __init__(self) -> None:
        self.detokenizer = AresDetokenizerManager.__new__(AresDetokenizerManager)
        self.detokenizer.tokenizer, self.detokenizer.vocab_size = Letters(), 26
        self.detokenizer.disable_tokenizer_batch_decode = False
        self.detokenizer.decode_status = LimitedCapacityDict(capacity=100)
        self.detokenizer._in_order, self.detokenizer._ledger = InOrder(), TokenLedger()
        self.began: set[str] = set()

    def hear(self, *items: tuple[str, list[int], int, bool]) -> dict[str, str]:
        """What the clients get now."""
        names = [name for name, *_ in items]
        new = [([] if name in self.began else [23, 24, 25]) + ids for name, ids, *_ in items]
        self.began.update(names)
        count = len(items)
        columns: dict[str, Any] = {
            "decode_ids": new,
            "read_offsets": [3] * count,
            "decoded_texts": [""] * count,
            "cached_tokens": [0] * count,
            "reasoning_tokens": [0] * count,
            "skip_special_tokens": [True] * count,
            "spaces_between_special_tokens": [True] * count,
            "no_stop_trim": [False] * count,
        }
        said = self.detokenizer.handle_batch_token_id_out(batch_of(*items, **columns))
        assert said is not None
        return dict(zip(said.rids, said.output_strs, strict=True))


def test_a_rid_used_again_begins_a_text_of_its_own() -> None:
    """The controller ended the first request with an error, of which nothing is heard here."""
    texts = Texts()
    assert texts.hear(("r#00", [0, 1], 0, False), ("x#00", [0], 0, False)) == {"r": "ab", "x": "a"}
    texts.detokenizer._ledger.fence(FenceRequests(fence_id=1, attempts={"r": 1}))
    assert texts.hear(("x#00", [1], 1, False), ("r#02", [2], 0, False)) == {"x": "b", "r": "c"}
    assert texts.hear(("r#02", [3, 4], 1, True), ("x#00", [2], 2, True)) == {"r": "de", "x": "c"}
    assert not texts.detokenizer.decode_status


def test_a_recovered_request_goes_on_with_its_text() -> None:
    texts = Texts()
    assert texts.hear(("r#00", [0, 1], 0, False)) == {"r": "ab"}
    texts.detokenizer._ledger.fence(FenceRequests(fence_id=1, attempts={"r": 1}))
    texts.began.add("r#01")  # it says what its prompt is no second time
    assert texts.hear(("r#01", [2], 2, False)) == {"r": "c"}
    assert texts.hear(("r#01", [3], 3, True)) == {"r": "d"}


# --- cutting a batch ------------------------------------------------------------------------


def test_select_cuts_every_field_that_has_a_value_per_item() -> None:
    fields: dict[str, Any] = {}
    for field in msgspec.structs.fields(BatchTokenIDOutput):
        fields[field.name] = [f"{field.name}-{i}" for i in range(3)]
    fields["http_worker_ipcs"] = ["ipc-0", "ipc-1", "ipc-2"]
    fields["customized_info"] = wrap_as_pickle({"probe": ["p0", "p1", "p2"]})
    fields["time_stats"] = wrap_as_pickle(["t0", "t1", "t2"])
    whole = BatchTokenIDOutput(**fields)
    part = select(whole, [2, 0])
    for name, value in msgspec.structs.asdict(part).items():
        if isinstance(value, PickleWrapper):
            value = unwrap_from_pickle(value)
        if isinstance(value, dict):
            value = value["probe"]
        assert [v[-1] for v in value] == ["2", "0"], name
    assert whole.rids == ["rids-0", "rids-1", "rids-2"]


def test_select_leaves_fields_of_the_whole_batch() -> None:
    batch = batch_of(("a", [0], 0, False), ("b", [0], 0, False), weight_versions=None)
    part = select(batch, [1])
    assert part.rids == ["b"] and part.weight_versions is None
    assert type(part) is BatchTokenIDOutput


@pytest.mark.parametrize("items", [[], [0], [1, 0]])
def test_select_keeps_the_fields_together(items: list[int]) -> None:
    batch = batch_of(("a", [4, 5], 3, False), ("b", [7], 0, True))
    part = select(batch, items)
    assert part.rids == [batch.rids[i] for i in items]
    assert part.completion_tokens == [batch.completion_tokens[i] for i in items]
    assert part.decoded_texts == part.rids
