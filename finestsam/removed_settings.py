"""Settings that finestsam once had: what decides now in their place, for files and command lines that name them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Removed:
    """A setting that is gone.

    Attributes:
        value: that every run has now; one that was begun with it goes on unchanged.
        decides: what decides now.
    """

    value: Any
    decides: str


AUGMENT_MIRROR = "augment.orientations mirrors and turns images"
AUGMENT_LIGHT = "augment.light changes brightness and contrast together"
AUGMENT_COLOUR = "augment.colour changes saturation and hue together"
HEAD_RATE = "opt.head_learning_rate is the rate of any task's head"
ONE_RATE = "opt.learning_rate is the rate of all but the image encoder and heads"
WEIGHTS = "the losses of a task are added up as they are"

REMOVED = {
    "compile": Removed(False, "the image encoder is never compiled"),
    "keep_memory": Removed(True, "freed memory is always kept on a CPU with glibc"),
    "flush_denormals": Removed(True, "numbers below 1.2e-38 are always zero on a CPU"),
    "prompts.correction_share": Removed(0.5, "half of the training images are corrected"),
    "prompts.box_jitter_ratio": Removed(0.1, "the noise on boxes is that of the SAM paper"),
    "prompts.box_jitter_max_pixels": Removed(20.0, "the noise on boxes is that of the SAM paper"),
    "opt.clip_norm": Removed(1.0, "the gradient's norm is always clipped at 1"),
    "opt.layer_decay": Removed(1.0, "opt.rates.image_encoder is the rate of all of the image encoder's blocks"),
    "opt.rates.prompt_encoder": Removed(1.0, ONE_RATE),
    "opt.rates.mask_decoder": Removed(1.0, ONE_RATE),
    "opt.rates.heads": Removed(1.0, HEAD_RATE),
    "losses.affinity_ratio": Removed(0.0, "only the recipe of the built-in weights trains on affinities"),
    "losses.class_ratio": Removed(1.0, WEIGHTS),
    "model_layer.thaw.norms": Removed(False, "model_layer.thaw.blocks and model_layer.lora adapt a frozen encoder"),
    "model_layer.thaw.biases": Removed(False, "model_layer.thaw.blocks and model_layer.lora adapt a frozen encoder"),
    "model_layer.lora.blocks": Removed([], "all blocks of the image encoder get additions, but those that are thawed"),
    "dataset.min_area_pixels": Removed(1.0, "objects of less than a pixel in the input frame are left out"),
    "augment.flip_horizontal": Removed(0.0, AUGMENT_MIRROR),
    "augment.flip_vertical": Removed(0.0, AUGMENT_MIRROR),
    "augment.turn": Removed(0.0, AUGMENT_MIRROR),
    "augment.scale_min": Removed(1.0, "the longest side of an image, or of a crop, always fills what the model sees"),
    "augment.scale_max": Removed(1.0, "augment.crop_min shows parts of images larger"),
    "augment.brightness": Removed(0.0, AUGMENT_LIGHT),
    "augment.contrast": Removed(0.0, AUGMENT_LIGHT),
    "augment.saturation": Removed(0.0, AUGMENT_COLOUR),
    "augment.hue": Removed(0.0, AUGMENT_COLOUR),
    "store.enabled": Removed(True, "store.max_gigabytes 0 keeps no embeddings"),
    "evaluate.background_points": Removed(32, "32 points of the grid are taken where no object is"),
    "semantic.unlabelled": Removed("background", "dataset.labels partial ignores pixels of no object"),
    "semantic.head_learning_rate": Removed(1e-3, HEAD_RATE),
    "semantic.cross_entropy_ratio": Removed(1.0, WEIGHTS),
    "semantic.dice_ratio": Removed(1.0, WEIGHTS),
    "classes.head_learning_rate": Removed(1e-3, HEAD_RATE),
    "classes.balance": Removed(0.5, "rare categories weigh more by the power of 0.5 of their number"),
    "check.points": Removed("grid", "the sheet shows the points that training prompts with"),
    "check.point_count": Removed(1, "dataset.positive_points and negative_points are shown"),
}

RENAMED = {"evaluate.battery": "evaluate.all_prompts"}


def explain_removed(name: str) -> str | None:
    """Return what decides now in place of a setting that is gone; None: it is none of those."""
    if name in RENAMED:
        return f"{name} is called {RENAMED[name]} now"
    removed = REMOVED.get(name)
    return f"{name} is gone: {removed.decides}" if removed else None


def drop_removed(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a run without those that are gone, and what of the latter cannot be kept, one line each.

    Args:
        settings: by dotted name, as the run was begun with them.
    """
    kept = {RENAMED.get(name, name): value for name, value in settings.items() if name not in REMOVED}
    problems = [
        f"{name} is {value} there, and every run has {now} now: {REMOVED[name].decides}"
        for name, value in settings.items()
        if name in REMOVED and value != (now := _find_value(name, settings))
    ]
    return kept, problems


def _find_value(name: str, settings: dict[str, Any]) -> Any:
    if name == "semantic.unlabelled" and settings.get("dataset.labels") == "partial":
        return "ignore"
    return REMOVED[name].value
