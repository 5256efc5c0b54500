"""Whether the tensor-parallel ranks of a worker went through the same migrations alike."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from sglang_ares.srt.disaggregation.migration import Migration


class TransitionDigest:
    """A running checksum of every transition of every migration that ended on this rank.

    Transitions count with their time, which is rank 0's clock on all ranks: equal digests mean
    equal transitions in equal steps, and an equal order of the endings.
    """

    def __init__(self) -> None:
        self.value = 0
        self.migrations = 0

    def add(self, record: Migration) -> None:
        """A migration has ended here."""
        line = f"{record.migration_id} {record.rid} {record.history}"
        self.value = zlib.crc32(line.encode(), self.value)
        self.migrations += 1

    def agrees(self, group: Any) -> bool:
        """Whether all ranks of ``group`` hold the same digest; all must ask in the same step."""
        if torch.distributed.get_world_size(group) == 1:
            return True
        # The least of x and of -x over the ranks are opposite only where all x are equal.
        here = torch.tensor([self.value, -self.value, self.migrations, -self.migrations])
        torch.distributed.all_reduce(here, op=torch.distributed.ReduceOp.MIN, group=group)
        least, greatest, fewest, most = here.tolist()
        return least == -greatest and fewest == -most
