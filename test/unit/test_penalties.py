"""Penalties of a moved request: as if upstream had fed every token here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPenalizerOrchestrator,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_ares import plugin
from sglang_ares.srt.disaggregation.penalties import fed_tokens, seed_penalties

VOCABULARY = 23
PENALIZERS = {
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
}
TENSORS = (
    "cumulated_frequency_penalties",
    "cumulated_presence_penalties",
    "cumulated_repetition_penalties",
    "len_output_tokens",
)


class Batch:
    """What upstream's penalizers and their feeding read of a ``ScheduleBatch``."""

    def __init__(self, reqs: list[Req]) -> None:
        self.reqs = reqs
        self.device = "cpu"
        self.orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, self, PENALIZERS)
        self.sampling_info = SimpleNamespace(penalizer_orchestrator=self.orchestrator)

    def feed(self) -> None:
        """Upstream prepares a decode step."""
        if self.orchestrator.is_required:
            ScheduleBatch.cumulate_penalty_output_tokens(self)

    def state(self) -> dict[str, torch.Tensor]:
        return {
            name: getattr(p, name)
            for p in self.orchestrator.penalizers.values()
            for name in TENSORS
            if hasattr(p, name)
        }

    def effect(self) -> torch.Tensor:
        logits = torch.linspace(-3, 4, VOCABULARY).repeat(len(self.reqs), 1)
        for penalizer in self.orchestrator.penalizers.values():
            if not penalizer.is_multiplicative:
                penalizer.apply(logits)
        return logits


def new_req(params: dict[str, Any], output: Sequence[int] = ()) -> Req:
    req = Req("r", "", array("q", [1, 2, 3]), SamplingParams(**params))
    req.output_ids = array("q", output)
    req.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)
    return req


PARAMS = st.fixed_dictionaries(
    {
        "frequency_penalty": st.sampled_from([0.0, 0.1, 0.7, -1.3, 2.0]),
        "presence_penalty": st.sampled_from([0.0, 0.3, -0.9]),
        "repetition_penalty": st.sampled_from([1.0, 1.1, 0.7]),
        "min_new_tokens": st.sampled_from([0, 3, 50]),
    }
)
OUTPUTS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60)
REQUESTS = st.lists(st.tuples(PARAMS, OUTPUTS), min_size=1, max_size=4)


def never_moved(params: dict[str, Any], output: list[int], *, overlap: bool) -> Batch:
    """Upstream decodes all of ``output`` here; the first token came from the prefill worker.
    The state after the last step, before the next is prepared."""
    req = new_req(params, output[:1])
    batch = Batch([req])
    results: list[int] = []
    for token in output[1:]:
        batch.feed()
        results.append(token)
        if len(results) > int(overlap):  # under overlap a result is processed one step late
            req.output_ids.append(results.pop(0))
    req.output_ids.extend(results)
    return batch


def assert_same_row(ours: Batch, row: int, reference: Batch) -> None:
    state, expected = ours.state(), reference.state()
    for name, tensor in expected.items():
        assert torch.equal(state[name][row], tensor[0]), name


# --- the rebuilt state ----------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=80)
@given(requests=REQUESTS)
def test_the_state_is_upstreams_bit_by_bit(
    overlap: bool, requests: list[tuple[dict[str, Any], list[int]]]
) -> None:
    reqs = [new_req(params, output) for params, output in requests]
    batch = Batch(reqs)
    seed_penalties(batch, reqs, overlap=overlap)
    for row, (params, output) in enumerate(requests):
        assert_same_row(batch, row, never_moved(params, output, overlap=overlap))


def test_a_long_sum_is_rounded_as_upstream_rounds_it() -> None:
    """0.1 a thousand times is not 100 in float32; nor is upstream's sum."""
    output = [5] * 1000
    req = new_req({"frequency_penalty": 0.1}, output)
    batch = Batch([req])
    seed_penalties(batch, [req], overlap=False)
    reference = never_moved({"frequency_penalty": 0.1}, output, overlap=False)
    assert_same_row(batch, 0, reference)
    total = reference.state()["cumulated_frequency_penalties"][0, 5].item()
    assert total != torch.tensor(0.1 * 999).item(), "the test would not notice"


@settings(max_examples=40)
@given(REQUESTS, st.integers(0, 3))
def test_only_moved_requests_are_touched(
    requests: list[tuple[dict[str, Any], list[int]]], which: int
) -> None:
    reqs = [new_req(params, output) for params, output in requests]
    batch, untouched = Batch(reqs), Batch(reqs)
    moved = reqs[which % len(reqs)]
    seed_penalties(batch, [moved], overlap=False)
    for name, tensor in batch.state().items():
        for row, req in enumerate(reqs):
            if req is not moved:
                assert torch.equal(tensor[row], untouched.state()[name][row])


