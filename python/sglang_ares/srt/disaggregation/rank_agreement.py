"""Whether the tensor-parallel ranks of a worker go through the same migrations alike."""

from __future__ import annotations

import zlib

from sglang_ares.srt.disaggregation.migration import Migration


class TransitionDigest:
    """A running checksum of every transition of every migration that ended on this rank.

    Transitions count with their time, which is rank 0's clock on all ranks: equal digests mean
    equal transitions in equal steps, and an equal order of the endings.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, record: Migration) -> None:
        """A migration has ended here."""
        line = f"{record.migration_id} {record.rid} {record.history}"
        self.value = zlib.crc32(line.encode(), self.value)
