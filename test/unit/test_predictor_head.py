"""The head: its sizes, its quantiles, its files, and which model it is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_ares.ares_args import AresArgs, AresArgsError
from sglang_ares.demo_model import MODEL_DIR
from sglang_ares.engine import _check_head
from sglang_ares.srt.predictor.card import (
    PredictorError,
    check_model,
    load_card,
    load_head,
    save_head,
)
from sglang_ares.srt.predictor.head import decode, layer_sizes, new_head, widths
from sglang_ares.srt.predictor.identity import ModelIdentity, UnknownModelError, identify
from sglang_ares.srt.predictor.start import OFF, SHIPPED_HEAD, chosen_head


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    head = new_head(128, "quantile", torch.Generator().manual_seed(0))
    save_head(tmp_path / "h", head, identify(str(MODEL_DIR)), smoothing=0.5, data={}, metrics={})
    return tmp_path / "h"


# --- sizes and quantiles --------------------------------------------------------------------


def test_the_papers_widths_for_its_hidden_size() -> None:
    assert widths(3584) == (2048, 512, 64)


@pytest.mark.parametrize("d", [16, 64, 128, 896, 2048, 4096, 8192])
def test_widths_are_multiples_of_16_and_do_not_vanish(d: int) -> None:
    first, second, third = widths(d)
    assert 128 <= first <= 2048 and 64 <= second <= first and 32 <= third <= second
    assert not any(w % 16 for w in (first, second, third))


@given(st.lists(st.floats(-60, 60, width=32), min_size=4, max_size=4))
def test_quantiles_ascend_whatever_the_head_says(raw: list[float]) -> None:
    quantiles = decode("quantile", np.array(raw), (0.3, -0.2, 0.1, -0.5))
    assert np.isfinite(quantiles).all() and (quantiles >= 0).all()
    assert (np.diff(quantiles) >= 0).all()


@given(st.lists(st.floats(-60, 60, width=32), min_size=4, max_size=4), st.booleans())
def test_one_row_reads_like_many(raw: list[float], l1: bool) -> None:
    head = new_head(16, "l1" if l1 else "quantile", torch.Generator().manual_seed(0))
    head.shift = (0.1, 0.0, -0.4, 0.2)
    row = raw[:1] if l1 else raw
    np.testing.assert_allclose(head.read(row), head.remaining(np.array(row)), rtol=1e-9, atol=1e-9)


def test_nan_stays_nan() -> None:
    assert np.isnan(decode("quantile", np.array([np.nan, 0, 0, 0]))).all()


def test_no_nan_comes_of_a_finite_state_and_nan_of_nan() -> None:
    head = new_head(64, "quantile", torch.Generator().manual_seed(0))
    states = torch.randn(3, 64)
    states[1, 5] = float("nan")
    out = head(states)
    assert torch.isfinite(out[[0, 2]]).all() and out[1].isnan().all()


# --- files ----------------------------------------------------------------------------------


def test_a_head_comes_back_as_it_was_saved(folder: Path) -> None:
    head, card = load_head(folder)
    again = new_head(128, "quantile", torch.Generator().manual_seed(0))
    states = torch.randn(4, 128)
    assert torch.equal(head(states), again(states))
    assert card.sizes == layer_sizes(128, "quantile") and card.smoothing == 0.5


def test_a_corrupt_file_is_refused(folder: Path) -> None:
    path = folder / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(PredictorError, match="corrupt"):
        load_head(folder)


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    path = folder / "head.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PredictorError, match="SHA-256"):
        load_head(folder)


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "head.safetensors").unlink()
    with pytest.raises(PredictorError, match=r"head\.safetensors cannot be read"):
        load_head(folder)
    with pytest.raises(PredictorError, match="train"):
        load_head(folder / "nowhere")


@pytest.mark.parametrize(
    "field,value,says",
    [
        ("format", 99, "format 99"),
        ("sizes", [128, 4], "layers"),
        ("levels", [0.1, 0.5], "quantiles"),
        ("smoothing", 0.0, "smoothing"),
        ("kind", "other", "no card"),
        ("shift", "much", "no card"),
    ],
)
def test_a_card_that_cannot_be_true_is_refused(
    folder: Path, field: str, value: object, says: str
) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(PredictorError, match=says):
        load_head(folder)


def test_weights_of_the_wrong_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    other = new_head(64, "quantile", torch.Generator().manual_seed(0))
    identity = ModelIdentity(model="m", hidden_size=64, fingerprint="")
    save_head(tmp_path / "o", other, identity, smoothing=0.5, data={}, metrics={})
    card = msgspec.structs.replace(load_card(folder), sha256=load_card(tmp_path / "o").sha256)
    shutil.copy(tmp_path / "o" / "head.safetensors", folder / "head.safetensors")
    (folder / "card.json").write_bytes(msgspec.json.encode(card))
    with pytest.raises(PredictorError, match=r"shape \(128, 64\), not \(128, 128\)"):
        load_head(folder)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    head = new_head(64, "quantile", torch.Generator().manual_seed(0))
    head.layers[2][0][3, 3] = float("inf")
    identity = ModelIdentity(model="m", hidden_size=64, fingerprint="")
    save_head(tmp_path, head, identity, smoothing=0.5, data={}, metrics={})
    with pytest.raises(PredictorError, match="no numbers"):
        load_head(tmp_path)


# --- the model ------------------------------------------------------------------------------


def copy_of_the_model(folder: Path) -> Path:
    shutil.copytree(MODEL_DIR, folder)
    return folder


def test_the_same_model_elsewhere_is_the_same(folder: Path, tmp_path: Path) -> None:
    copy = copy_of_the_model(tmp_path / "model")
    check_model(load_card(folder), str(copy), folder)


def test_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of_the_model(tmp_path / "model")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[200_000] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(PredictorError, match=r"other\s+weights"):
        check_model(load_card(folder), str(copy), folder)


def test_another_hidden_size_is_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    copy = copy_of_the_model(tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 256}))
    with pytest.raises(PredictorError, match=r"128 .* has 256.*collect"):
        check_model(load_card(folder), str(copy), folder)


def test_a_model_that_is_not_here_is_compared_by_name(folder: Path) -> None:
    with pytest.raises(UnknownModelError):
        identify("nobody/nothing-of-this-name")
    with pytest.raises(PredictorError, match="nobody/nothing"):
        check_model(load_card(folder), "nobody/nothing-of-this-name", folder)


def test_the_flag_is_refused_at_start_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(AresArgsError, match=r"card\.json cannot be read"):
        _check_head(AresArgs(predictor=str(tmp_path)), str(MODEL_DIR))


def test_which_head_is_used(tmp_path: Path) -> None:
    assert chosen_head("auto", str(MODEL_DIR)) == SHIPPED_HEAD
    assert chosen_head("auto", str(tmp_path)) is None
    assert chosen_head(OFF, str(MODEL_DIR)) is None
    assert chosen_head(str(tmp_path), str(MODEL_DIR)) == tmp_path


def test_the_shipped_head_is_for_the_embedded_model() -> None:
    check_model(load_head(SHIPPED_HEAD)[1], str(MODEL_DIR), SHIPPED_HEAD)
