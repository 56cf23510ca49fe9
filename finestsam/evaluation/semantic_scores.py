"""Score label maps: IoU and Dice of each class, their means, and pixel accuracy, from one table of counted pixels."""

import numpy as np

from finestsam.data.semantic import BACKGROUND_NAME, IGNORED


def count_pixels(truth: np.ndarray, predicted: np.ndarray, class_count: int) -> np.ndarray:
    """Return how many pixels of each true class, the rows, were given each class, the columns: K x K, int64.

    Args:
        truth: H x W; pixels that are `IGNORED` do not count.
        predicted: H x W.
    """
    counted = truth != IGNORED
    pairs = truth[counted].astype(np.int64) * class_count + predicted[counted]
    return np.bincount(pairs, minlength=class_count**2).reshape(class_count, class_count)


def summarize_pixels(counts: np.ndarray, names: list[str]) -> dict[str, float]:
    """Return `miou`, `mdice` and `pixel_accuracy`, and under `iou/<class>` and `dice/<class>` those of each class.

    The means are over the classes that are there, in the truth or in the prediction, the background among them. Source:
    Everingham et al., The PASCAL Visual Object Classes Challenge (IJCV 2010), section 4.3, which counts the pixels of
    all images together.

    Args:
        counts: K x K, the sum of `count_pixels` over images.
    """
    hits, true, given = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    is_there = true + given > 0
    if not is_there.any():
        return {}
    iou = hits[is_there] / (true + given - hits)[is_there]
    dice = 2 * hits[is_there] / (true + given)[is_there]
    figures = {"miou": float(iou.mean()), "mdice": float(dice.mean()), "pixel_accuracy": float(hits.sum() / true.sum())}
    kept = [name for name, there in zip(names, is_there, strict=True) if there]
    figures |= {f"iou/{name}": float(value) for name, value in zip(kept, iou, strict=True)}
    return figures | {f"dice/{name}": float(value) for name, value in zip(kept, dice, strict=True)}


def describe_classes(figures: dict[str, float]) -> list[str]:
    """Return a line for each class, the best IoU first, the background last."""
    names = [name.partition("/")[2] for name in figures if name.startswith("iou/")]
    order = sorted(names, key=lambda name: (name == BACKGROUND_NAME, -figures[f"iou/{name}"]))
    return [f"{name:<24}iou {figures[f'iou/{name}']:.4f}   dice {figures[f'dice/{name}']:.4f}" for name in order]
