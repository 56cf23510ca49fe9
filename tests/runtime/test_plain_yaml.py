import os

import pytest

from finestsam.errors import Defect
from finestsam.runtime.plain_yaml import MAX_FILE_BYTES, parse_yaml, read_yaml

LAUGHS = "\n".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}' if k else '1'] * 10)}]" for k in range(10))
MERGES = [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}" for k in range(1, 10)]
MERGED = "\n".join(["a0: &a0 {x: 1}", *MERGES])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1\nb: [x, 2.5, null, true]", {"a": 1, "b": ["x", 2.5, None, True]}),
        ("base: &b {x: 1}\nother: {<<: *b, y: 2}", {"base": {"x": 1}, "other": {"x": 1, "y": 2}}),
        ("day: 2024-10-10", {"day": "2024-10-10"}),
        ("day: 2024-13-45", {"day": "2024-13-45"}),
        ("", None),
    ],
)
def test_what_a_person_writes_is_read(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML: .* at line 1 column 5"),
        ("a: !!python/object:os.system {}", "not YAML: could not determine a constructor"),
        ("a: !!bool maybe", "not YAML: a value does not fit its tag"),
        ("a: !!timestamp hello", "not YAML: a value does not fit its tag"),
        ("a: !!int ''", "not YAML: a value does not fit its tag"),
        ("a: !!binary é", "not YAML"),
        ("{[a]: b}", "not YAML: found unhashable key"),
        ("a: \x00", "not YAML: "),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: 1" + ":59" * 5000, "a number of 15001 digits"),
        ("a: " + "[" * 400 + "]" * 400, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("a: &a {x: *a}", "a value that contains itself"),
        (LAUGHS, "more than 100,000 values"),
        (MERGED, "more than 100,000 values"),
    ],
    ids=lambda text: text[:16],
)
def test_everything_else_is_one_line(text, message):
    with pytest.raises(Defect, match=message) as caught:
        parse_yaml(text)

    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "long.yaml").write_bytes(b" " * (MAX_FILE_BYTES + 1))
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfa: 1")

    for name, message in (
        ("pipe", "not a regular file"), ("zero", "not a regular file"), ("long", "1,000,001 bytes, expected at most"),
        ("latin", "not YAML"), ("none", "no such file"), ("x" * 300, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(Defect, match=message):
            read_yaml(tmp_path / f"{name}.yaml")

    assert read_yaml(tmp_path / "marked.yaml") == {"a": 1}
