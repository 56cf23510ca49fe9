"""The masks that the generator finds in an image, and the COCO json of them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from torch import Tensor

from finestsam.config import GeneratorConfig
from finestsam.masks import rle_to_json, rle_to_polygons
from finestsam.runtime.whole_files import write_json


@dataclass
class FilterReport:
    """How many candidates each filter removed, in one image or several; it explains why no mask is left."""

    candidates: int = 0
    low_score: int = 0  # removed by pred_iou_thresh
    unstable: int = 0  # removed by stability_score_thresh
    cut_by_crop: int = 0  # removed because a crop, not the image, cuts them
    duplicates: int = 0  # removed by box_nms_thresh and crop_nms_thresh
    no_object: int = 0  # removed by no_object_thresh
    best_score: float = -np.inf  # of all candidates; -inf: no score was a number
    best_stability: float = -np.inf  # of candidates above pred_iou_thresh; -inf: there are none
    least_no_object: float = np.inf  # smallest probability of no object among stable candidates; inf: there are none

    def count_scores(self, scores: Tensor, is_kept: Tensor) -> None:
        self.candidates += len(scores)
        self.low_score += int((~is_kept).sum())
        self.best_score = max([self.best_score, *scores[scores.isfinite()].tolist()])

    def count_stability(self, stability: Tensor, is_kept: Tensor) -> None:
        self.unstable += int((~is_kept).sum())
        self.best_stability = max([self.best_stability, *stability.tolist()])

    def count_no_object(self, probabilities: Tensor, is_kept: Tensor) -> None:
        self.no_object += int((~is_kept).sum())
        self.least_no_object = min([self.least_no_object, *probabilities.tolist()])

    def __add__(self, other: "FilterReport") -> "FilterReport":
        joined = {entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)}
        joined["best_score"] = max(self.best_score, other.best_score)
        joined["best_stability"] = max(self.best_stability, other.best_stability)
        joined["least_no_object"] = min(self.least_no_object, other.least_no_object)
        return FilterReport(**joined)

    def explain_no_masks(self, settings: GeneratorConfig) -> str:
        """Return which filters removed all candidates, with the best value for each."""
        if self.best_score == -np.inf:
            return f"none of the {self.candidates} predicted IoUs is a number, so the weights are broken"
        reasons = []
        if self.low_score:
            reasons.append(
                f"{self.low_score} of {self.candidates} candidates have a predicted IoU of at most "
                f"generator.pred_iou_thresh {settings.pred_iou_thresh:g} (best {min(self.best_score, 1.0):.3f})"
            )
        if self.unstable:
            reasons.append(
                f"{self.unstable} are empty or less stable than generator.stability_score_thresh "
                f"{settings.stability_score_thresh:g} (best {self.best_stability:.3f})"
            )
        if self.no_object:
            reasons.append(
                f"{self.no_object} have a probability of no object above generator.no_object_thresh "
                f"{settings.no_object_thresh:g} (least {self.least_no_object:.3f})"
            )
        if self.cut_by_crop:
            reasons.append(f"{self.cut_by_crop} are cut by the edge of a crop")
        return ", ".join(reasons)


@dataclass
class GeneratedMasks:
    """The K masks of one image, the largest first, in its original frame."""

    rles: list[dict]  # K, compressed
    boxes_xywh: np.ndarray  # K x 4, int, around the pixels inside
    scores: np.ndarray  # K, the predicted IoU
    stability: np.ndarray  # K, the IoU of the mask at a higher and at a lower threshold of its logits
    priorities: np.ndarray  # K, for ranking: the score, times the stability where the settings say so
    areas: np.ndarray  # K, int, pixels
    points: np.ndarray  # K x 2, XY: the prompt that found the mask
    crop_boxes_xywh: np.ndarray  # K x 4, int: the crop that the model saw
    # K x (1 + C), of no object and of each category, adding up to 1; K x 0 without a class head.
    class_probabilities: np.ndarray
    report: FilterReport = field(default_factory=FilterReport)

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def has_classes(self) -> bool:
        return self.class_probabilities.shape[1] > 0

    @property
    def classes(self) -> np.ndarray:
        """Return the class of each mask's most probable category, K, counted from 1."""
        return self.class_probabilities[:, 1:].argmax(axis=1) + 1

    @property
    def class_scores(self) -> np.ndarray:
        """Return the probability of that category, K; 1 without a class head."""
        return self.class_probabilities[:, 1:].max(axis=1) if self.has_classes else np.ones_like(self.scores)

    @property
    def no_object_probabilities(self) -> np.ndarray:
        """Return the probability of no object, K; 0 without a class head."""
        return self.class_probabilities[:, 0] if self.has_classes else np.zeros_like(self.scores)

    @property
    def corners(self) -> np.ndarray:
        """Return K x 4, XYXY: the first and the last pixel inside, as NMS compares boxes here."""
        first, size = self.boxes_xywh[:, :2], self.boxes_xywh[:, 2:]
        return np.concatenate([first, first + size - 1], axis=1)

    @property
    def crop_areas(self) -> np.ndarray:
        """Return the areas of the masks' crops, K, pixels."""
        return self.crop_boxes_xywh[:, 2:].prod(axis=1)

    def __getitem__(self, index: np.ndarray) -> "GeneratedMasks":
        arrays = [getattr(self, name)[index] for name in ARRAY_NAMES]
        return GeneratedMasks([self.rles[i] for i in index], *arrays, self.report)

    @staticmethod
    def join(parts: list["GeneratedMasks"], report: FilterReport) -> "GeneratedMasks":
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ARRAY_NAMES]
        return GeneratedMasks([rle for part in parts for rle in part.rles], *arrays, report)


