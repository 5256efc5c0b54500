"""The checksum over moved KV: what it notices, and what a mismatch does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_ares.srt.disaggregation.kv_checksum import kv_buffers, kv_checksum
from sglang_ares.srt.disaggregation.migration import COMPLETED, FAILED, MigrationLimits
from unit.migration_world import World

SLOTS = torch.tensor([7, 3, 4, 12])


def buffers(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(20, 2, 4, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_byte_of_the_slots_counts_and_no_other(dtype: torch.dtype) -> None:
    layers = buffers(dtype)
    before = kv_checksum(layers, SLOTS)
    for layer in layers:
        raw = layer.view(torch.uint8)
        for slot in (7, 12):
            raw[slot, 1, -1] ^= 1
            assert kv_checksum(layers, SLOTS) != before
            raw[slot, 1, -1] ^= 1
        raw[5] ^= 1
    assert kv_checksum(layers, SLOTS) == before


def test_it_is_the_same_wherever_the_tokens_are() -> None:
    here, there = buffers(torch.float32), [torch.zeros(20, 2, 4) for _ in range(3)]
    elsewhere = torch.tensor([1, 19, 0, 5])
    for a, b in zip(here, there, strict=True):
        b[elsewhere] = a[SLOTS]
    assert kv_checksum(there, elsewhere) == kv_checksum(here, SLOTS)
    assert kv_checksum(there, elsewhere.flip(0)) != kv_checksum(here, SLOTS)


def test_many_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_ares.srt.disaggregation import kv_checksum as module

    layers = [b[:, :1, :1] for b in buffers(torch.float32)]
    whole = kv_checksum(layers, torch.arange(20))
    monkeypatch.setattr(module, "_CHUNK", 3)
    assert kv_checksum(layers, torch.arange(20)) == whole


def test_the_buffers_of_both_kinds_of_pool() -> None:
    k, v = buffers(torch.float32)[:1], buffers(torch.float32)[1:2]
    pool: Any = SimpleNamespace(k_buffer=k, v_buffer=v)
    assert [id(b) for b in kv_buffers(pool)] == [id(k[0]), id(v[0])]
    assert [id(b) for b in kv_buffers(SimpleNamespace(kv_buffer=k))] == [id(k[0])]


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_request_whose_kv_arrived_wrong_stays(flipped: bool, prefix: int) -> None:
    limits = MigrationLimits(
        timeout_s=5.0, headroom_tokens=8, final_tokens=2, max_inbound=2, kv_checksum=True
    )
    world = World(limits=limits, prefix_tokens=prefix)
    world.submit("r", max_new=80)
    migration_id = world.start("r", 0, 1)
    target = world.workers[1]
    if flipped:
        adopted = target.manager.tick

        def corrupt(now: float) -> None:
            for migration in target.manager.inbound.values():
                if migration._commit is not None or (
                    migration.poller is not None and migration._receiver.complete
                ):
                    assert migration._req is not None
                    target.memory.write(migration._req, 4, "a flipped byte")
            adopted(now)

        target.manager.tick = corrupt  # type: ignore[method-assign]
    world.settle()
    world.check_quiet()
    result = world.result(migration_id)
    if flipped:
        assert (result.outcome, result.reason) == (FAILED, "checksum mismatch")
        assert world.owner("r") == 0
    else:
        assert result.outcome == COMPLETED and world.owner("r") == 1
    world.run_out()


def test_without_the_flag_nothing_is_computed() -> None:
    world = World()
    world.submit("r", max_new=80)
    migration_id = world.start("r", 0, 1)

    def never(*_: Any) -> int:
        raise AssertionError("a checksum was computed")

    for worker in world.workers:
        worker.link.checksum = never  # type: ignore[method-assign]
    world.settle()
    assert world.result(migration_id).outcome == COMPLETED
