"""A head on disk: ``head.safetensors`` and ``card.json`` in one folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sglang_ares.srt.policy.types import LEVELS
from sglang_ares.srt.predictor.head import Kind, LengthHead, layer_sizes
from sglang_ares.srt.predictor.identity import ModelIdentity, UnknownModelError, identify

HEAD_FILE: Final = "head.safetensors"
CARD_FILE: Final = "card.json"
FORMAT: Final = 1


class PredictorError(ValueError):
    """A head that cannot be used; names the file, what is wrong and the remedy."""


class HeadCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``card.json`` says. ``sizes``: of the layers, input to output. ``smoothing``: weight of
    a new prediction beside what was expected (:mod:`.estimate`). ``shift``: added to the
    logarithms of the quantiles, from calibration. ``sha256``: of ``head.safetensors``."""

    format: int
    kind: Kind
    model: ModelIdentity
    sizes: tuple[int, ...]
    levels: tuple[float, ...]
    smoothing: float
    shift: tuple[float, ...]
    sha256: str
    data: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


def save_head(
    folder: Path,
    head: LengthHead,
    model: ModelIdentity,
    *,
    smoothing: float,
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> HeadCard:
    """Write both files, the card last."""
    tensors = {}
    for i, (weight, bias) in enumerate(head.layers):
        tensors[f"layers.{i}.weight"] = weight.detach().float().contiguous().cpu()
        tensors[f"layers.{i}.bias"] = bias.detach().float().contiguous().cpu()
    content = save(tensors)
    card = HeadCard(
        format=FORMAT,
        kind=head.kind,
        model=model,
        sizes=layer_sizes(head.hidden_size, head.kind),
        levels=LEVELS,
        smoothing=smoothing,
        shift=tuple(head.shift),
        sha256=hashlib.sha256(content).hexdigest(),
        data=dict(data),
        metrics=dict(metrics),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HEAD_FILE).write_bytes(content)
    text = msgspec.json.format(msgspec.json.encode(card), indent=2)
    (folder / CARD_FILE).write_bytes(text + b"\n")
    return card


def load_card(folder: Path) -> HeadCard:
    """The card alone; raises :class:`PredictorError`."""
    path = folder / CARD_FILE
    try:
        card = msgspec.json.decode(path.read_bytes(), type=HeadCard)
    except OSError as error:
        raise PredictorError(
            f"{path} cannot be read: {error.strerror}. Name a folder that `python -m "
            "sglang_ares.predictor train` wrote."
        ) from None
    except msgspec.MsgspecError as error:
        raise PredictorError(f"{path} is no card of a length head: {error}.") from None
    if card.format != FORMAT:
        raise PredictorError(
            f"{path} has format {card.format}, this version reads {FORMAT}: train the head anew."
        )
    if card.levels != LEVELS or len(card.shift) != len(LEVELS):
        raise PredictorError(
            f"{path} has quantiles at {card.levels}, this version needs {LEVELS}: train it anew."
        )
    if not 0 < card.smoothing <= 1:
        raise PredictorError(f"{path} has smoothing {card.smoothing}, above 0 and at most 1 is.")
    if card.sizes != layer_sizes(card.model.hidden_size, card.kind):
        raise PredictorError(
            f"{path} has layers {card.sizes}; a {card.kind} head for hidden size "
            f"{card.model.hidden_size} has {layer_sizes(card.model.hidden_size, card.kind)}."
        )
    return card


def load_head(folder: Path) -> tuple[LengthHead, HeadCard]:
    """A head, float32 on the CPU, and its card; raises :class:`PredictorError`."""
    card = load_card(folder)
    path = folder / HEAD_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PredictorError(f"{path} cannot be read: {error.strerror}.") from None
    found = hashlib.sha256(content).hexdigest()
    if found != card.sha256:
        raise PredictorError(
            f"{path} is not the file its card describes (SHA-256 {found[:12]}…, the card says "
            f"{card.sha256[:12]}…): it is corrupt, or the two are of different heads."
        )
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise PredictorError(f"{path} is no safetensors file: {error}.") from None
    layers = []
    for i, (inputs, outputs) in enumerate(pairwise(card.sizes)):
        weight, bias = tensors.get(f"layers.{i}.weight"), tensors.get(f"layers.{i}.bias")
        if weight is None or bias is None:
            raise PredictorError(f"{path} has no layer {i}.")
        if weight.shape != (outputs, inputs) or bias.shape != (outputs,):
            raise PredictorError(
                f"{path}: layer {i} has shape {tuple(weight.shape)}, not {(outputs, inputs)}."
            )
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise PredictorError(f"{path}: layer {i} holds values that are no numbers.")
        layers.append((weight, bias))
    return LengthHead(card.kind, layers, card.shift), card


def check_model(card: HeadCard, model: str, folder: Path) -> None:
    """Refuse a head that was trained for another model than ``model``, with the reason.

    Files that are not on this machine yet cannot be compared: then the model's id must be equal.
    """
    try:
        here = identify(model)
    except UnknownModelError:
        if card.model.model == model:
            return
        raise PredictorError(
            f"--ares-predictor {folder}: this head is for {card.model.model!r}, not {model!r}."
        ) from None
    wanted = card.model
    if here.hidden_size != wanted.hidden_size:
        raise PredictorError(
            f"--ares-predictor {folder}: this head reads hidden states of size "
            f"{wanted.hidden_size} ({wanted.model}); {model} has {here.hidden_size}. Train one "
            "for this model: python -m sglang_ares.predictor collect, then train."
        )
    if here.fingerprint != wanted.fingerprint:
        raise PredictorError(
            f"--ares-predictor {folder}: this head was trained for {wanted.model!r} with other "
            f"weights than those of {model} (fingerprint {wanted.fingerprint[:12]}…, here "
            f"{here.fingerprint[:12]}…): its predictions would mean nothing. Train one for this "
            "model: python -m sglang_ares.predictor collect, then train."
        )