ARRAY_NAMES = [entry.name for entry in fields(GeneratedMasks) if entry.name not in ("rles", "report")]


class Results:
    """A COCO dataset of predictions that grows image by image; pycocotools' `loadRes` reads its annotations.

    Args:
        categories: names by id, in the order of the model's classes from 1 on; one if the model has no classes.
        score_map: knots for `correct_scores`; None or empty: no correction.
        weights: a hash of the model's weights.
        polygons: write masks as polygons instead of run lengths.
        deep_range: how images of more than 8 bits are reduced to 8.
    """

    def __init__(
        self,
        categories: dict[int, str],
        settings: GeneratorConfig,
        score_map: list[list[float]] | None = None,
        weights: str = "",
        polygons: bool = False,
        deep_range: str = "percentile",
    ):
        self.categories = categories
        self.settings = settings
        self.score_map = score_map or []
        self.weights = weights
        self.polygons = polygons
        self.deep_range = deep_range
        self.entries: dict[str, dict] = {}  # by file name

    @property
    def origin(self) -> dict:
        """What the masks depend on besides the images."""
        return {
            "weights": self.weights,
            "polygons": self.polygons,
            "deep_range": self.deep_range,
            "generator": dataclasses.asdict(self.settings),
            "score_map": self.score_map,
        }

    @property
    def mask_count(self) -> int:
        return sum(len(entry["annotations"]) for entry in self.entries.values())

    def add(self, file_name: str, size: tuple[int, int], masks: GeneratedMasks, made: dict | None = None) -> dict:
        """Add an image and return its entry, which gets its ids in `write`.

        Args:
            made: hash and settings of the image's outputs; a later run compares them to skip finished images.
        """
        image = {"file_name": file_name, "width": size[1], "height": size[0]} | (made or {})
        scores = correct_scores(masks.scores, self.score_map) if self.score_map else masks.priorities
        annotations = [self._describe(masks, index, scores[index]) for index in range(len(masks))]
        self.entries[file_name] = {"image": image, "annotations": annotations}
        return self.entries[file_name]

    def write(self, path: Path, order: list[str]) -> None:
        """Write the json.

        Args:
            order: of the images, by file name; those without an entry are left out.
        """
        images, annotations = [], []
        for name in order:
            if name not in self.entries:
                continue
            number = {"id": len(images) + 1}  # first, and over that of an earlier file
            images.append(number | self.entries[name]["image"] | number)
            for annotation in self.entries[name]["annotations"]:
                ids = {"id": len(annotations) + 1, "image_id": len(images)}
                annotations.append(ids | annotation | ids)
        content = {
            "info": {
                "description": "objects found by finestsam",
                "generator": dataclasses.asdict(self.settings),
                "origin": self.origin,
            },
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in self.categories.items()],
        }
        write_json(path, content)

    def _describe(self, masks: GeneratedMasks, index: int, score: float) -> dict:
        rle = masks.rles[index]
        category = {"category_id": next(iter(self.categories))}
        if masks.has_classes:
            category_id, name = list(self.categories.items())[masks.classes[index] - 1]
            class_score = float(masks.class_scores[index])
            score *= class_score
            category = {"category_id": category_id, "category_name": name, "class_score": round(class_score, 6)}
        return category | {
            "segmentation": rle_to_polygons(rle) if self.polygons else rle_to_json(rle),
            "bbox": masks.boxes_xywh[index].tolist(),
            "area": int(masks.areas[index]),
            "iscrowd": 0,
            "score": _round_score(float(bound_scores(score))),
            "predicted_iou": round(min(float(masks.scores[index]), 1.0), 6),
            "stability_score": round(float(masks.stability[index]), 6),
            "point": [round(float(coordinate), 3) for coordinate in masks.points[index]],
        }


def _round_score(score: float) -> float:
    """Round to six digits, the precision of float32; compressed scores need nine to keep their order."""
    return round(score, 6 if score <= HIGH_SCORE else 9)


def correct_scores(scores: np.ndarray, knots: Sequence[Sequence[float]]) -> np.ndarray:
    """Return scores corrected by the map that `evaluation.thresholds.calibrate` fits.

    Args:
        knots: pairs of predicted and measured IoU, both rising; the map is linear between and constant outside of them.
            Empty: the scores stay.
    """
    if len(knots) == 0:
        return scores
    predicted, measured = np.array(knots, dtype=float).T
    return np.interp(scores, predicted, measured)


# Scores above this are compressed, so that none exceeds 1.
HIGH_SCORE = 0.999
# A score so far above HIGH_SCORE is 63 % of the way from HIGH_SCORE to 1. The score head predicts up to about 1.05.
HIGH_SPREAD = 0.05


def bound_scores(scores: np.ndarray) -> np.ndarray:
    """Return scores of at most 1 in the same order; those up to 0.999 are unchanged.

    The score head is not bounded. Clipping its predictions at 1 would make the best masks equal, and ranking by the
    written scores would give other figures than `--mode evaluate`.
    """
    scores = np.asarray(scores, dtype=float)
    excess = np.maximum(scores - HIGH_SCORE, 0)
    return np.where(excess > 0, 1 - (1 - HIGH_SCORE) * np.exp(-excess / HIGH_SPREAD), scores)
