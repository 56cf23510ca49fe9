"""`--evaluate.store_thresholds`: write what tuning found into the card beside the weights."""

from dataclasses import replace
from pathlib import Path

from finestsam.config import Config
from finestsam.errors import UserError, printable
from finestsam.evaluation.measuring import Outcome
from finestsam.model.card import write_card
from finestsam.model.load import LoadedModel
from finestsam.model.weights import BUILTIN_WEIGHTS


def refuse_unwritable_card(config: Config, loaded: LoadedModel) -> None:
    """Raise a UserError where thresholds are to be stored, and the weights have no card of the user's own."""
    if not config.evaluate.store_thresholds:
        return
    reason = ""
    if loaded.path is None or loaded.card is None:
        reason = "they have no description beside them (best.json of a run)"
    elif loaded.path.resolve() in {Path(path).resolve() for path in BUILTIN_WEIGHTS.values()}:
        reason = "they are part of finestsam; copy them and their .json elsewhere first"
    elif loaded.model.semantic_head is not None:
        reason = "they are for classes of pixels, which no threshold decides about"
    if reason:
        raise UserError(f"evaluate.store_thresholds: {printable(loaded.source)}: {reason}")


def store_thresholds(loaded: LoadedModel, goal: str, ours: Outcome, baseline: Outcome | None) -> Path:
    """Write the thresholds of both models into the card, with what they were chosen for, and return its path.

    Raises:
        UserError: it cannot be written.
    """
    card = replace(
        loaded.card,
        generator=ours.tuned,
        goal=goal,
        tuned_on=ours.tuned_on,
        # Others would be for another goal or other images.
        baseline_generator=(baseline.tuned or {}) if baseline else {},
    )
    path = loaded.path.with_suffix(".json")
    try:
        write_card(loaded.path, card)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be written: {error.strerror or error}") from None
    return path
