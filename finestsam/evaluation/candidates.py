"""The masks that the generator predicts in labelled images before any threshold, to tune all settings on.

Each candidate keeps the values that settings filter by (predicted IoU, stability, box, grid) and its IoU with every
object, so that trying other settings needs no forward pass.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops.boxes import nms
from tqdm import tqdm

from finestsam.config import GeneratorConfig, ImagesConfig
from finestsam.errors import Defect
from finestsam.images.files import read_image
from finestsam.images.frames import build_point_grid, compute_input_size
from finestsam.masks import rle_overlaps
from finestsam.model.embeddings import image_key
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder
from finestsam.prediction.generator import clean_regions, generate_masks, make_point_prompts
from finestsam.prediction.results import FilterReport, GeneratedMasks
from finestsam.records import Record

# Candidates kept for each image, those with the best scores, by generator.masks_per_point. With fewer, tuning would
# choose other thresholds: up to 363 candidates of an image of cell nuclei were above the threshold chosen for F1, and
# 1 052 with all masks of a point.
MOST_CANDIDATES = {"best": 600, "all": 2000}
# Points along each side of the small grid that estimates the score which so many candidates exceed.
PROBE_POINTS = 8


@dataclass(frozen=True)
class MeasuredMasks:
    """K masks of one image, by falling priority, compared with its objects."""

    masks: GeneratedMasks
    ious: np.ndarray  # K x G, with the image's objects
    crowd_shares: np.ndarray  # K, of the mask that lies in a crowd region

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class Candidates(MeasuredMasks):
    """The masks that the generator's settings select from."""

    points_per_side: np.ndarray  # K, int: the grid of its point
    layers: np.ndarray  # K, int: of crops; 0: the whole image

    def __getitem__(self, index: np.ndarray) -> "Candidates":
        return Candidates(*(getattr(self, entry.name)[index] for entry in dataclasses.fields(self)))


def find_candidates(
    embedder: Embedder,
    records: Sequence[Record],
    settings: GeneratorConfig,
    grids: Sequence[int],
    images: ImagesConfig,
    title: str | None = "generator",
) -> list[Candidates | None]:
    """Run the generator on each image without its thresholds; None for one that broke since it was checked.

    Args:
        settings: without None; all crops up to its crop_n_layers are used.
        grids: points along each side of the grids to prompt with.
        title: of the progress bar; None: none.
    """
    progress = tqdm(records, desc=title, disable=not (title and sys.stderr.isatty()), leave=False)
    return [_find(embedder, record, settings, grids, images) for record in progress]


def _find(
    embedder: Embedder, record: Record, settings: GeneratorConfig, grids: Sequence[int], images: ImagesConfig
) -> Candidates | None:
    read = read_embedded(embedder, record, images)
    if read is None:
        return None
    pixels, embedding = read
    only_best = settings.masks_per_point == "best"
    min_score = _probe_min_score(embedder.model, embedding, pixels.shape[:2], max(grids), only_best)
    parts = []
    for points_per_side in grids:
        open_settings = dataclasses.replace(
            settings,
            points_per_side=points_per_side,
            pred_iou_thresh=min_score,
            stability_score_thresh=0.0,
            no_object_thresh=1.0,
            box_nms_thresh=1.0,
            crop_nms_thresh=1.0,
            min_mask_region_area=0,
        )
        parts.append(generate_masks(embedder.model, pixels, open_settings, embedding))
    joined = GeneratedMasks.join(parts, FilterReport())
    grid_sides = np.repeat(grids, [len(part) for part in parts])
    order = np.argsort(-joined.priorities, kind="stable")
    masks = joined[order]
    layers = _find_layers(masks.crop_areas, pixels.shape[:2], settings)
    return Candidates(masks, *measure_truth(masks.rles, record), grid_sides[order], layers)


def read_embedded(embedder: Embedder, record: Record, images: ImagesConfig) -> tuple[np.ndarray, torch.Tensor] | None:
    """Return an image (H x W x 3, uint8) and its embedding (1 x C x g x g); None, with a warning, if it is broken."""
    try:
        pixels = read_image(record.path, record.size, images)
        return pixels, embedder.embed_image(image_key(record.digest, record.size), pixels)
    except Defect as defect:
        tqdm.write(f"skipped {record.file_name}: {defect.message}", file=sys.stderr)
        return None


