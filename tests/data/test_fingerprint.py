"""What is reported of a dataset that has changed."""

from copy import deepcopy
from dataclasses import replace

import pytest

from finestsam.data.fingerprint import hash_fingerprint, list_changes, take_fingerprint
from finestsam.data.read import LabelledSet
from finestsam.records import DatasetReport


@pytest.fixture
def data(records) -> LabelledSet:
    return LabelledSet(records[:4], records[4:], ["a", "b"], DatasetReport(), "COCO", {1: "a", 2: "b"})


def test_the_same_dataset_is_known_again(data):
    before, now = take_fingerprint(data), take_fingerprint(deepcopy(data))

    assert hash_fingerprint(before) == hash_fingerprint(now)
    assert list_changes(before, now) == []


def change_labels(data: LabelledSet) -> None:
    data.train[1] = replace(data.train[1], annotations=data.train[1].annotations[1:])


def change_a_category(data: LabelledSet) -> None:
    first, *others = data.train[1].annotations
    data.train[1] = replace(data.train[1], annotations=[replace(first, category_id=first.category_id + 1), *others])


def rename_a_category(data: LabelledSet) -> None:
    data.category_names[2] = "c\n"


def change_a_file(data: LabelledSet) -> None:
    data.val[0] = replace(data.val[0], digest="0" * 32)


def add(data: LabelledSet) -> None:
    data.train.append(replace(data.train[0], file_name="new.png"))


def drop(data: LabelledSet) -> None:
    del data.train[0]


def move(data: LabelledSet) -> None:
    data.val.append(data.train.pop(0))


def drop_most(data: LabelledSet) -> None:
    data.train, data.val = data.train[:1], []


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        (change_labels, "with other labels: {1}"),
        (change_a_category, "with other labels: {1}"),
        (rename_a_category, r"categories a, c\n, were a, b"),
        (change_a_file, "another file: {4}"),
        (add, "new: new.png"),
        (drop, "gone: {0}"),
        (move, "on the other side of the split: {0}"),
        (drop_most, "gone: {1}, {2}, {3} and 2 more"),
    ],
)
def test_what_has_changed_is_named(data, records, change, printed):
    before = take_fingerprint(data)
    changed = deepcopy(data)

    change(changed)

    now = take_fingerprint(changed)
    assert hash_fingerprint(now) != hash_fingerprint(before)
    assert list_changes(before, now) == [printed.format(*(record.file_name for record in records))]


def test_an_order_that_has_changed_is_another_dataset(data):
    before = hash_fingerprint(take_fingerprint(data))

    data.train.reverse()

    assert hash_fingerprint(take_fingerprint(data)) != before
