"""Embedded default model: a tiny Llama that works small tasks out step by step and then stops.

It is used when no ``--model-path`` is given.  The model (under 1.5 M parameters, trained by
``sglang_ares.demo_model.train``) counts, sorts, writes Collatz sequences and random walks.  The
walks are what matters here: sampled at temperature 1 they make the lengths heavy-tailed, and the
height a walk has reached, not its prompt, tells how far it still has to go.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "weights"
"""Folder of the committed weights, tokenizer and ``card.json``."""

__all__ = ["MODEL_DIR"]
