"""A checksum over the KV that a migration sends, computed at both ends (``--ares-kv-checksum``).

Upstream has one for prefill to decode, which exists as a CUDA kernel only. This one copies the
tokens' KV to the host and takes its CRC-32 there: tens of milliseconds for each 100 MB, at both
ends, while the request does not decode. For finding faulty hardware, not for every day.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

# Tokens copied at once.
_CHUNK = 4096


def kv_buffers(pool: Any) -> list[torch.Tensor]:
    """All of a pool's buffers, in the order of the layers; the first axis is the token's slot."""
    if hasattr(pool, "kv_buffer"):  # latent attention: one buffer a layer
        return list(pool.kv_buffer)
    return [*pool.k_buffer, *pool.v_buffer]


def kv_checksum(buffers: list[torch.Tensor], slots: torch.Tensor) -> int:
    """CRC-32 of the KV at ``slots``, in this order, layer by layer."""
    crc = 0
    for buffer in buffers:
        for chunk in slots.split(_CHUNK):
            rows = buffer[chunk].contiguous().view(torch.uint8).cpu().numpy()
            crc = zlib.crc32(rows, crc)
    return crc
