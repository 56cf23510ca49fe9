"""`best.json`: the settings and metrics of a weights file, in a file of the same name beside it."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from finestsam.config import (
    IMAGE_SIZE_RANGE,
    PATCH_SIZE,
    Config,
    EvaluateConfig,
    GeneratorConfig,
    lies_in,
    list_choices,
)
from finestsam.errors import UserError
from finestsam.runtime.value_types import find_misfit, fits
from finestsam.runtime.whole_files import write_json

TASKS = [name for name in list_choices(get_type_hints(Config)["task"]) if name != "auto"]
GOALS = list_choices(get_type_hints(EvaluateConfig)["goal"])


@dataclass
class Card:
    """The content of `best.json`. Training writes it; prediction, evaluation and export read it."""

    model_type: str
    image_size: int  # pixels of the longest side
    multimask_output: bool  # which of the decoder's tokens were trained
    categories: list[str]  # --task classes: in the order of the head's classes, without the first (no object)
    generator: dict[str, Any] = field(default_factory=dict)  # thresholds, by their names in GeneratorConfig
    goal: str = ""  # the evaluate.goal that the thresholds were tuned for; "": they were not tuned
    tuned_on: int = 0  # number of validation images that they were tuned on
    # Thresholds tuned for the baseline: the starting weights, with the same image size, goal and images.
    baseline_generator: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    baseline: dict[str, float] = field(default_factory=dict)  # the same metrics of the starting weights
    step: int = 0
    started_from: str = "random weights"
    started_from_sha256: str | None = None
    kept_original: float = 0.0  # share of the starting weights that is blended into these
    task: str = "masks"
    category_ids: list[int] = field(default_factory=list)  # --task classes: in the order of categories
    classes: list[str] = field(default_factory=list)  # semantic task: names by class; the first is the background
    ignores_unlabelled: bool = False  # semantic task: unlabelled pixels were ignored, not background
    # Blocks of the image encoder with FFT attention; if there are any, segment_anything cannot load the weights.
    fft_blocks: list[int] = field(default_factory=list)
    finestsam_version: str = ""


def read_card(weights: Path) -> Card | None:
    """Return the card beside a weights file; None where there is none.

    Raises:
        UserError: the file exists and is not a card.
    """
    path = weights.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if "floor" in values:  # cards of the first runs have the baseline's metrics under this name
            values.setdefault("baseline", values.pop("floor"))
        known = {entry.name for entry in dataclasses.fields(Card)}
        card = Card(**{name: value for name, value in values.items() if name in known})
        problem = _find_problem(card)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error)
    if problem:
        raise UserError(
            f"{path}: not a description of weights ({problem}); move it away to use {weights.name} without it"
        )
    return card


def _find_problem(card: Card) -> str | None:
    """Return what is wrong with a card, in words; None: nothing."""
    problem = find_misfit(vars(card), Card)
    if problem:
        return problem
    low, high = IMAGE_SIZE_RANGE
    if not low <= card.image_size <= high or card.image_size % PATCH_SIZE:
        return f"image_size is {card.image_size}, expected a multiple of {PATCH_SIZE} from {low} to {high}"
    if card.task not in TASKS:
        return f"task is {card.task!r:.60}, expected one of {', '.join(TASKS)}"
    if card.task == "classes" and len(card.category_ids) != len(card.categories):
        return f"{len(card.category_ids)} category_ids, expected one for each of {len(card.categories)} categories"
    if card.task == "semantic" and not card.classes:
        return "task is semantic, and classes is empty"
    if card.goal not in ("", *GOALS):
        return f"goal is {card.goal!r:.60}, expected one of {', '.join(GOALS)}"
    return find_generator_problem(card.generator) or find_generator_problem(card.baseline_generator)


def find_generator_problem(settings: dict[str, Any]) -> str | None:
    """Return what is wrong with the generator's settings of a card, in words; None: nothing."""
    hints = get_type_hints(GeneratorConfig)
    for entry in dataclasses.fields(GeneratorConfig):
        value = settings.get(entry.name)
        if value is None and entry.name not in settings:
            continue
        valid, choices = entry.metadata["valid"], list_choices(entry.type)
        if value is None or not fits(value, hints[entry.name]) or (valid and not lies_in(value, valid)):
            expected = f"one of {', '.join(choices)}" if choices else f"a number in {valid}"
            return f"generator.{entry.name} is {value!r:.60}, expected {expected}"
    knots = settings.get("score_map", [])
    if not fits(knots, list[list[float]]) or any(len(knot) != 2 for knot in knots):
        return "generator.score_map is no list of pairs of numbers"
    return None


def write_card(weights: Path, card: Card) -> None:
    """Write the card beside a weights file."""
    write_json(weights.with_suffix(".json"), dataclasses.asdict(card), indent=2)
