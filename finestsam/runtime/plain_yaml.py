"""Read the YAML that people write by hand (names, texts, numbers and lists), in bounded time and memory."""

import re
from pathlib import Path
from typing import Any

import yaml

from finestsam.errors import VALUE_ERRORS, Defect

# LVIS has 1203 categories in 40 kB. PyYAML takes ten seconds for a file of this size.
MAX_FILE_BYTES = 1_000_000
# Counted with every alias replaced by its value: nine lines of ten aliases each make a billion nodes.
MAX_NODES = 100_000
MAX_DEPTH = 50
MAX_OPEN_BRACKETS = 500  # in the text; PyYAML's time grows with their square
# Python's time to parse a number grows with the square of its digits.
MAX_NUMBER_LETTERS = 400


class _PlainLoader(yaml.SafeLoader):
    """Reads dates as text: no setting is a date, and 2024-13-45 looks like a date but is not valid."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        Defect: it is not a regular file, not YAML, or beyond the limits.
    """
    try:
        if not path.is_file():  # False for pipes and devices too: they must not be opened
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
    """Return the content of a YAML text.

    Raises:
        Defect: it is not YAML, or beyond the limits.
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
            raise Defect("too_large", f"more than {MAX_NODES:,} values, with aliases (*name) replaced by their values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise Defect("not_yaml", f"not YAML: {_describe(error)}") from None
    except RecursionError:
        raise Defect("too_deep", "YAML that is nested too deeply, or a value that contains itself") from None
    except VALUE_ERRORS as error:
        raise Defect("not_yaml", f"not YAML: a value does not fit its tag ({error!r:.100})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _count_open_brackets(text: str) -> int:
    """Return the largest number of brackets that are open at once; brackets inside quotes count too."""
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


def _count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return the number of values in a node, with each alias replaced by its values.

    Args:
        counts: results so far, by id of the node; 0: this node is being counted.
        depth: largest allowed depth.

    Raises:
        RecursionError: a node contains itself, or is too deep.
    """
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MAX_NUMBER_LETTERS and not node.tag.endswith((":str", ":binary")):
            raise Defect("too_large", f"a number of {len(node.value)} digits, expected at most {MAX_NUMBER_LETTERS}")
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
    """Return one line: the problem and its position."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())[:200]
    return f"{' '.join(problem.split())[:160]} at line {mark.line + 1} column {mark.column + 1}"
