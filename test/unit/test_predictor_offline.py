"""Collecting without a cluster: the same tokens and states as a forward over the whole text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.demo_model.decode import prompt_ids
from sglang_ares.predictor.__main__ import main
from sglang_ares.srt.predictor.dataset import DatasetWriter, load_info, load_split
from sglang_ares.srt.predictor.offline import OfflineError, decode, load_model
from sglang_ares.srt.predictor.recorder import INTERVAL
from sglang_ares.srt.sampling.seeded import multinomial_with_seed

PROMPTS = ["walk 9\n", "collatz 6\n", "count 1 60\n", "json 42\n"]
SEEDS = [11, 12, 13, 14]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(str(MODEL_DIR))


@torch.inference_mode()
def one_by_one(model: Any, prompt: list[int], seed: int, most: int) -> tuple[int, Any]:
    """The same answer by a whole forward for each token: its length, and all states."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        states = model.model(torch.tensor([ids])).last_hidden_state[0]
        logs = torch.log(model.lm_head(states[-1:]).softmax(-1))
        place = torch.tensor([len(ids) - 1])
        ids.append(int(multinomial_with_seed(logs, torch.tensor([seed]), place)))
        if ids[-1] == model.config.eos_token_id:
            break
    return len(ids) - len(prompt), states[len(prompt) - 1 :].numpy()


def test_tokens_and_states_are_those_of_whole_forwards(model: Any) -> None:
    most = 130
    ids = [prompt_ids(p) for p in PROMPTS]
    answers = decode(model, ids, SEEDS, most)
    assert any(not a.ended for a in answers) and any(a.ended for a in answers)
    for prompt, seed, answer in zip(ids, SEEDS, answers):
        length, states = one_by_one(model, prompt, seed, most)
        assert answer.length == length and answer.ended == (length < most)
        assert len(answer.states) == -(-length // INTERVAL)
        np.testing.assert_allclose(np.stack(answer.states), states[::INTERVAL], atol=2e-2)


def test_the_temperature_is_heeded(model: Any) -> None:
    """Nearly greedy answers of tasks that have one answer are the right ones' lengths."""
    (answer,) = decode(model, [prompt_ids("collatz 6\n")], [5], 100, temperature=0.01)
    assert answer.ended and answer.length == len("6>3>10>5>16>8>4>2>1") + 1


def test_the_context_window_ends_a_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As upstream: two positions stay unused."""
    monkeypatch.setattr(model.config, "max_position_embeddings", 64)
    prompt = prompt_ids("count 1 60\n")
    (answer,) = decode(model, [prompt], [5], 1000)
    assert not answer.ended and answer.length == 62 - len(prompt)


def test_collecting_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def collect(requests: int) -> None:
        call = ["collect", "--offline", "--out", str(tmp_path), "--prompts", "demo-short"]
        call += ["--requests", str(requests), "--max-new-tokens", "60", "--at-once", "8"]
        assert main(call) == 0

    collect(8)
    first = (tmp_path / "00000.states.npy").stat().st_mtime_ns
    collect(12)
    assert (tmp_path / "00000.states.npy").stat().st_mtime_ns == first
    assert DatasetWriter(tmp_path, load_info(tmp_path)).done == set(range(12))
    train = load_split(tmp_path, "train")
    assert (train.remaining > 0).all() and (train.generated % INTERVAL == 0).all()
    assert set(train.rows["request"].tolist()) == set(train.requests)


@pytest.mark.parametrize("change", [{"attention_bias": True}, {"model_type": "qwen2"}])
def test_other_models_are_refused_with_the_remedy(
    tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(OfflineError, match="Leave --offline out"):
        load_model(str(tmp_path / "m"))
    call = ["collect", "--offline", "--out", str(tmp_path / "d"), "--model-path"]
    assert main([*call, str(tmp_path / "m")]) == 2
    assert "plain Llama models only" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["collect", "--offline", "--out", str(tmp_path), "--model-path", str(tmp_path / "no")]
    assert main(call) == 2
    assert "no" in capsys.readouterr().err
