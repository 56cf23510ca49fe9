"""Broken versions of a file, drawn at random: what a faulty tool, a bad disk or an attacker would leave."""

import copy
import json
from typing import Any

import numpy as np

HOSTILE = [
    None, True, -1, 0, 1.5, 1e12, -1e300, 2**31, 2**63, 10**40, float("nan"), float("inf"), "", "x", "1",
    "../../etc/passwd", "a\x00b", "\ud800", [], [[]], [[[]]], {}, {"size": [100_000, 100_000], "counts": "0"},
    {"counts": [-1]},
    {"size": [96, 96], "counts": [9216, 1]}, {"size": [96, 96], "counts": "\x7f\x7f"}, [[1, 1]], [[float("nan")] * 6],
    [[0, 0, 1e9, 0, 1e9, 1e9]], [1, 2, 3, 4, 5, 6], "9" * 400,
]  # fmt: skip
SPLICES = [b"", b"\x00" * 16, b"\xff" * 16, b"[" * 5000, b"{" * 50, b'"', b"<html>", b"\xff\xd8\xff\xe0", b"NaN"]


def mutate_annotations(content: dict, generator: np.random.Generator) -> bytes:
    """Return the bytes of a COCO file with one to four things wrong with it."""
    content = copy.deepcopy(content)
    for _ in range(generator.integers(1, 5)):
        _mutate_node(content, generator)
    data = json.dumps(content).encode()
    return mutate_bytes(data, generator) if generator.random() < 0.3 else data


def _mutate_node(content: dict, generator: np.random.Generator) -> None:
    places = list(_list_places(content))
    parent, key = places[generator.integers(len(places))]
    change = generator.integers(4)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif change == 2:
        other, other_key = places[generator.integers(len(places))]
        parent[key] = copy.deepcopy(other[other_key])
    else:
        parent[key] = copy.deepcopy(HOSTILE[generator.integers(len(HOSTILE))])


def _list_places(node: Any) -> list[tuple[Any, Any]]:
    """Return every place of a JSON tree as what holds it and its key, few of long lists of numbers."""
    keys = list(node) if isinstance(node, dict) else range(min(len(node), 8)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *_list_places(node[key])]]


def mutate_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes with a few of them changed, cut out, repeated or put in, the first ones most often."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 9)):
        size = max(len(changed), 1)
        start = int(generator.integers(min(64, size) if generator.random() < 0.5 else size))
        length = int(generator.integers(1, 64))
        change = generator.integers(5)
        if change == 0:
            changed[start : start + 1] = bytes([generator.integers(256)])
        elif change == 1:
            del changed[start : start + length]
        elif change == 2:
            changed[start:start] = changed[start : start + length]
        elif change == 3:
            changed[start : start + length] = SPLICES[generator.integers(len(SPLICES))]
        else:
            del changed[start + int(generator.integers(size)) :]
    return bytes(changed)
