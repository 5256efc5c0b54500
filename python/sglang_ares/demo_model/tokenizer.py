"""Builds the demo model's byte-level tokenizer: three special tokens and the 256 bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTE_OFFSET = 3
VOCAB_SIZE = BYTE_OFFSET + 256

# The tasks are single lines, so the last user message alone becomes the prompt; a message that
# brings its own newline gets no second one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(line='') %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.line = message['content'] %}"
    "{% endif %}{% endfor %}{{ ns.line | trim }}{{ '\\n' }}"
)


def _byte_characters() -> list[str]:
    """The character the ByteLevel convention shows for each byte, in byte order."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, extra = [], 0
    for byte in range(256):
        if byte in shown:
            characters.append(chr(byte))
        else:  # control characters and spaces are moved above the byte range
            characters.append(chr(256 + extra))
            extra += 1
    return characters


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: byte ``b`` is token ``b + BYTE_OFFSET``, so any text makes the round trip."""
    vocab = {PAD: PAD_ID, BOS: BOS_ID, EOS: EOS_ID}
    for byte, character in enumerate(_byte_characters()):
        vocab[character] = byte + BYTE_OFFSET
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_bytes(text: str) -> NDArray[np.int64]:
    """Token ids of a text without special tokens; the fast way for building training rows."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + BYTE_OFFSET


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer files into ``folder``."""
    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    # The class as every transformers release knows it, not the name one release gives it.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
