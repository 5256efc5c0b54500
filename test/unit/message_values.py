"""Random values of any message type, within the bounds that its fields declare.

``Draw`` is :class:`random.Random`, or what hypothesis gives for it (``st.randoms``).
"""

from __future__ import annotations

import random
import string
from typing import Any

import msgspec
from msgspec import inspect
from sglang.srt.sampling.sampling_params import SamplingParams

# Where a bound is far away, half of the numbers are drawn from this small range.
_SMALL = 40


def random_message(cls: type, rng: random.Random) -> Any:
    """A message of ``cls`` that decodes."""
    return msgspec.convert(_value(inspect.type_info(cls), rng), cls)


def _value(info: Any, rng: random.Random) -> Any:
    """A value of the type, in the plain form from which ``convert`` builds it."""
    match info:
        case inspect.StructType():
            if info.cls is SamplingParams:
                return _sampling_params(rng)
            values = [_value(f.type, rng) for f in info.fields]
            if info.array_like:
                return [*([info.tag] if info.tag is not None else []), *values]
            return {f.encode_name: v for f, v in zip(info.fields, values, strict=True)}
        case inspect.UnionType():
            return _value(rng.choice(info.types), rng)
        case inspect.IntType():
            low = info.ge if info.ge is not None else -(2**63)
            high = info.le if info.le is not None else (info.lt or 2**63) - 1
            if low <= _SMALL and rng.random() < 0.5:
                return rng.randint(max(low, -_SMALL), min(high, _SMALL))
            return rng.randint(low, high)
        case inspect.FloatType():
            low = info.ge if info.ge is not None else -1e6
            high = info.le if info.le is not None else 1e6
            return rng.uniform(low, high)
        case inspect.StrType(pattern=str(pattern)):
            return rng.choice(pattern[pattern.index("(") + 1 : pattern.index(")")].split("|"))
        case inspect.StrType():
            size = rng.randint(0, min(info.max_length or 12, 12))
            return "".join(rng.choice(string.printable + "é漢🙂") for _ in range(size))
        case inspect.BytesType():
            return bytes(rng.randrange(256) for _ in range(rng.randint(0, 12)))
        case inspect.ListType() | inspect.VarTupleType():
            least = getattr(info, "min_length", None) or 0
            return [_value(info.item_type, rng) for _ in range(rng.randint(least, 3))]
        case inspect.TupleType():
            return [_value(item, rng) for item in info.item_types]
        case inspect.DictType():
            return {
                _value(info.key_type, rng): _value(info.value_type, rng)
                for _ in range(rng.randrange(3))
            }
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
    raise AssertionError(f"a message has a field of type {info}")


def _sampling_params(rng: random.Random) -> list[Any]:
    params = SamplingParams(
        max_new_tokens=rng.randint(0, 200),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        stop=rng.choice([None, "x", ["a", "b"]]),
        sampling_seed=rng.randint(0, 2**62),
    )
    if params.stop_strs is None and rng.random() < 0.7:
        params.normalize(None)
    values: list[Any] = msgspec.to_builtins(params)
    return values
