"""Upstream's load snapshots (``/v1/loads``), one slot per worker instead of per DP rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from sglang.srt.managers.load_snapshot import (
    ShmLoadSnapshotReader,
    ShmLoadSnapshotWriter,
    shm_path_for,
)
from sglang.srt.runtime_context import get_observability

if TYPE_CHECKING:
    from sglang.srt.managers.load_snapshot import LoadSnapshot

    from sglang_ares.srt.managers.worker_spec import WorkerSpec


class WorkerLoadWriter(ShmLoadSnapshotWriter):
    """Writes a worker's snapshots into its slot; its id takes the place of the DP rank."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(
            shm_path_for(spec.loads_instance_id),
            spec.cluster_size,
            spec.worker_id,
            get_observability().load_snapshot_publish_interval,
        )

    def write(self, snapshot: LoadSnapshot) -> None:
        """Publish ``snapshot``."""
        super().write(msgspec.structs.replace(snapshot, dp_rank=self.dp_rank))


def cluster_load_reader(instance_id: str, cluster_size: int) -> ShmLoadSnapshotReader:
    """Reads the snapshots of all workers."""
    return ShmLoadSnapshotReader(shm_path_for(instance_id), cluster_size)
