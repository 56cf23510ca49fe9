"""Read YAML as what a person writes by hand: names, texts, numbers and lists, in bounded time and memory."""

import re
from pathlib import Path
from typing import Any

import yaml

from finestsam.errors import VALUE_ERRORS, Defect

# Somebody wrote it by hand: LVIS has 1203 categories in 40 kB. PyYAML takes ten seconds for the most.
MAX_FILE_BYTES = 1_000_000
# With every alias replaced by what it stands for: nine lines of ten aliases each make a billion.
MAX_NODES = 100_000
MAX_DEPTH = 50
MAX_OPEN_BRACKETS = 500  # as they stand in the text, for each of which PyYAML looks at the others
# No number has more digits, and what Python makes of them takes time that grows with their square.
MAX_NUMBER_LETTERS = 400


class _PlainLoader(yaml.SafeLoader):
    """Dates are texts, as they are to a person: no setting is one, and 2024-13-45 is none."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        Defect: it is no regular file, too large, not YAML, or more than anybody wrote.
    """
    try:
        if not path.is_file():  # False for pipes and devices too, which must not be opened
            raise Defect("unreadable", "no such file" if not path.exists() else "not a regular file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Defect("too_large", f"{path.stat().st_size:,} bytes, expected at most {MAX_FILE_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Defect("not_yaml", f"not YAML: {error}") from None
    except (OSError, ValueError) as error:
        raise Defect("unreadable", f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """Return what a text in YAML says.

    Raises:
        Defect: it is not YAML, or more than anybody wrote.
    """
    loader = None
    try:
        if _count_open_brackets(text) > MAX_OPEN_BRACKETS:
            raise RecursionError
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}, MAX_DEPTH) > MAX_NODES:
            raise Defect("too_large", f"stands for more than {MAX_NODES:,} values, by aliases (*name)")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise Defect("not_yaml", f"not YAML: {_describe(error)}") from None
    except RecursionError:
        raise Defect(
            "too_deep", "not YAML that can be used: nested too deeply, or an alias of what it lies in"
        ) from None
    except VALUE_ERRORS as error:
        raise Defect(
            "not_yaml", f"not YAML: a value is not of the type that it is said to be ({error!r:.100})"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _count_open_brackets(text: str) -> int:
    """Return how many brackets are open at most, those within quotes like all others."""
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for, each alias replaced by its own.

    Args:
        counts: of the nodes that were counted, by id; 0 while one is being counted.
        depth: how deep it may be.

    Raises:
        RecursionError: a node lies in itself, or is deeper.
    """
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_NUMBER_LETTERS and not node.tag.endswith((":str", ":binary")):
            raise Defect("too_large", f"not YAML that can be used: a number of {len(node.value)} digits")
        return 1
    known = counts.get(id(node))
    if known == 0 or depth == 0:
        raise RecursionError
    if known is None:
        counts[id(node)] = 0
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known = counts[id(node)] = 1 + sum(_count_nodes(part, counts, depth - 1) for part in inner)
    return known


def _describe(error: yaml.YAMLError) -> str:
    """Return what is wrong in one line, and where."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())[:200]
    return f"{' '.join(problem.split())[:160]} at line {mark.line + 1} column {mark.column + 1}"
