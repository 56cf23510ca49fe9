"""COCO's average precision and recall of every category, and their means, by pycocotools."""

from collections.abc import Sequence

import numpy as np

from finestsam.data.categories import number_categories
from finestsam.data.read import LabelledSet
from finestsam.data.semantic import ClassTable
from finestsam.errors import UserError, printable
from finestsam.evaluation.coco_scores import LIMITS, Detections, build_results, build_truth, run_pycocotools
from finestsam.model.load import LoadedModel
from finestsam.prediction.results import GeneratedMasks
from finestsam.records import Record

MEASURES = ("ap", "ap50", "ar_100")


def score_classes(records: Sequence[Record], found: Sequence[Detections], table: ClassTable) -> dict[str, float]:
    """Return `ap`, `ap50` and `ar_100`, means over categories, and `ap/<name>`, ... of each category.

    As `CocoScorer` measures, except that a mask only matches objects of its own category. Categories without an object
    in these images are left out, and so are those that are no class of the model. `objects/<name>` is the number of
    objects.

    Args:
        found: with classes, as `table` numbers them.
    """
    truth = build_truth(records, table.by_category)
    objects = [one["category_id"] for one in truth.dataset["annotations"] if not one["iscrowd"]]
    numbers, counts = np.unique(np.array(objects, dtype=int), return_counts=True)
    if len(numbers) == 0:
        return {}
    evaluator = run_pycocotools(truth, build_results(truth, found), numbers.tolist())
    precision, recall = evaluator.eval["precision"][:, :, :, 0, -1], evaluator.eval["recall"][:, :, 0]  # T R K, T K M
    by_measure = {
        "ap": precision.mean(axis=(0, 1)),
        "ap50": precision[0].mean(axis=0),
        "ar_100": recall[:, :, LIMITS.index(100)].mean(axis=0),
    }
    figures = {name: float(values.mean()) for name, values in by_measure.items()}
    names = [table.names[number] for number in numbers]
    for measure, values in by_measure.items():
        figures |= {f"{measure}/{name}": float(value) for name, value in zip(names, values, strict=True)}
    return figures | {f"objects/{name}": int(count) for name, count in zip(names, counts, strict=True)}


def detect(masks: GeneratedMasks) -> Detections:
    """Return the generator's masks as detections; their scores are priority times probability of the category."""
    classes = masks.classes.tolist() if masks.has_classes else None
    return Detections(masks.rles, (masks.priorities * masks.class_scores).tolist(), classes)


def list_classes(figures: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
    """Return each category's name and figures, the best average precision first.

    Args:
        figures: as `score_classes` names them.
    """
    names = [name.partition("/")[2] for name in figures if name.startswith("ap/")]
    rows = [(name, {measure: figures[f"{measure}/{name}"] for measure in (*MEASURES, "objects")}) for name in names]
    return sorted(rows, key=lambda row: -row[1]["ap"])


def describe_categories(figures: dict[str, float]) -> list[str]:
    """Return a line for each category; arguments as of `list_classes`."""
    return [
        f"{printable(name):<24}ap {row['ap']:.4f}   ap50 {row['ap50']:.4f}   ar_100 {row['ar_100']:.4f}   "
        f"{row['objects']} objects"
        for name, row in list_classes(figures)
    ]


def match_categories(loaded: LoadedModel, data: LabelledSet) -> ClassTable | None:
    """Return the classes that a model gives masks; None for one that gives none.

    Args:
        data: it may have none of the categories.
    """
    has_head = loaded.model.class_head is not None
    return number_categories(data.category_names, loaded.card.categories) if has_head else None


def refuse_strangers(table: ClassTable, categories: dict[int, str], source: str) -> None:
    """Print which categories of a dataset are no class of the model.

    Args:
        categories: of the dataset, names by id.
        source: of the classes, for the message.

    Raises:
        UserError: no category is a class of the model.
    """
    unknown = [name for number, name in categories.items() if number not in table.by_category]
    if not table.by_category:
        theirs, ours = (", ".join(map(printable, names[:10])) for names in (unknown, table.names[1:]))
        raise UserError(f"no category of the dataset ({theirs}) is a class of {source} ({ours})")
    if unknown:
        print(f"ignored, as the model has no such class: {', '.join(map(printable, unknown))}")
