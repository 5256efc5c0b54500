"""Says where in a JSON file something is wrong: the line, and the field."""

from __future__ import annotations

import re

# How msgspec ends its messages: the path of the field, or the place in a text that is no JSON.
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_BYTE = re.compile(r" \(byte (?P<byte>\d+)\)$")
_FIELD = re.compile(r"field `(?P<field>\w+)`")


def described(error: Exception, data: bytes) -> str:
    """What msgspec found wrong with ``data``, as ``line 8: decode.per_token_ms: Expected ...``.

    A field that is missing is named with the line of the object that lacks it, one that is unknown
    with its own.
    """
    message = str(error)
    if at := _BYTE.search(message):
        line = data[: int(at["byte"])].count(b"\n") + 1
        return f"line {line}: {message[: at.start()]}"
    path, found = "", message
    if at := _PATH.search(message):
        path, found = at["path"], message[: at.start()]
    keys = re.findall(r"[^.\[\]]+", path)
    named = _FIELD.search(found)
    position = _position(data, keys)
    if named and "unknown" in found:
        position = _position(data, [*keys, named["field"]])
    line = data[:position].count(b"\n") + 1
    return f"line {line}: {path}: {found}" if path else f"line {line}: {found}"


def _position(data: bytes, keys: list[str]) -> int:
    """Where the last of nested ``keys`` stands; numbers (places in an array) are passed over."""
    position = 0
    for key in keys:
        found = re.compile(rb'"%s"\s*:' % re.escape(key.encode())).search(data, position)
        if found:
            position = found.start()
    return position