@torch.no_grad()
def _probe_min_score(
    model: FinestSam, embedding: torch.Tensor, size: tuple[int, int], points_per_side: int, only_best: bool
) -> float:
    """Return the score that about `MOST_CANDIDATES` masks exceed; -inf where there are no more than these."""
    masks_per_point = 3 if model.multimask_output and not only_best else 1
    share = MOST_CANDIDATES["best" if only_best else "all"] / (points_per_side**2 * masks_per_point)
    if share >= 1:
        return -np.inf
    points = build_point_grid(PROBE_POINTS) * size[::-1]
    prompts = make_point_prompts(points, size, compute_input_size(size, model.image_size), model.device)
    # Features and precision are the generator's; with a minimum score of infinity no mask is computed.
    scores = model.predict_above(model.compute_image_features(embedding), prompts, np.inf).scores
    scores = (scores.amax(dim=1) if only_best else scores).flatten()
    return float(scores[scores.isfinite()].quantile(1 - share)) if scores.isfinite().any() else -np.inf


def _find_layers(crop_areas: np.ndarray, size: tuple[int, int], settings: GeneratorConfig) -> np.ndarray:
    """Return the layer of each crop from its area; crops of a layer have about the same size."""
    if settings.crop_n_layers == 0:
        return np.zeros(len(crop_areas), dtype=np.int64)
    shares = np.sqrt(size[0] * size[1] / np.maximum(crop_areas, 1))
    # The side of a crop of layer n is the image's side / 2^n, plus the overlap.
    return np.round(np.log2(shares * (1 + settings.crop_overlap_ratio))).clip(0, settings.crop_n_layers) * (shares > 1)


def measure_truth(rles: Sequence[dict], record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of masks with an image's objects, K x G, and the share of each that lies in a crowd region, K."""
    truth = [record.rle(annotation) for annotation in record.annotations]
    crowds = [{"size": list(record.size), "counts": counts} for counts in record.crowds]
    shares = rle_overlaps(rles, crowds, over_own_area=True)
    return rle_overlaps(rles, truth), shares.max(axis=1, initial=0.0)


def select(candidates: Candidates, settings: GeneratorConfig) -> np.ndarray:
    """Return the indices of the candidates that the generator returns with these settings, by falling priority."""
    is_prompted = candidates.points_per_side == settings.points_per_side
    is_prompted &= candidates.layers <= settings.crop_n_layers
    masks = candidates.masks
    is_good = masks.scores > settings.pred_iou_thresh if settings.pred_iou_thresh else np.True_
    is_good = is_good & (masks.no_object_probabilities <= settings.no_object_thresh)
    indices = np.flatnonzero(is_prompted & is_good & (masks.stability >= settings.stability_score_thresh))
    corners, crop_areas = masks.corners, masks.crop_areas
    kept = []
    areas = crop_areas[indices]
    for area in np.unique(areas):
        kept.append(_suppress(corners, indices[areas == area], masks.priorities, settings.box_nms_thresh))
    indices = np.concatenate(kept) if kept else indices
    if len(kept) > 1:
        indices = _suppress(corners, np.sort(indices), 1 / crop_areas, settings.crop_nms_thresh)
    return np.sort(indices)


def _suppress(corners: np.ndarray, indices: np.ndarray, priorities: np.ndarray, max_overlap: float) -> np.ndarray:
    boxes = torch.from_numpy(corners[indices]).float()
    return indices[nms(boxes, torch.from_numpy(priorities[indices]).float(), max_overlap).numpy()]


def clean(chosen: Candidates, record: Record, settings: GeneratorConfig) -> MeasuredMasks:
    """Return the selected masks, without small holes and islands if the settings say so, as the generator does."""
    if settings.min_mask_region_area == 0:
        return chosen
    masks = clean_regions(chosen.masks[np.arange(len(chosen))], settings)
    masks = masks[np.argsort(-masks.priorities, kind="stable")]
    return MeasuredMasks(masks, *measure_truth(masks.rles, record))


def match(ious: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Match masks and objects by COCO's rule (pycocotools' evaluateImg).

    Masks choose in the order of their scores. Each gets the object that it overlaps most of those that are left.

    Args:
        ious: K x G, by falling score.
        thresholds: T IoUs, rising.

    Returns:
        The index of each mask's object at each threshold, T x K; -1: none.
    """
    count, objects = ious.shape
    found = np.full((len(thresholds), count), -1)
    if objects == 0:
        return found
    is_left = np.ones((len(thresholds), objects), dtype=bool)
    rows = np.arange(len(thresholds))
    for index in np.flatnonzero(ious.max(axis=1) >= thresholds[0]):
        left = np.where(is_left, ious[index], -1.0)
        best = left.argmax(axis=1)
        hits = left[rows, best] >= thresholds
        found[hits, index] = best[hits]
        is_left[rows[hits], best[hits]] = False
    return found
