"""Which model a head was trained for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import msgspec

# Of every weight file: its size and this much of its beginning (a safetensors header, then the
# first weights). Reading whole models at every start would take minutes.
_BYTES_OF_A_FILE: Final = 1 << 20
# What of config.json decides the hidden states.
_CONFIG_FIELDS: Final = (
    "architectures",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``fingerprint``: SHA-256 over the architecture in config.json, and size and first MiB of each
    weight file; empty where the files are not on this machine yet."""

    model: str
    hidden_size: int
    fingerprint: str


class UnknownModelError(ValueError):
    """The model's files are not where they were expected, or cannot be read."""


def identify(model: str) -> ModelIdentity:
    """The identity of a model folder, or of a model id whose files were downloaded before.

    Raises :class:`UnknownModelError`.
    """
    folder = _folder(model)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UnknownModelError(f"{folder / 'config.json'} cannot be read: {error}") from None
    text = config.get("text_config", config)
    digest = hashlib.sha256()
    digest.update(json.dumps({f: text.get(f) for f in _CONFIG_FIELDS}, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(file.read(_BYTES_OF_A_FILE))
    return ModelIdentity(
        model=_name(model, folder),
        hidden_size=int(text.get("hidden_size", 0)),
        fingerprint=digest.hexdigest(),
    )


def _folder(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise UnknownModelError(
            f"the files of model {model!r} are not on this machine: {error}"
        ) from None


def _name(model: str, folder: Path) -> str:
    """A name without the folders of one machine."""
    return model if not Path(model).expanduser().is_dir() else folder.resolve().name
