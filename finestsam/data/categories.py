"""Map the categories of a dataset to the classes of masks; class 0 is `no object`."""

from collections.abc import Mapping, Sequence

from finestsam.data.semantic import ClassTable

NO_OBJECT_NAME = "no object"


def number_categories(categories: Mapping[int, str], names: Sequence[str] | None = None) -> ClassTable:
    """Return the classes of masks for the categories of a dataset. Categories of the same name are one class.

    Args:
        categories: names by id.
        names: a model's classes 1, 2, ...: categories are matched to them by name. None: the classes are the
            categories, in the order of their ids.
    """
    if names is None:
        names = list(dict.fromkeys(categories[number] for number in sorted(categories)))
    numbers = {name: number for number, name in enumerate(names, start=1)}
    known = {number: numbers[name] for number, name in categories.items() if name in numbers}
    return ClassTable([NO_OBJECT_NAME, *names], known)


def list_category_ids(table: ClassTable) -> list[int]:
    """Return the category id of each class 1, 2, ...: the lowest of several, or an unused id if there is none."""
    ids = {number: category_id for category_id, number in sorted(table.by_category.items(), reverse=True)}
    free = max(table.by_category, default=0)
    for number in range(1, len(table.names)):
        if number not in ids:
            free += 1
            ids[number] = free
    return [ids[number] for number in range(1, len(table.names))]
