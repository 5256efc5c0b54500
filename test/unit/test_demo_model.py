"""The embedded default model: its limits, its tokenizer, short generations, its card."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from sglang_ares.demo_model import MODEL_DIR, tasks
from sglang_ares.demo_model.corpus import IGNORE, make_batch
from sglang_ares.demo_model.decode import BatchDecoder, Generation, generate, prompt_ids
from sglang_ares.demo_model.tokenizer import BOS_ID, EOS_ID

PROMPTS = ["walk 5\n", "walk 38\n", "collatz 6\n", "count 8 21\n", "sort 7 2 9 4\n", "json 42\n"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((MODEL_DIR / "card.json").read_text())


def accuracy(prompts: list[str], answers: list[Generation]) -> float:
    judged = [tasks.check_steps(p, a.text, a.ended) for p, a in zip(prompts, answers)]
    return sum(correct for _, correct in judged) / sum(steps for steps, _ in judged)


def test_limits(model: LlamaForCausalLM, card: dict[str, Any]) -> None:
    assert model.num_parameters() == card["parameters"] <= 1_500_000
    assert sum(f.stat().st_size for f in MODEL_DIR.iterdir()) <= 4_000_000
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.max_position_embeddings >= 32768


@pytest.mark.parametrize(
    "text",
    ["walk 6\n", '{"a": [1, true, null], "b": "x  y"}', "Größe 漢字 🙂\t\r\n", " \x00\x7f ", ""],
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == prompt_ids(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_special_tokens_and_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
    chat = [
        {"role": "system", "content": "ignored"},
        {"role": "user", "content": "count 1 2"},
        {"role": "assistant", "content": "1,2"},
        {"role": "user", "content": "walk 6"},
    ]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == prompt_ids("walk 6\n")


def test_decoder_agrees_with_transformers(model: LlamaForCausalLM) -> None:
    ids = [prompt_ids(p) for p in PROMPTS]
    decoder = BatchDecoder(model, ids)
    logits = decoder.logits(decoder.pending)
    logits = decoder.logits(logits.argmax(-1, keepdim=True))
    with torch.inference_mode():
        for row, prompt in zip(logits, ids):
            first = model(torch.tensor([prompt])).logits[0, -1].argmax().item()
            expected = model(torch.tensor([[*prompt, first]])).logits[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-3, rtol=1e-3)


def test_sampled_steps_are_right(model: LlamaForCausalLM) -> None:
    prompts = PROMPTS * 4
    answers = generate(model, [prompt_ids(p) for p in prompts], 400, seed=0)
    assert accuracy(prompts, answers) > 0.97
    assert answers == generate(model, [prompt_ids(p) for p in prompts], 400, seed=0)


def test_likeliest_answers_are_right(model: LlamaForCausalLM) -> None:
    prompts = [p for p in PROMPTS if not p.startswith("walk")]
    answers = generate(model, [prompt_ids(p) for p in prompts], 100, seed=0, greedy=True)
    assert all(a.ended for a in answers)
    assert [a.text for a in answers] == [
        tasks.reference_answer(p, random.Random(0)) for p in prompts
    ]


def test_newline_left_out_and_doubled_bos(model: LlamaForCausalLM) -> None:
    ids = [prompt_ids("collatz 6"), [BOS_ID, *prompt_ids("collatz 6\n")]]
    bare, doubled = generate(model, ids, 60, seed=0, greedy=True)
    assert tasks.check_steps("collatz 6\n", bare.text) == (10, 10)
    assert tasks.check_steps("collatz 6\n", doubled.text) == (10, 10)


def test_card_meets_the_specification(card: dict[str, Any]) -> None:
    lengths = card["evaluation"]["lengths"]
    assert lengths["cv"] >= 1
    assert lengths["p99_over_p50"] >= 8
    assert lengths["max"] >= 1500
    assert lengths["share_ended_by_eos"] >= 0.99
    assert sum(card["evaluation"]["steps"][t]["answers"] for t, _ in tasks.MIX) == 1000
    explained = card["evaluation"]["explained_variance"]
    assert explained["length_by_prompt"] < 0.5
    assert explained["walk_remaining_by_prompt"] < explained["walk_remaining_by_height"]


def test_workload_is_seeded_and_mixed() -> None:
    prompts = tasks.sample_prompts(2000, 3)
    assert prompts == tasks.sample_prompts(2000, 3) != tasks.sample_prompts(2000, 4)
    for name, share in tasks.MIX:
        assert abs(sum(tasks.task_of(p) == name for p in prompts) / 2000 - share) < 0.05


def test_reference_answers_pass_the_check() -> None:
    rng = random.Random(5)
    for prompt in tasks.sample_prompts(200, 5):
        steps, correct = tasks.check_steps(prompt, tasks.reference_answer(prompt, rng))
        assert steps == correct > 0


@pytest.mark.parametrize(
    ("prompt", "text", "complete", "expected"),
    [
        ("walk 3\n", "3 2 1 0", True, (5, 5)),
        ("walk 3\n", "\n3 2 1 0", True, (5, 5)),
        ("walk 3\n", "3 4 40 39", True, (5, 4)),  # stops above 0
        ("walk 3\n", "3 4 40 3", False, (3, 3)),  # the last number may go on
        ("walk 3\n", "3 2 5 4 x", True, (6, 3)),  # a slip, then nonsense
        ("walk 3\n", "3 2 1 0 1 0", True, (7, 6)),  # went on after 0
        ("walk 50\n", "50 500", True, (3, 1)),  # too high to leap
        ("collatz 4\n", "4>2>1", True, (4, 4)),
        ("collatz 4\n", "4>3>1", True, (4, 2)),
        ("count 3 5\n", "3,4,5,6", True, (5, 3)),
        ("sort 3 1 2\n", "1;3;2", True, (4, 2)),
        ("json 7\n", '{"n": 7, "even": false}', True, (1, 1)),
        ("json 7\n", '{"n": 7, "even": true}', True, (1, 0)),
        ("Hello", "3 2 1", True, (0, 0)),
    ],
)
def test_check_steps(prompt: str, text: str, complete: bool, expected: tuple[int, int]) -> None:
    assert tasks.check_steps(prompt, text, complete) == expected


def test_training_rows_leave_out_what_can_not_be_known() -> None:
    batch = make_batch(4, 256, random.Random(0))
    same = make_batch(4, 256, random.Random(0))
    assert (batch.ids == same.ids).all()
    assert (batch.positions == same.positions).all()
    learnt = batch.labels != IGNORE
    assert (batch.labels[:, :-1] == batch.ids[:, 1:])[learnt[:, :-1]].all()
    assert (batch.positions[:, 1:] >= batch.positions[:, :-1]).all()
    assert 0.7 < learnt.mean() < 1
