"""Data sets, training, smoothing and evaluation, on lengths that follow from the state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_ares.predictor.__main__ import main
from sglang_ares.srt.predictor.arms import train_arms
from sglang_ares.srt.predictor.baselines import _requests, survival_arm
from sglang_ares.srt.predictor.dataset import (
    SPLITS,
    DatasetError,
    DatasetInfo,
    DatasetWriter,
    Labels,
    RequestRecord,
    load_labels,
    load_split,
    save_labels,
    split_of,
)
from sglang_ares.srt.predictor.drift import corrected
from sglang_ares.srt.predictor.evaluation import evaluate, ship_test_split
from sglang_ares.srt.predictor.identity import ModelIdentity
from sglang_ares.srt.predictor.prompts import PromptError, prompts
from sglang_ares.srt.predictor.smoothing import choose_weight, smoothed
from sglang_ares.srt.predictor.training import TrainingPlan, median_error, predict, train_head

D = 16
INFO = DatasetInfo(
    model=ModelIdentity(model="toy", hidden_size=D, fingerprint=""),
    prompts="toy",
    seed=3,
    max_new_tokens=1000,
    temperature=1.0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests whose remaining length is written, with noise, into their states."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, D))
    writer = DatasetWriter(folder, INFO)
    for shard in range(4):
        states, rows, records = [], [], []
        for i in range(60):
            number = shard * 60 + i
            length = int(min(1000, 10 + rng.exponential(150)))
            for generated in range(0, length, 20):
                left = length - generated
                features = np.array([np.log1p(left) + 0.2 * rng.normal(), rng.normal(), 1.0])
                states.append(features @ mixing)
                rows.append((number, generated, left))
            records.append(
                RequestRecord(
                    request=number,
                    prompt="x",
                    prompt_ids=[1, 2 + number % 5],
                    length=length,
                    censored=length == 1000,
                )
            )
        writer.add(np.array(states), rows, records)
    return folder


def test_splits_part_whole_requests_in_the_given_shares(data: Path) -> None:
    parts = [load_split(data, s) for s in SPLITS]
    numbers = [set(p.requests) for p in parts]
    assert not (numbers[0] & numbers[1] or numbers[0] & numbers[2] or numbers[1] & numbers[2])
    assert sum(map(len, numbers)) == 240
    shares = [sum(split_of(n, 7) == s for n in range(20_000)) / 20_000 for s in SPLITS]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.01)


def test_what_is_complete_is_known_and_other_data_is_refused(data: Path) -> None:
    assert DatasetWriter(data, INFO).done == set(range(240))
    other = DatasetInfo(model=INFO.model, prompts="other", seed=3, max_new_tokens=9, temperature=1)
    with pytest.raises(DatasetError, match="collected otherwise"):
        DatasetWriter(data, other)


def test_an_interrupted_shard_leaves_no_trace(data: Path, tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path, INFO)
    np.save(tmp_path / "00000.states.npy", np.zeros((1, D)))
    assert not writer.done
    with pytest.raises(DatasetError, match="no complete shard"):
        load_split(tmp_path, "train")


def test_labels_come_back_from_one_file(data: Path, tmp_path: Path) -> None:
    test = load_split(data, "test")
    save_labels(tmp_path / "t.npz", test)
    again = load_labels(tmp_path / "t.npz")
    assert np.array_equal(again.rows, test.rows) and again.requests == test.requests
    assert np.array_equal(again.states, test.states)


@pytest.mark.parametrize("kind", ["quantile", "l1"])
def test_training_learns_and_the_seed_decides(data: Path, kind: str) -> None:
    train, validation, test = (load_split(data, s) for s in SPLITS)
    plan = TrainingPlan(kind=kind, seed=1, epochs=8, batch=64)  # type: ignore[arg-type]
    head = train_head(plan, train, validation, 1000)
    error = median_error(predict(head, test.states), test)
    guess = float(np.abs(np.median(train.remaining) - test.remaining).mean())
    assert error < 0.5 * guess
    short = TrainingPlan(kind=kind, seed=1, epochs=1)  # type: ignore[arg-type]
    twice = [train_head(short, train, validation, 1000) for _ in range(2)]
    assert np.array_equal(predict(twice[0], test.states), predict(twice[1], test.states))


def test_smoothing_uses_what_was_said_before(data: Path) -> None:
    """With independent noise in every state, averages over time are better."""
    test = load_split(data, "test")
    rng = np.random.default_rng(1)
    noisy = test.remaining * np.exp(0.5 * rng.normal(size=len(test)))
    predicted = np.repeat(noisy[:, None], 4, axis=1)
    weight, errors = choose_weight(predicted, test, 1000)
    assert weight < 1 and errors[str(weight)] < 0.9 * errors["1.0"]
    first = smoothed(predicted, test, weight)[test.generated == 0]
    np.testing.assert_allclose(first, predicted[test.generated == 0])


def test_a_drift_is_corrected(data: Path) -> None:
    test = load_split(data, "train")
    predicted = np.repeat(test.remaining[:, None] / 3.0, 4, axis=1)
    plain = median_error(smoothed(predicted, test, 1.0), test)
    learnt = corrected(predicted, test, 1.0, limit=1000, at_once=4)
    assert median_error(learnt, test) < 0.5 * plain


def test_the_survival_arm_by_hand() -> None:
    def labels(lengths: list[int]) -> Labels:
        rows = [(i, 0, n) for i, n in enumerate(lengths)]
        records = {
            i: RequestRecord(request=i, prompt="", prompt_ids=[1], length=n, censored=False)
            for i, n in enumerate(lengths)
        }
        dtype = [("request", "<i4"), ("generated", "<i4"), ("remaining", "<i4")]
        return Labels(np.zeros((len(rows), D)), np.array(rows, dtype), records)

    test = labels([50])
    test.rows["generated"][0] = 20
    assert survival_arm(labels([10, 20, 40, 60]), test)[0, 0] == pytest.approx(30)


def test_train_then_evaluate_and_the_shipped_split_agrees(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def report(arm: str):  # type: ignore[no-untyped-def]
        trained.append(arm)
        return lambda *a: None

    plan = TrainingPlan(seed=0, epochs=3, batch=256)
    train_arms(data, tmp_path, plan, report)
    assert trained == ["quantile", "l1", "prompt_only"]
    train_arms(data, tmp_path, plan, report)
    assert len(trained) == 3, "finished parts are not trained again"
    report_all = evaluate(tmp_path, data)
    arms = report_all["arms"]
    assert set(arms) == {"mean", "survival", "prompt_only", "l1", "ours"}
    assert arms["prompt_only"]["parameters"] >= 14.9 * arms["ours"]["parameters"]
    ship_test_split(tmp_path, data, 200)
    shipped = evaluate(tmp_path, None)
    assert 0 < shipped["test"]["labels"] <= 200
    out = tmp_path / "report.json"
    assert main(["evaluate", "--head", str(tmp_path), "--json", str(out)]) == 0
    assert out.exists() and "prompt_only" in capsys.readouterr().out


def test_a_head_alone_is_trained_and_not_compared(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = TrainingPlan(seed=0, epochs=1, batch=256)
    card = train_arms(data, tmp_path, plan, lambda arm: lambda *a: None, compared=False)
    assert set(card.metrics["parameters"]) == {"ours"}
    assert main(["evaluate", "--head", str(tmp_path), "--data", str(data)]) == 2
    assert "without --head-only" in capsys.readouterr().err


def test_a_part_of_the_split_has_the_lengths_of_the_whole(data: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(seed=0, epochs=1, batch=256)
    train_arms(data, tmp_path, plan, lambda arm: lambda *a: None)
    ship_test_split(tmp_path, data, 150)
    whole, part = load_split(data, "test"), load_labels(tmp_path / "test_split.npz")
    assert len(part) == pytest.approx(150, rel=0.15)
    assert part.requests.items() < whole.requests.items()
    mean = [np.mean([r.length for r in x.requests.values()]) for x in (whole, part)]
    assert mean[1] == pytest.approx(mean[0], rel=0.1)
    for number, rows in part.by_request():
        assert np.array_equal(part.remaining[rows] + part.generated[rows], part.lengths[rows])
        assert (
            part.generated[rows][0] == 0 and part.requests[number].length == part.lengths[rows][0]
        )


def test_drift_is_told_in_order_and_drawn(data: Path, tmp_path: Path) -> None:
    plan = TrainingPlan(seed=0, epochs=1, batch=256)
    train_arms(data, tmp_path / "h", plan, lambda arm: lambda *a: None, compared=False)
    call = ["drift", "--head", str(tmp_path / "h"), "--data", str(data), "--at-once", "8"]
    written = [*("--json", str(tmp_path / "d.json")), *("--plot", str(tmp_path / "d.png"))]
    assert main([*call, *written]) == 0
    report = json.loads((tmp_path / "d.json").read_text())
    parts = report["in_order"]
    assert parts[0]["from_request"] == 0 and parts[-1]["below"] == report["requests"] == 240
    for name in ("corrected", "uncorrected"):
        labels = [p["labels"] for p in parts]
        mean = np.average([p[f"mae_{name}"] for p in parts], weights=labels)
        assert mean == pytest.approx(report[name]["mae"], rel=1e-3)
    assert (tmp_path / "d.png").stat().st_size > 5_000


def test_the_prompt_only_model_is_trained_on_what_it_is_judged_on(data: Path) -> None:
    """One length for all prompts: the one with the least error over all labels, which is not the
    median of the lengths."""
    train = load_split(data, "train")
    requests = _requests(train, 10, 4)
    rows = train.by_request()
    for total in (30.0, 150.0, 700.0):
        said = torch.full((len(rows),), total)
        errors = requests.errors(slice(None), said)
        by_hand = np.abs(np.maximum(total - train.generated, 0) - train.remaining)
        assert float(errors.sum()) == pytest.approx(float(by_hand.sum()), rel=1e-5)
        assert int(requests.labelled.sum()) == len(train)


def test_bad_input_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--head", str(tmp_path)]) == 2
    assert "card.json cannot be read" in capsys.readouterr().err
    (tmp_path / "test_split.npz").write_bytes(b"PK nothing")
    with pytest.raises(DatasetError, match="holds no test split"):
        load_labels(tmp_path / "test_split.npz")
    with pytest.raises(PromptError, match="neither a file nor one of"):
        prompts("nothing", 1, 0)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('plain\n\n{"prompt": "json"}\n')
    assert sorted(prompts(str(path), 2, 0)) == ["json", "plain"]
    with pytest.raises(PromptError, match="has 2 prompts"):
        prompts(str(path), 3, 0)
