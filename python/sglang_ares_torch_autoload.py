"""Lets torchvision be imported beside a CPU-only torch, in every process of the environment.

SGLang cannot be imported without torchvision, and the torchvision wheel of the default package
index is built for CUDA: its C++ library does not load beside a CPU-only torch, and its Python
part then fails at import, because the schemas of its operators are missing.
Torch calls :func:`activate` at the end of ``import torch`` through the entry point group
``torch.backends``, so upstream's own programs and their child processes are covered too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_MISSING_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_kept_alive: list[torch.library.Library] = []
"""A schema lives as long as the library object that defined it."""


def activate() -> None:
    """Define the schemas torchvision asks for at import, where its C++ library cannot.

    Does nothing beside a GPU build of torch, without torchvision, or where the C++ library
    loads (as the one from PyTorch's CPU index does). The operators get no implementation: who
    calls them gets torchvision's own error about its missing C++ library.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _kept_alive or _loads(Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _MISSING_OPERATORS:
        library.define(name + _SCHEMA)
    _kept_alive.append(library)


def _loads(package: Path) -> bool:
    """Whether torchvision's C++ library loads beside this torch (it is then loaded)."""
    for path in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False
