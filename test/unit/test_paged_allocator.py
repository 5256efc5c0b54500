"""KV pages on a CPU: each belongs to one request, and nothing is handed out twice or lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ares.srt.platforms.paged_allocator import CpuPagedAllocator

PAGES = 12


class Pool:
    """An allocator, and the slots of every sequence by position."""

    def __init__(self, page_size: int, need_sort: bool = True) -> None:
        self.page_size = page_size
        self.allocator = CpuPagedAllocator(
            PAGES * page_size, page_size, torch.float32, "cpu", None, need_sort
        )
        self.sequences: dict[int, list[int]] = {}

    def extend(self, grown: dict[int, int]) -> bool:
        """Give each sequence so many more tokens; whether there was room."""
        before = [self.sequences.get(i, []) for i in grown]
        prefix = torch.tensor([len(s) for s in before])
        total = prefix + torch.tensor(list(grown.values()))
        last = torch.tensor([s[-1] if s else -1 for s in before])
        slots = self.allocator.alloc_extend(prefix, prefix, total, total, last, sum(grown.values()))
        if slots is None:
            return False
        parts = torch.split(slots, list(grown.values()))
        for i, old, new in zip(grown, before, parts, strict=True):
            self.sequences[i] = old + new.tolist()
        return True

    def decode(self, ids: list[int]) -> bool:
        """Give each sequence one more token; whether there was room."""
        total = torch.tensor([len(self.sequences[i]) + 1 for i in ids])
        # As upstream has it: rows of slots are int32.
        last = torch.tensor([self.sequences[i][-1] for i in ids], dtype=torch.int32)
        slots = self.allocator.alloc_decode(total, total, last)
        if slots is None:
            return False
        assert slots.dtype == torch.int64
        for i, slot in zip(ids, slots.tolist(), strict=True):
            self.sequences[i].append(slot)
        return True

    def free(self, i: int) -> None:
        """Give a sequence's slots back."""
        self.allocator.free(torch.tensor(self.sequences.pop(i)))

    def pages_of(self, i: int) -> list[int]:
        """The pages of a sequence, in order, one entry per token."""
        return [slot // self.page_size for slot in self.sequences[i]]

    def check(self) -> None:
        """Every sequence fills its own pages in order; all other pages are free."""
        held: list[int] = []
        for i, slots in self.sequences.items():
            assert [s % self.page_size for s in slots] == [
                p % self.page_size for p in range(len(slots))
            ]
            pages = self.pages_of(i)
            assert pages == [pages[p // self.page_size * self.page_size] for p in range(len(pages))]
            held += pages[:: self.page_size]
        free = self.allocator.get_all_free_pages().tolist()
        assert sorted(held + free) == list(range(1, PAGES + 1))
        assert self.allocator.available_size() == len(free) * self.page_size


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([1, 4, 16]), st.booleans())
def test_pages_are_neither_shared_nor_lost(
    data: st.DataObject, page_size: int, need_sort: bool
) -> None:
    pool = Pool(page_size, need_sort)
    for number in range(data.draw(st.integers(1, 25))):
        ids = sorted(pool.sequences)
        some = st.lists(st.sampled_from(ids), min_size=1, unique=True) if ids else None
        action = data.draw(st.sampled_from(["new", "grow", "decode", "free"] if ids else ["new"]))
        before = pool.allocator.available_size()
        if action == "decode" and page_size > 1:
            assert some is not None
            chosen = data.draw(some)
            starting = sum(len(pool.sequences[i]) % page_size == 0 for i in chosen)
            assert pool.decode(chosen) == (starting * page_size <= before)
        elif action == "free":
            pool.free(data.draw(st.sampled_from(ids)))
        else:
            chosen = [number] if action == "new" or some is None else data.draw(some)
            grown = {i: data.draw(st.integers(1, 3 * page_size)) for i in chosen}
            lengths = [(len(pool.sequences.get(i, [])), n) for i, n in grown.items()]
            needed = sum(-(-(old + n) // page_size) - -(-old // page_size) for old, n in lengths)
            assert pool.extend(grown) == (needed * page_size <= before)
        pool.check()


@pytest.mark.parametrize("need_sort", [True, False])
def test_too_little_room_takes_nothing(need_sort: bool) -> None:
    pool = Pool(4, need_sort)
    assert pool.extend({0: 4 * (PAGES - 1)})
    assert not pool.extend({1: 5})
    assert pool.extend({1: 4})
    assert not pool.decode([0])
    pool.free(1)
    assert pool.decode([0])
    pool.check()


def test_a_sequence_decodes_within_its_page() -> None:
    """Neighbours in a batch do not take turns in memory: a copy sends runs, not single tokens."""
    pool = Pool(16)
    assert pool.extend({0: 3, 1: 5})
    for _ in range(10):
        assert pool.decode([0, 1])
    assert len(set(pool.pages_of(0))) == len(set(pool.pages_of(1))) == 1
