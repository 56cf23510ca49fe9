"""Whether what a file says has the types that its reader works with."""

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finestsam.config import LARGEST_WHOLE_NUMBER

LARGEST_NUMBER = 3.4e38  # of float32


def find_misfit(values: dict[str, Any], kind: type, finite: bool = True) -> str | None:
    """Return what is wrong with the first value that is not of the type of its field; None: nothing is.

    Args:
        values: by field, of a dataclass `kind`.
        finite: whether numbers must be.
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
    """Return the number that a text is, which must be one that float32 can hold: curves of larger ones overflow.

    Raises:
        ValueError: it is not.
    """
    number = float(text)
    if not abs(number) <= LARGEST_NUMBER:  # NaN as well
        raise ValueError(f"{text[:40]} is no figure of a run")
    return number


def _is_required(entry: dataclasses.Field) -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def fits(value: object, kind: Any, finite: bool = True) -> bool:
    """Whether a value is of a type: a plain one, a choice, a list, a dict or a union.

    Args:
        finite: whether numbers must be, and such as float32 can hold.
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
