"""What is collected offline is what a cluster collects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sglang_ares.srt.predictor.dataset import SPLITS, load_split

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

REQUESTS = 24
# Of a state's values, which are of size 1: float32 in batches of other sizes, kept as float16.
TOLERANCE = 2e-2


def collect(out: Path, *more: str) -> None:
    command = [
        *(sys.executable, "-m", "sglang_ares.predictor", "collect", "--out", str(out)),
        *("--requests", str(REQUESTS), "--max-new-tokens", "300", "--seed", "5", *more),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_offline_gives_the_clusters_data(tmp_path: Path) -> None:
    """Same requests, same lengths, same states."""
    collect(tmp_path / "cluster")
    collect(tmp_path / "offline", "--offline")
    seen = 0
    for split in SPLITS:
        cluster, offline = (load_split(tmp_path / n, split) for n in ("cluster", "offline"))
        assert cluster.requests == offline.requests
        order = np.argsort(cluster.rows, order=("request", "generated"))
        assert np.array_equal(cluster.rows[order], offline.rows)
        np.testing.assert_allclose(cluster.states[order], offline.states, atol=TOLERANCE)
        seen += len(offline.requests)
    assert seen == REQUESTS
