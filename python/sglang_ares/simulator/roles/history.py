"""How roles went: the changes, and the pools over time above the load that was offered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_ares.bench.workloads.stream import RequestStream
from sglang_ares.profiles.profile import Profile
from sglang_ares.srt.policy.elastic.instances import Slo, max_tokens
from sglang_ares.srt.policy.snapshot import Floats
from sglang_ares.srt.policy.types import DECODE, PREFILL

# Names of the pools, in the order of their columns.
POOLS = (PREFILL, "prefill to decode", DECODE, "decode to prefill")


@dataclass
class FlipRecord:
    """One change, seconds since the start. ``cause``: ``plan``, ``prefill`` or ``decode`` (request
    scheduling). ``held``: requests on the worker at its start. ``done_s``: when it served in its
    new role; None if it never did."""

    start_s: float
    worker: int
    role: str
    cause: str
    reason: str
    held: int
    done_s: float | None = None
    outcome: str = "under way"


@dataclass
class RoleHistory:
    """``flips`` in order; ``refused``: counts by reason. ``pools``: ``(S, 4)`` workers of each of
    :data:`POOLS` at the result's ``sample_s``."""

    flips: list[FlipRecord] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def pools(self) -> Floats:
        """``(S, 4)``."""
        return np.array(self.samples, np.float64).reshape(len(self.samples), 4)

    def refuse(self, reason: str) -> None:
        """Count a change that was asked for and refused."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = FlipRecord.__dataclass_fields__
        return {
            "flips": [{name: getattr(flip, name) for name in names} for flip in self.flips],
            "refused": self.refused,
            "pools": {name: self.pools[:, i].tolist() for i, name in enumerate(POOLS)},
        }


def offered_load(
    stream: RequestStream, profile: Profile, slo: Slo, bin_s: float
) -> tuple[Floats, Floats, Floats]:
    """Workers that what arrives in each bin keeps busy: middle of the bins (s), with prefill, and
    with decode; all ``(B,)``.

    A request decodes for its output at the step time of a worker that holds all it may, and takes
    its mean size of that worker meanwhile.
    """
    edges = np.arange(0.0, float(stream.arrival_s[-1]) + bin_s, bin_s) if len(stream) else [0.0]
    prompt = stream.prompt_tokens.astype(np.float64)
    output = stream.output_tokens.astype(np.float64)
    law = profile.prefill
    prefill_s = (law.fixed_ms + law.per_token_ms * prompt + law.per_square_ms * prompt**2) / 1e3
    size = prompt + output / 2
    mean_size = float((size * output).sum() / max(1.0, output.sum())) or 1.0
    requests = profile.kv_capacity_tokens / mean_size
    most = max_tokens(profile.decode, requests, slo, profile.kv_capacity_tokens)
    step_s = profile.decode.ms(requests, most) / 1e3
    decode_s = output * step_s * size / max(1, most)
    columns = [
        np.histogram(stream.arrival_s, edges, weights=work)[0] / bin_s
        for work in (prefill_s, decode_s)
    ]
    middle = np.asarray(edges[:-1]) + bin_s / 2
    return middle, columns[0], columns[1]
