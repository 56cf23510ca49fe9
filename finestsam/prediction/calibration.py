"""Correct the scores that a model gives its masks, by a map that was fitted where the truth was known; bound them."""

from collections.abc import Sequence

import numpy as np


def correct_scores(scores: np.ndarray, knots: Sequence[Sequence[float]]) -> np.ndarray:
    """Return scores on the map that `evaluation.thresholds.calibrate` fits: straight between knots, level beyond.

    Args:
        knots: pairs of predicted and measured IoU, both rising; none: the scores stay.
    """
    if len(knots) == 0:
        return scores
    predicted, measured = np.array(knots, dtype=float).T
    return np.interp(scores, predicted, measured)


# From here on scores are drawn together, so that none is above 1.
HIGH_SCORE = 0.999
# How far above that a score loses 63 % of its distance to 1: the score head predicts IoUs of up to about 1.05.
HIGH_SPREAD = 0.05


def bound_scores(scores: np.ndarray) -> np.ndarray:
    """Return scores of which none is above 1, in the same order: those up to 0.999 as they are, changes below 0.001.

    The score head is not bounded. To cut its predictions off at 1 would make equals of the best masks, and whoever
    ranks by the scores that are written would get other figures than `--mode evaluate`.
    """
    scores = np.asarray(scores, dtype=float)
    excess = np.maximum(scores - HIGH_SCORE, 0)
    return np.where(excess > 0, 1 - (1 - HIGH_SCORE) * np.exp(-excess / HIGH_SPREAD), scores)
