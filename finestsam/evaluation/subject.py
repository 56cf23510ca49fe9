"""The models to measure, ours and the baseline: their weights, image size and thresholds."""

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
        origin: to print: what they were tuned for, and on which images.
        goal: what to tune the thresholds that are not given for, on the evaluated images; empty: do not tune.
    """

    settings: GeneratorConfig
    origin: str
    goal: str = ""


@dataclass(frozen=True)
class Setup:
    """One model as it was measured, to print."""

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
        """Return the thresholds as text, by their names."""
        if self.thresholds is None:
            return {}
        names = [name for name in GENERATOR_DEFAULTS if self.has_classes or name != "no_object_thresh"]
        values = {name: getattr(self.thresholds.settings, name) for name in names}
        return {name: value if isinstance(value, str) else f"{value:g}" for name, value in values.items()}

    @property
    def listed_settings(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


def find_thresholds(config: Config, card: Card | None, goal: str) -> Thresholds:
    """Return the thresholds to evaluate weights with: given ones first, then those of the card, then SAM's.

    Args:
        goal: what the card's thresholds were tuned for, where the card does not say.
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
    """Return the thresholds for the weights that training started from: those tuned for them in the same validation.

    Where these are not known, they are tuned on the evaluated images, for the same goal.

    Args:
        card: of the weights that are compared with the starting weights.
        goal: as of `find_thresholds`.
    """
    if config.evaluate.search and not _are_all_given(config):
        return _search_thresholds(config, None, config.evaluate.goal)
    if card.baseline_generator:
        stored = replace(card, generator=card.baseline_generator)
        return find_thresholds(config, stored, goal)
    needs_tuning = config.evaluate.search is not False and bool(card.generator) and not _are_all_given(config)
    if needs_tuning:
        return _search_thresholds(config, None, card.goal or goal or config.evaluate.goal)
    return find_sam_thresholds(config)


def find_sam_thresholds(config: Config) -> Thresholds:
    """Return segment_anything's own thresholds, except for those that are given."""
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


# With less than this share of common masks, the masks of two sets of thresholds are both shown.
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
        """Return the model with the thresholds that were used; None where the generator did not run."""
        model = self.loaded.model
        has_classes = model.class_head is not None
        return Setup(self.loaded.source, self.loaded.model_type, model.image_size, thresholds, has_classes)


def find_baseline(config: Config, loaded: LoadedModel | None, goal: str) -> Subject | None:
    """Return the model to compare with; None where there is none.

    The weights that training started from get the image size and multimask_output of the evaluated model. Other weights
    that the user names keep their own.

    Args:
        loaded: the evaluated model; None: results of another program, which have no starting weights.
        goal: what its thresholds were tuned for, where its card does not say.
    """
    name, card = config.evaluate.against, loaded.card if loaded else None
    if name == "auto":
        name = _find_origin(card) if card else None
    if name in (None, "none"):
        return None
    is_origin = _is_origin(config, name, card)
    task = config.task if config.task == "masks" else "auto"  # the baseline may have another task than our model
    model = ModelConfig(checkpoint=str(name), image_size=loaded.model.image_size if is_origin else None)
    device = loaded.model.device if loaded else None
    other = load_model(replace(config, task=task, model=model), prefer_runs=True, device=device)
    if is_origin:
        other.model.multimask_output = loaded.model.multimask_output
        return Subject(other, find_baseline_thresholds(config, card, goal), "baseline")
    return Subject(other, find_thresholds(config, other.card, ""), "baseline")


def _find_origin(card: Card) -> str | None:
    """Return the file of the starting weights; None where it is missing or has changed."""
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
    """Return whether a file holds the starting weights of the evaluated ones, by their hash."""
    if card is None or card.started_from_sha256 is None:
        return False
    path = find_weights(replace(config, model=ModelConfig(checkpoint=str(name))))
    return path is not None and path.is_file() and hash_file(path) == card.started_from_sha256


def are_alike(found: list[Detections], others: list[Detections]) -> bool:
    """Return whether two sets of thresholds give nearly the same masks on a set of images."""
    masks, other_masks = (
        {(index, rle["counts"]) for index, image in enumerate(images) for rle in image.rles}
        for images in (found, others)
    )
    return len(masks & other_masks) >= ALIKE_SHARE * len(masks | other_masks)
