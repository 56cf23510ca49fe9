"""The classes of masks: no object, and the categories of a dataset."""

from collections.abc import Mapping, Sequence

from finestsam.data.semantic import ClassTable

NO_OBJECT_NAME = "no object"


def number_categories(categories: Mapping[int, str], names: Sequence[str] | None = None) -> ClassTable:
    """Give the categories of a dataset the classes of masks; those of one name are one class.

    Args:
        categories: names by id.
        names: of a model's classes 1, 2, ..., among which the categories are found by name; None: they are those of
            the dataset, in the order of their ids.
    """
    if names is None:
        names = list(dict.fromkeys(categories[number] for number in sorted(categories)))
    numbers = {name: number for number, name in enumerate(names, start=1)}
    known = {number: numbers[name] for number, name in categories.items() if name in numbers}
    return ClassTable([NO_OBJECT_NAME, *names], known)


def list_category_ids(table: ClassTable) -> list[int]:
    """Return the id of each of the classes 1, 2, ... in the dataset: of several the lowest, of none a free one."""
    ids = {number: category_id for category_id, number in sorted(table.by_category.items(), reverse=True)}
    free = max(table.by_category, default=0)
    for number in range(1, len(table.names)):
        if number not in ids:
            free += 1
            ids[number] = free
    return [ids[number] for number in range(1, len(table.names))]
