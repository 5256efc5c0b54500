"""Gives every request a sampling seed, so that any worker draws its next token alike."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

_REMEMBERED = 1024


class SampleSeeds:
    """The client's seed, or a random one. The samples of one ``n > 1`` request arrive as
    requests of their own with one seed; each gets another seed derived from it, in order."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()
        self._samples: OrderedDict[tuple[int, int], int] = OrderedDict()

    def seed_for(self, req: TokenizedGenerateReqInput) -> int:
        """A seed for ``req``, in [0, 2^62), or the client's own."""
        params = req.sampling_params
        if params.sampling_seed is None:
            return self._random.getrandbits(62)
        # Upstream first sends the prompt alone, with nothing to generate, to cache it.
        if params.n <= 1 or params.max_new_tokens == 0:
            return int(params.sampling_seed)
        key = (params.sampling_seed, hash(bytes(req.input_ids or b"")))
        sample = self._samples.pop(key, 0)
        if sample + 1 < params.n:
            self._samples[key] = sample + 1
            if len(self._samples) > _REMEMBERED:
                self._samples.popitem(last=False)
        if sample == 0:
            return int(params.sampling_seed)
        return random.Random(f"{params.sampling_seed}/{sample}").getrandbits(62)
