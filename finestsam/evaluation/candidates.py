"""What the generator could find in labelled pictures, before any threshold: one dump to search all settings from.

The figures that thresholds decide about (predicted IoU, stability, boxes, which grid) and the truth (the IoU with every
object) are kept for each candidate, so that another setting costs no forward pass.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops.boxes import nms
from tqdm import tqdm

from finestsam.batch import Prompts
from finestsam.config import GeneratorConfig, ImagesConfig
from finestsam.data.embeddings import picture_key
from finestsam.data.index import Record
from finestsam.errors import Defect
from finestsam.images import build_point_grid, compute_input_size, read_image, scale_points
from finestsam.masks import decode_rle, encode_mask, remove_small_regions, rle_area, rle_box, rle_overlaps
from finestsam.prediction.generator import generate_masks
from finestsam.prediction.precompute import Embedder

# Candidates of a picture that are worth a mask, those with the best scores; objects are far fewer.
MOST_CANDIDATES = 600
# Points along each side of the grid whose scores tell where that many begin.
PROBE_POINTS = 16


@dataclass(frozen=True)
class Candidates:
    """K masks of one picture, by falling score, and what there is to find in it."""

    rles: list[dict]  # K, compressed, original frame
    scores: np.ndarray  # K, predicted IoU
    stability: np.ndarray  # K
    corners: np.ndarray  # K x 4, XYXY: first and last pixel inside
    points_per_side: np.ndarray  # K, int: the grid that asked
    layers: np.ndarray  # K, int: of crops; 0: the whole picture
    crop_areas: np.ndarray  # K, pixels
    ious: np.ndarray  # K x G, with the picture's objects
    crowd_shares: np.ndarray  # K, of the mask that lies in a crowd region

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, index: np.ndarray) -> "Candidates":
        names = [entry.name for entry in dataclasses.fields(self)[1:]]
        rles = [self.rles[place] for place in np.arange(len(self))[index]]
        return Candidates(rles, *(getattr(self, name)[index] for name in names))


def find_candidates(
    embedder: Embedder,
    records: Sequence[Record],
    settings: GeneratorConfig,
    grids: Sequence[int],
    images: ImagesConfig,
    title: str | None = "generator",
) -> list[Candidates | None]:
    """Run the generator on each picture without its thresholds; None for one that broke since it was checked.

    Args:
        settings: without None; of the crops all up to its crop_n_layers are looked at.
        grids: points along each side of the grids to ask with.
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
    min_score = _probe_min_score(embedder, embedding, pixels.shape[:2], max(grids))
    parts = []
    for points_per_side in grids:
        open_settings = dataclasses.replace(
            settings,
            points_per_side=points_per_side,
            pred_iou_thresh=min_score,
            stability_score_thresh=0.0,
            box_nms_thresh=1.0,
            crop_nms_thresh=1.0,
            min_mask_region_area=0,
        )
        masks = generate_masks(embedder.model, pixels, open_settings, embedding)
        first, size = masks.boxes_xywh[:, :2], masks.boxes_xywh[:, 2:]
        crop_areas = masks.crop_boxes_xywh[:, 2:].prod(axis=1)
        ious, crowd_shares = measure_truth(masks.rles, record)
        parts.append(
            Candidates(
                masks.rles, masks.scores, masks.stability, np.concatenate([first, first + size - 1], axis=1),
                np.full(len(masks), points_per_side), _find_layers(crop_areas, pixels.shape[:2], settings), crop_areas,
                ious, crowd_shares,
            )
        )  # fmt: skip
    rles = [rle for part in parts for rle in part.rles]
    names = [entry.name for entry in dataclasses.fields(Candidates)[1:]]
    joined = Candidates(rles, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    return joined[np.argsort(-joined.scores, kind="stable")]


def read_embedded(embedder: Embedder, record: Record, images: ImagesConfig) -> tuple[np.ndarray, torch.Tensor] | None:
    """Return a picture (H x W x 3, uint8) and its embedding (1 x C x g x g); None, and a word, where it broke."""
    try:
        pixels = read_image(record.path, record.size, images)
    except Defect as defect:
        tqdm.write(f"skipped {record.file_name}: {defect.message}", file=sys.stderr)
        return None
    return pixels, embedder.embed_image(picture_key(record.digest, record.size), pixels)


@torch.no_grad()
def _probe_min_score(embedder: Embedder, embedding: torch.Tensor, size: tuple[int, int], points_per_side: int) -> float:
    """Return the score that about `MOST_CANDIDATES` of a picture's candidates pass; -inf where there are no more."""
    model = embedder.model
    points = build_point_grid(PROBE_POINTS) * size[::-1]
    inputs = scale_points(points, size, compute_input_size(size, model.image_size))
    inputs = torch.tensor(inputs, dtype=torch.float32, device=model.device)
    labels = torch.ones(len(points), 1, dtype=torch.int, device=model.device)
    answers = model.answer_above(model.look(embedding), Prompts(inputs[:, None], labels), np.inf)
    share = MOST_CANDIDATES / (points_per_side**2 * answers.scores.shape[1])
    if share >= 1:
        return -np.inf
    scores = answers.scores.flatten()
    return float(scores[scores.isfinite()].quantile(1 - share)) if scores.isfinite().any() else -np.inf


def _find_layers(crop_areas: np.ndarray, size: tuple[int, int], settings: GeneratorConfig) -> np.ndarray:
    """Return the layer of each crop from its area: those of a layer are of about one size."""
    if settings.crop_n_layers == 0:
        return np.zeros(len(crop_areas), dtype=np.int64)
    shares = np.sqrt(size[0] * size[1] / np.maximum(crop_areas, 1))
    # A crop of layer n has a side of 1 / 2^n of the picture's, and the overlap.
    return np.round(np.log2(shares * (1 + settings.crop_overlap_ratio))).clip(0, settings.crop_n_layers) * (shares > 1)


def measure_truth(rles: Sequence[dict], record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU of masks with a picture's objects, K x G, and the share of each that lies in a crowd region, K."""
    truth = [record.rle(annotation) for annotation in record.annotations]
    crowds = [{"size": list(record.size), "counts": counts} for counts in record.crowds]
    shares = rle_overlaps(rles, crowds, over_own_area=True)
    return rle_overlaps(rles, truth), shares.max(axis=1, initial=0.0)


def select(candidates: Candidates, settings: GeneratorConfig) -> np.ndarray:
    """Return which candidates the generator would give with these settings, by falling score."""
    is_asked = candidates.points_per_side == settings.points_per_side
    is_asked &= candidates.layers <= settings.crop_n_layers
    is_good = candidates.scores > settings.pred_iou_thresh if settings.pred_iou_thresh else np.True_
    places = np.flatnonzero(is_asked & is_good & (candidates.stability >= settings.stability_score_thresh))
    kept = []
    areas = candidates.crop_areas[places]
    for area in np.unique(areas):
        kept.append(_suppress(candidates, places[areas == area], candidates.scores, settings.box_nms_thresh))
    places = np.concatenate(kept) if kept else places
    if len(kept) > 1:
        places = _suppress(candidates, np.sort(places), 1 / candidates.crop_areas, settings.crop_nms_thresh)
    return np.sort(places)


def _suppress(candidates: Candidates, places: np.ndarray, priorities: np.ndarray, max_overlap: float) -> np.ndarray:
    boxes = torch.from_numpy(candidates.corners[places]).float()
    return places[nms(boxes, torch.from_numpy(priorities[places]).float(), max_overlap).numpy()]


def clean(candidates: Candidates, record: Record, min_area: int) -> Candidates:
    """Return candidates without holes and islands of fewer pixels than `min_area`."""
    if min_area == 0:
        return candidates
    rles = [encode_mask(remove_small_regions(decode_rle(rle), min_area)) for rle in candidates.rles]
    ious, crowd_shares = measure_truth(rles, record)
    boxes = np.array([rle_box(rle) for rle in rles], dtype=np.int64).reshape(-1, 4)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1], axis=1)
    cleaned = dataclasses.replace(candidates, rles=rles, corners=corners, ious=ious, crowd_shares=crowd_shares)
    return cleaned[np.array([rle_area(rle) > 0 for rle in rles], dtype=bool)]


def match(ious: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return at each threshold which masks find an object, T x K: the better score first, each object once.

    COCO's rule (pycocotools' evaluateImg): a mask takes the object that it covers best of those that are left.

    Args:
        ious: K x G, by falling score.
    """
    count, objects = ious.shape
    found = np.zeros((len(thresholds), count), dtype=bool)
    if objects == 0:
        return found
    is_left = np.ones((len(thresholds), objects), dtype=bool)
    rows = np.arange(len(thresholds))
    for place in np.flatnonzero(ious.max(axis=1) >= thresholds[0]):
        left = np.where(is_left, ious[place], -1.0)
        best = left.argmax(axis=1)
        hits = left[rows, best] >= thresholds
        found[hits, place] = True
        is_left[rows[hits], best[hits]] = False
    return found
