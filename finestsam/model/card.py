"""`best.json`: what must be known about weights to use them, in a file of the same name beside them."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finestsam.errors import UserError
from finestsam.whole_files import write_json


@dataclass
class Card:
    """Written by training; read by prediction, evaluation and export, so that nothing is given twice."""

    model_type: str
    image_size: int  # pixels of the longest side
    multimask_output: bool  # which of the decoder's tokens were trained
    categories: list[str]  # of --task classes in the order of the head's classes, without the first
    generator: dict[str, Any] = field(default_factory=dict)  # thresholds, by their names in GeneratorConfig
    goal: str = ""  # what those thresholds were chosen for, as evaluate.goal; "": they were not chosen
    tuned_on: int = 0  # validation images that they were chosen on
    # The thresholds that did best for the baseline: the starting weights at the same image size, for the same goal, on
    # the same images.
    baseline_generator: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)  # the same metrics of the untouched model
    step: int = 0
    started_from: str = "random weights"
    started_from_sha256: str | None = None
    kept_original: float = 0.0  # share of the weights that it started from in these
    task: str = "masks"
    category_ids: list[int] = field(default_factory=list)  # of categories, in their order; of --task classes alone
    classes: list[str] = field(default_factory=list)  # of the semantic task, by number; the first is the background
    ignores_unlabelled: bool = False  # in the semantic task
    # Blocks of the image encoder with FFT attention: where there are any, segment_anything cannot use the weights.
    fft_blocks: list[int] = field(default_factory=list)
    finestsam_version: str = ""


def read_card(weights: Path) -> Card | None:
    """Return the card beside a weights file; None where there is none.

    Raises:
        UserError: the file is there and is no card.
    """
    path = weights.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {entry.name for entry in dataclasses.fields(Card)}
        return Card(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a description of weights ({error}); move it away to use {weights.name} without it"
        ) from None


def write_card(weights: Path, card: Card) -> None:
    """Write the card beside a weights file."""
    write_json(weights.with_suffix(".json"), dataclasses.asdict(card), indent=2)
