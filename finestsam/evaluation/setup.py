"""What an evaluation measures: weights at an image size, with thresholds that were chosen for something, somewhere."""

from dataclasses import dataclass, replace

from finestsam.config import GENERATOR_DEFAULTS, Config, GeneratorConfig
from finestsam.errors import name_count, printable
from finestsam.evaluation.generator_scores import list_fixed
from finestsam.model.card import Card
from finestsam.prediction.generator import resolve_generator


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
