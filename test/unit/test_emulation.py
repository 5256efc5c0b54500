"""The emulated device and its tokens: step times follow the profile, tokens follow the request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_ares.ares_args import AresArgs, AresArgsError
from sglang_ares.profiles.profile import PrefillTime, Profile
from sglang_ares.srt.emulation.device import EmulatedDevice
from sglang_ares.srt.emulation.forward import EmulatedForward, next_tokens
from sglang_ares.srt.emulation.predictions import EmulatedPredictions
from sglang_ares.srt.emulation.settings import emulated_server_args, not_emulated, profile_of
from sglang_ares.srt.policy.types import StepTime

PROFILE = Profile(
    name="toy",
    hardware="none",
    model="none",
    source="made up for tests",
    decode=StepTime(fixed_ms=10, per_request_ms=1, per_token_ms=0.01),
    prefill=PrefillTime(fixed_ms=5, per_token_ms=0.1, per_square_ms=0.001),
    kv_capacity_tokens=1000,
    kv_bytes_per_token=100,
    link_bytes_per_s=1e6,
    move_fixed_ms=0,
    move_pause_ms=0,
    transfer_fixed_ms=0,
    max_running=16,
    chunked_prefill_tokens=256,
)


class World:
    """A clock that moves while the device sleeps, and when the test says so."""

    def __init__(self, dilation: float = 1.0) -> None:
        self.now = 100.0
        self.device = EmulatedDevice(PROFILE, dilation, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_a_decode_step_takes_what_the_law_says() -> None:
    world = World()
    world.device.decode(4, 200)
    assert world.now == pytest.approx(100 + 0.016)


def test_a_prefill_step_counts_its_fixed_part_once_and_only_the_new_tokens() -> None:
    """Two whole prompts, and a chunk of a third whose first 50 tokens were computed before."""
    world = World()
    world.device.prefill([(0, 10), (0, 20), (50, 100)])
    ms = 5 + 0.1 * 80 + 0.001 * (10**2 + 20**2 + 100**2 - 50**2)
    assert world.now == pytest.approx(100 + ms / 1e3)


def test_dilation_multiplies_every_step() -> None:
    world = World(dilation=8)
    world.device.decode(4, 200)
    assert world.now == pytest.approx(100 + 8 * 0.016)


def test_what_the_host_does_between_two_steps_is_part_of_the_second() -> None:
    world = World()
    for _ in range(5):
        world.device.decode(0, 0)
        world.now += 0.004
    assert world.now == pytest.approx(100 + 5 * 0.010 + 0.004)
    assert world.device.late_steps == 0


def test_after_a_rest_a_step_begins_when_it_is_asked_for() -> None:
    world = World()
    world.device.decode(0, 0)
    world.device.rest()
    world.now += 0.007
    world.device.decode(0, 0)
    assert world.now == pytest.approx(100 + 0.010 + 0.007 + 0.010)


def test_a_host_that_is_slower_than_the_step_is_counted_and_not_caught_up_with() -> None:
    world = World()
    world.device.decode(0, 0)
    world.now += 0.025
    world.device.decode(0, 0)
    assert (world.device.late_steps, world.now) == (1, pytest.approx(100.035))
    world.device.decode(0, 0)
    assert (world.device.late_steps, world.now) == (1, pytest.approx(100.045))


# --- tokens ---------------------------------------------------------------------------------


def batch(mode: ForwardMode, **fields: Any) -> Any:
    return SimpleNamespace(forward_mode=mode, **fields)


def worker(vocab_size: int = 259) -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(vocab_size=vocab_size))


@given(
    st.lists(st.integers(3, 258), min_size=1, max_size=20), st.integers(1, 30), st.integers(1, 4)
)
def test_an_answer_is_the_same_however_it_is_cut(
    prompt: list[int], tokens: int, neighbours: int
) -> None:
    """Prefilled alone or among others, decoded alone or among others."""
    forward = EmulatedForward(World().device)

    def answer(others: int) -> list[int]:
        lengths = [3] * others + [len(prompt)]
        out = forward(
            worker(),
            batch(
                ForwardMode.EXTEND,
                prefix_lens=[0] * (others + 1),
                extend_lens=lengths,
                input_ids=torch.tensor([7] * (3 * others) + prompt),
                seq_lens=torch.tensor(lengths),
            ),
        ).next_token_ids
        produced = [int(out[-1])]
        while len(produced) < tokens:
            length = len(prompt) + len(produced)
            out = forward(
                worker(),
                batch(
                    ForwardMode.DECODE,
                    reqs=[None] * (others + 1),
                    input_ids=torch.tensor([9] * others + [produced[-1]]),
                    seq_lens=torch.tensor([50] * others + [length]),
                ),
            ).next_token_ids
            produced.append(int(out[-1]))
        return produced

    assert answer(0) == answer(neighbours)


def test_tokens_of_the_demo_model_are_printable() -> None:
    tokens = next_tokens(torch.arange(3, 259), torch.arange(256), 259)
    assert all(0x20 < int(t) - 3 < 0x7F for t in tokens)


def test_a_step_takes_the_time_of_its_batch() -> None:
    world = World()
    forward = EmulatedForward(world.device)
    forward(
        worker(),
        batch(
            ForwardMode.DECODE,
            reqs=[None, None],
            input_ids=torch.tensor([1, 2]),
            seq_lens=torch.tensor([100, 200]),
        ),
    )
    assert world.now == pytest.approx(100 + (10 + 2 + 3) / 1e3)


# --- predictions ----------------------------------------------------------------------------


def decoding(rid: str, produced: int, wanted: int = 5000) -> Any:
    params = SimpleNamespace(max_new_tokens=wanted)
    return SimpleNamespace(rid=rid, output_ids=[0] * produced, sampling_params=params)


def test_predictions_are_the_truth_or_near_it_or_nothing() -> None:
    assert EmulatedPredictions("none").remaining(decoding("a", 10)) is None
    assert EmulatedPredictions("true").remaining(decoding("a", 10)) == (4990.0,) * 4
    noisy = EmulatedPredictions("noisy")
    medians = [r[1] for i in range(300) if (r := noisy.remaining(decoding(f"r{i}", 1000)))]
    assert 3000 < sorted(medians)[150] < 5000
    assert max(medians) > 1.3 * min(medians)


def test_a_request_has_the_same_error_on_every_worker_and_attempt() -> None:
    here, there = EmulatedPredictions("noisy"), EmulatedPredictions("noisy")
    assert here.remaining(decoding("a", 700)) == there.remaining(decoding("a#02", 700))
    assert here.remaining(decoding("a", 700)) != here.remaining(decoding("b", 700))


# --- settings -------------------------------------------------------------------------------


def test_the_server_takes_its_sizes_from_the_profile() -> None:
    args = emulated_server_args(PROFILE)
    assert (args["max_total_tokens"], args["max_running_requests"]) == (1000, 16)
    assert args["chunked_prefill_size"] == 256
    assert args["load_format"] == "dummy"


def test_policy_times_are_dilated_and_timeouts_are_not() -> None:
    plain = AresArgs(emulate="x", time_dilation=4)
    slow = plain.dilated()
    assert slow.reschedule_interval == 4 * plain.reschedule_interval
    assert slow.report_interval == 4 * plain.report_interval
    assert slow.move_cooldown == 4 * plain.move_cooldown
    assert AresArgs(emulate="x", time_dilation=4, tpot_slo_ms=30).dilated().tpot_slo_ms == 120
    assert slow.worker_timeout == plain.worker_timeout
    assert slow.migration_timeout == plain.migration_timeout


def test_dilation_without_emulation_is_refused() -> None:
    with pytest.raises(AresArgsError, match="--ares-emulate"):
        profile_of(AresArgs(time_dilation=2))
    with pytest.raises(AresArgsError, match="above 0"):
        AresArgs(emulate="x", time_dilation=0)


def test_a_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(AresArgsError, match="no profile 'nowhere'"):
        profile_of(AresArgs(emulate="nowhere"))
    path = tmp_path / "p.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    assert profile_of(AresArgs(emulate=str(path))) == PROFILE


def request(**fields: Any) -> Any:
    params = dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"))
    params |= {k: fields.pop(k) for k in list(fields) if k in params}
    plain = {"return_logprob": False, "return_hidden_states": False}
    return SimpleNamespace(sampling_params=SimpleNamespace(**params), **{**plain, **fields})


@pytest.mark.parametrize(
    "fields, what",
    [
        ({}, None),
        ({"return_logprob": True}, "log-probabilities"),
        ({"return_hidden_states": True}, "hidden states"),
        ({"regex": "a+"}, "answers that follow a grammar"),
        ({"json_schema": "{}"}, "answers that follow a grammar"),
    ],
)
def test_what_only_a_model_can_give(fields: dict[str, Any], what: str | None) -> None:
    assert not_emulated(request(**fields)) == what
