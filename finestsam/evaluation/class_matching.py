"""Which of a model's classes the categories of a labelled dataset are: those of the same name."""

from finestsam.data.categories import number_categories
from finestsam.data.read import LabelledSet
from finestsam.data.semantic import ClassTable
from finestsam.errors import UserError, printable
from finestsam.model.load import LoadedModel


def match_categories(loaded: LoadedModel, data: LabelledSet) -> ClassTable | None:
    """Return the classes that a model gives masks; None for one that gives none.

    Args:
        data: it may have none of the categories.
    """
    has_head = loaded.model.class_head is not None
    return number_categories(data.category_names, loaded.card.categories) if has_head else None


def refuse_strangers(table: ClassTable, categories: dict[int, str], source: str) -> None:
    """Say which categories of a dataset, names by id, are no class of the model.

    Args:
        source: of the classes, for the message.

    Raises:
        UserError: not one is.
    """
    unknown = [name for number, name in categories.items() if number not in table.by_category]
    if not table.by_category:
        theirs, ours = (", ".join(map(printable, names[:10])) for names in (unknown, table.names[1:]))
        raise UserError(f"no category of the dataset ({theirs}) is a class of {source} ({ours})")
    if unknown:
        print(f"ignored, as the model has no such class: {', '.join(map(printable, unknown))}")
