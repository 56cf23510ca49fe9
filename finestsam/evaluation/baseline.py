"""The baseline of an evaluation: the weights that training started from, at the same image size, for the same goal."""

from dataclasses import dataclass, replace
from pathlib import Path

from finestsam.config import Config, ModelConfig
from finestsam.errors import printable
from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.setup import Setup, Thresholds, find_baseline_thresholds, find_thresholds
from finestsam.model.card import Card
from finestsam.model.load import LoadedModel, find_weights, load_model
from finestsam.runtime.download import hash_file

# Of the masks of two choices of thresholds, the share in common below which both are worth showing.
ALIKE_SHARE = 0.9


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        title: of the progress bars.
    """

    loaded: LoadedModel
    thresholds: Thresholds
    title: str

    def describe(self, thresholds: Thresholds | None) -> Setup:
        """Return what is measured; the thresholds are known when it is, None where the generator does not run."""
        model = self.loaded.model
        has_classes = model.class_head is not None
        return Setup(self.loaded.source, self.loaded.model_type, model.image_size, thresholds, has_classes)


def find_baseline(config: Config, loaded: LoadedModel | None, goal: str) -> Subject | None:
    """Return the model to compare with; None where there is none.

    The weights that training started from are taken at the image size, and give as many masks for a prompt, as those
    that are evaluated; others that are named are as they are.

    Args:
        loaded: the model that is evaluated; None: results of another program, which started from nothing.
        goal: what its thresholds were chosen for, where its card does not say.
    """
    name, card = config.evaluate.against, loaded.card if loaded else None
    if name == "auto":
        name = _find_origin(card) if card else None
    if name in (None, "none"):
        return None
    is_origin = _is_origin(config, name, card)
    task = config.task if config.task == "masks" else "auto"  # what it was trained for, like ours or not
    model = ModelConfig(checkpoint=str(name), image_size=loaded.model.image_size if is_origin else None)
    device = loaded.model.device if loaded else None
    other = load_model(replace(config, task=task, model=model), prefer_runs=True, device=device)
    if is_origin:
        other.model.multimask_output = loaded.model.multimask_output
        return Subject(other, find_baseline_thresholds(config, card, goal), "baseline")
    return Subject(other, find_thresholds(config, other.card, ""), "baseline")


def _find_origin(card: Card) -> str | None:
    """Return the file that weights were trained from, if it is still there as it was."""
    if card.started_from_sha256 is None:
        return None
    path = Path(card.started_from)
    if not path.is_file() or hash_file(path) != card.started_from_sha256:
        print(
            f"no baseline: {printable(path)}, which these weights were trained from, is not there any more; "
            "--evaluate.against FILE names another place"
        )
        return None
    return str(path)


def _is_origin(config: Config, name: str, card: Card | None) -> bool:
    """Return whether a file holds the weights that the evaluated ones were trained from, wherever it lies."""
    if card is None or card.started_from_sha256 is None:
        return False
    path = find_weights(replace(config, model=ModelConfig(checkpoint=str(name))))
    return path is not None and path.is_file() and hash_file(path) == card.started_from_sha256


def are_alike(found: list[Detections], others: list[Detections]) -> bool:
    """Return whether two choices of thresholds give nearly the same masks of a set of images."""
    masks, other_masks = (
        {(place, rle["counts"]) for place, one in enumerate(each) for rle in one.rles} for each in (found, others)
    )
    return len(masks & other_masks) >= ALIKE_SHARE * len(masks | other_masks)