def test_without_penalties_nothing_is_built() -> None:
    req = new_req({}, [1, 2, 3])
    batch = Batch([req])
    seed_penalties(batch, [req], overlap=False)
    assert batch.state() == {}


def test_an_unknown_penalizer_is_an_error() -> None:
    class NewPenalizer(BatchedFrequencyPenalizer):
        pass

    req = new_req({"frequency_penalty": 0.5}, [1, 2, 3])
    batch = Batch([req])
    orchestrator = BatchedPenalizerOrchestrator(VOCABULARY, batch, {NewPenalizer})
    batch.sampling_info = SimpleNamespace(penalizer_orchestrator=orchestrator)
    with pytest.raises(TypeError, match="NewPenalizer"):
        seed_penalties(batch, [req], overlap=False)


def test_upstream_has_no_other_penalizers() -> None:
    """A new one would need a branch in ``_seed_row``."""
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.penaltylib.orchestrator import _BatchedPenalizer

    known = {
        p for p in vars(penaltylib).values()
        if isinstance(p, type) and issubclass(p, _BatchedPenalizer)
    }  # fmt: skip
    assert known == PENALIZERS


# --- the tokens fed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output,fed",
    [([], []), ([7], []), ([7, 8], [7]), ([7, 8, 9], [7, 8])],
)
def test_fed_without_overlap(output: list[int], fed: list[int]) -> None:
    assert list(fed_tokens(array("q", output), overlap=False)) == fed


@pytest.mark.parametrize(
    "output,fed",
    [([], []), ([7], []), ([7, 8], [7]), ([7, 8, 9], [7, 7]), ([7, 8, 9, 10], [7, 7, 8])],
)
def test_fed_with_overlap(output: list[int], fed: list[int]) -> None:
    assert list(fed_tokens(array("q", output), overlap=True)) == fed


# --- the steps after the move ---------------------------------------------------------------


def continue_decoding(batch: Batch, tokens: list[int], *, overlap: bool, moved: bool) -> None:
    """Upstream's steps with our hook, on a request whose results are all known."""
    (req,) = batch.reqs
    if moved and overlap:
        setattr(req, plugin.RESUMED_WITH_OUTPUT, True)
    pending: list[int] = []
    for token in tokens:
        if overlap:
            plugin._feed_one_step_late(Batch.feed, batch)
        else:
            batch.feed()
        pending.append(token)
        if len(pending) > int(overlap):
            req.output_ids.append(pending.pop(0))


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=80)
@given(params=PARAMS, before=OUTPUTS, after=OUTPUTS)
def test_the_steps_after_a_move_go_on_alike(
    overlap: bool, params: dict[str, Any], before: list[int], after: list[int]
) -> None:
    """Penalties in every later step equal those of the request that never moved."""
    req = new_req(params, before)
    batch = Batch([req])
    seed_penalties(batch, [req], overlap=overlap)
    continue_decoding(batch, after, overlap=overlap, moved=True)
    reference = never_moved(params, before + after, overlap=overlap)
    assert_same_row(batch, 0, reference)
    assert torch.equal(batch.effect(), reference.effect())


def test_the_hook_leaves_the_output_as_it_was() -> None:
    req = new_req({"frequency_penalty": 0.5}, [4, 5, 6])
    batch = Batch([req])
    setattr(req, plugin.RESUMED_WITH_OUTPUT, True)

    def failing(batch: Batch) -> None:
        assert list(req.output_ids) == [4, 5]
        raise RuntimeError("upstream failed")

    with pytest.raises(RuntimeError):
        plugin._feed_one_step_late(failing, batch)
    assert list(req.output_ids) == [4, 5, 6]
    assert not getattr(req, plugin.RESUMED_WITH_OUTPUT)


def test_the_hook_lets_other_requests_be() -> None:
    resumed, other = (new_req({"frequency_penalty": 0.5}, [4, 5]) for _ in range(2))
    batch = Batch([resumed, other])
    setattr(resumed, plugin.RESUMED_WITH_OUTPUT, True)
    plugin._feed_one_step_late(Batch.feed, batch)
    penalties = batch.state()["cumulated_frequency_penalties"]
    assert penalties[0].nonzero().view(-1).tolist() == [4]
    assert penalties[1].nonzero().view(-1).tolist() == [5]
