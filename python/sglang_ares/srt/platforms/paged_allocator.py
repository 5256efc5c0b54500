"""KV pages of more than one token on a CPU: upstream's paged allocator without its kernels.

Upstream hands out pages with Triton kernels, which need an accelerator. Here the same pages are
handed out in the same order with plain tensor operations.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):
    """Hands out KV slots in whole pages; every page belongs to one request."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for tokens [prefix, sequence) of every request, its last page filled first.

        Lengths and ``last_loc`` (the slot of the last token of the prefix, -1 if there is none):
        integers [requests]. Returns slots, int64 [extend_num_tokens], or None if there are too few.
        """
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if not self._have_pages(num_new_pages):
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
        alloc_extend_naive(
            prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device
        )
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """A slot for the last token of every request: the next of its page, or a new page's first.

        ``seq_lens`` counts the new token; shapes, dtypes and None as in :meth:`alloc_extend`.
        """
        starts_page = seq_lens % self.page_size == 1
        num_new_pages = int(starts_page.sum())
        if not self._have_pages(num_new_pages):
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[starts_page] = self.free_pages[:num_new_pages] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def _have_pages(self, count: int) -> bool:
        if count > len(self.free_pages):
            self.merge_and_sort_free()
        return count <= len(self.free_pages)
