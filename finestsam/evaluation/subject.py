"""What is measured: weights at an image size with thresholds, ours and the baseline that they are compared with."""

from dataclasses import dataclass, replace
from pathlib import Path

from finestsam.config import GENERATOR_DEFAULTS, Config, GeneratorConfig, ModelConfig
from finestsam.errors import name_count, printable
from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.generator_scores import list_fixed
from finestsam.model.card import Card
from finestsam.model.load import LoadedModel, find_weights, load_model
from finestsam.prediction.generator import resolve_generator
from finestsam.runtime.download import hash_file


@dataclass(frozen=True)
class Thresholds:
    """The generator's settings for a model, and where they come from.

    Attributes:
        settings: without None.
        origin: for the reader: what they were chosen for, and on what.
        goal: what those that are open are still to be chosen for, on the evaluated images; empty: none is.
    """

    settings: GeneratorConfig
    origin: str
    goal: str = ""


@dataclass(frozen=True)
class Setup:
    """One model as it was measured, for the reader."""

    name: str
    model_type: str
    image_size: int
    thresholds: Thresholds | None  # None: the generator did not run
    has_classes: bool = False

    @property
    def model(self) -> str:
        return f"{printable(self.name)} ({self.model_type} at {self.image_size} pixels)"

    @property
    def settings(self) -> dict[str, str]:
        """Return the thresholds by their names, as the reader sees them."""
        if self.thresholds is None:
            return {}
        names = [name for name in GENERATOR_DEFAULTS if self.has_classes or name != "no_object_thresh"]
        values = {name: getattr(self.thresholds.settings, name) for name in names}
        return {name: value if isinstance(value, str) else f"{value:g}" for name, value in values.items()}

    @property
    def listed_settings(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


def find_thresholds(config: Config, card: Card | None, goal: str) -> Thresholds:
    """Return the thresholds to evaluate weights with: those stored beside them, else SAM's; the given ones come first.

    Args:
        goal: what they were chosen for, where the card does not say.
    """
    if config.evaluate.search and not _are_all_given(config):
        return _search_thresholds(config, card, config.evaluate.goal)
    if card is None or not card.generator:
        return find_sam_thresholds(config)
    goal = card.goal or goal
    origin = "stored beside the weights"
    if goal and card.tuned_on:
        origin = f"chosen for {goal} on {name_count(card.tuned_on, 'validation image')}"
    elif goal:
        origin = f"chosen for {goal} in training"
    return Thresholds(resolve_generator(config.generator, card), _mention_given(config, origin))


def find_baseline_thresholds(config: Config, card: Card, goal: str) -> Thresholds:
    """Return those for the weights that training started from: what did best for them in the same validation.

    Where that is not known, they are still to be chosen on the evaluated images, for the same goal.

    Args:
        card: of the weights that are compared with them.
        goal: as of `find_thresholds`.
    """
    if config.evaluate.search and not _are_all_given(config):
        return _search_thresholds(config, None, config.evaluate.goal)
    if card.baseline_generator:
        stored = replace(card, generator=card.baseline_generator)
        return find_thresholds(config, stored, goal)
    is_to_search = config.evaluate.search is not False and bool(card.generator) and not _are_all_given(config)
    if is_to_search:
        return _search_thresholds(config, None, card.goal or goal or config.evaluate.goal)
    return find_sam_thresholds(config)


def find_sam_thresholds(config: Config) -> Thresholds:
    """Return segment_anything's own thresholds, but for those that are given."""
    return Thresholds(resolve_generator(config.generator, card=None), _mention_given(config, "of segment_anything"))


def _search_thresholds(config: Config, card: Card | None, goal: str) -> Thresholds:
    origin = _mention_given(config, f"chosen for {goal} on these images")
    return Thresholds(resolve_generator(config.generator, card), origin, goal)


def _are_all_given(config: Config) -> bool:
    return list_fixed(config.generator) == set(GENERATOR_DEFAULTS)


def _mention_given(config: Config, origin: str) -> str:
    given = list_fixed(config.generator)
    if given == set(GENERATOR_DEFAULTS):
        return "given"
    return f"{origin} ({', '.join(sorted(given))} given)" if given else origin


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
