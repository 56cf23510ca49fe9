"""Correct the scores that a model gives its masks, by a map that was fitted where the truth was known."""

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
