"""Check that values from a file have the types that their reader expects."""

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finestsam.config import LARGEST_WHOLE_NUMBER

LARGEST_NUMBER = 3.4e38  # of float32


def find_misfit(values: dict[str, Any], kind: type, finite: bool = True) -> str | None:
    """Return what is wrong with the first value that does not fit the type of its field; None: all fit.

    Args:
        values: by field name.
        kind: the dataclass that has the fields.
        finite: whether numbers must be finite.
    """
    hints = get_type_hints(kind)
    missing = [entry.name for entry in dataclasses.fields(kind) if _is_required(entry) and entry.name not in values]
    if missing:
        return f"{missing[0]} is missing"
    for name, value in values.items():
        if name not in hints:
            return f"{name} is unknown"
        if not fits(value, hints[name], finite):
            expected = getattr(hints[name], "__name__", None) if not get_args(hints[name]) else None
            return f"{name} is {value!r:.60}, expected {expected or str(hints[name]).replace('typing.', '')}"
    return None


def read_number(text: str) -> float:
    """Return the number in a text. Plots of numbers beyond float32 overflow.

    Raises:
        ValueError: it is not a number, or float32 cannot hold it.
    """
    number = float(text)
    if not abs(number) <= LARGEST_NUMBER:  # also true for NaN
        raise ValueError(f"{text[:40]} is not a number that float32 can hold")
    return number


def _is_required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def fits(value: object, kind: Any, finite: bool = True) -> bool:
    """Return whether a value fits a type: a plain type, a Literal, a list, a dict or a union.

    Args:
        finite: whether numbers must be finite and within float32.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, choice, finite) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(part, inner[0], finite) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(name, inner[0], finite) and fits(part, inner[1], finite) for name, part in value.items()
        )
    if kind in (int, float):
        is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_WHOLE_NUMBER
        return is_whole or (kind is float and isinstance(value, float) and (abs(value) <= LARGEST_NUMBER or not finite))
    return isinstance(value, kind)
