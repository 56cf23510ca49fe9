"""The automatic mask generator: prompt SAM with every point of a grid; keep good and stable masks, without duplicates.

Masks and scores are those of segment_anything's `SamAutomaticMaskGenerator`, with less work and memory: masks with low
scores are dropped before upscaling, the rest are upscaled a few at a time, and only those that are no duplicates are
compressed.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from segment_anything.utils.amg import is_box_near_crop_edge
from torch import Tensor
from torchvision.ops import nms

from finestsam.batch import Prompts
from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.images.frames import build_crop_boxes, build_point_grid, compute_input_size, resize_image, scale_points
from finestsam.masks import decode_rle, encode_mask, remove_small_regions, rle_area, rle_box
from finestsam.model.card import Card
from finestsam.model.decoder import ImageFeatures
from finestsam.model.sam import FinestSam
from finestsam.prediction.results import FilterReport, GeneratedMasks
from finestsam.prediction.upscaling import Upscaler, measure_masks

# Stabilities below this count as this, so that only scores rank such masks.
LEAST_STABILITY = 1e-3


@dataclass
class _Crop:
    """A part of the image as the model sees it; the first is the whole image."""

    box: list[int]  # XYXY, original pixels
    original_size: tuple[int, int]  # of the whole image
    size: tuple[int, int]
    input_size: tuple[int, int]
    embedding: Tensor  # 1 x C x g x g
    features: ImageFeatures
    points: np.ndarray  # P x 2, XY, pixels of the crop
    upscaler: Upscaler  # from logits to pixels of the crop


@dataclass
class _Candidates:
    """K masks of one crop that passed the filters so far, in the order of the grid."""

    logits: Tensor  # K x 4g x 4g
    scores: Tensor  # K
    point_indices: Tensor  # K, into the crop's points
    stability: Tensor  # K
    priorities: Tensor  # K, the scores of NMS
    boxes: Tensor  # K x 4, XYXY, pixels of the crop; both corners lie inside the mask
    class_probabilities: Tensor  # K x (1 + C); K x 0 where the model has no class head

    def __getitem__(self, index: Tensor) -> "_Candidates":
        return _Candidates(*(getattr(self, entry.name)[index] for entry in fields(self)))


def resolve_generator(settings: GeneratorConfig, card: Card | None) -> GeneratorConfig:
    """Return the settings with each None replaced: by the card's value, else by segment_anything's."""
    known = GENERATOR_DEFAULTS | (card.generator if card else {})
    open_names = [name for name in GENERATOR_DEFAULTS if getattr(settings, name) is None]
    return dataclasses.replace(settings, **{name: known[name] for name in open_names})


@torch.no_grad()
def generate_masks(
    model: FinestSam, image: np.ndarray, settings: GeneratorConfig, embedding: Tensor | None = None
) -> GeneratedMasks:
    """Return the masks of all objects of an image.

    Args:
        image: H x W x 3, uint8, RGB.
        settings: without None, as `resolve_generator` returns them.
        embedding: 1 x C x g x g, of the whole image; None: it is computed.

    Raises:
        Defect: the image is too thin for the model.
    """
    report = FilterReport()
    found = [_find_masks(model, crop, settings, report) for crop in _cut_crops(model, image, settings, embedding)]
    masks = GeneratedMasks.join(found, report)
    if len(found) > 1:
        priorities = 1 / torch.from_numpy(masks.crop_areas)  # smaller crops show more detail
        masks = _drop_duplicates(masks, priorities, settings.crop_nms_thresh)
    if settings.min_mask_region_area > 0:
        masks = clean_regions(masks, settings)
    order = np.lexsort([*masks.boxes_xywh.T[::-1], -masks.areas])  # the last key counts first
    return masks[order]


def _cut_crops(
    model: FinestSam, image: np.ndarray, settings: GeneratorConfig, embedding: Tensor | None
) -> Iterator[_Crop]:
    original_size = image.shape[:2]
    boxes = build_crop_boxes(original_size, settings.crop_n_layers, settings.crop_overlap_ratio)
    for number, box in enumerate(boxes):
        layer = _find_layer(number)
        part = image[box[1] : box[3], box[0] : box[2]]
        size = part.shape[:2]
        if 0 in size:
            continue  # tiny images have fewer pixels than crops
        input_size = compute_input_size(size, model.image_size)
        if layer > 0 or embedding is None:
            inputs = torch.tensor(resize_image(part, input_size), device=model.device)  # h x w x 3
            encoded = model.encode([inputs.permute(2, 0, 1)])
        else:
            encoded = embedding
        points_per_side = int(settings.points_per_side / settings.crop_n_points_downscale_factor**layer)
        points = build_point_grid(max(points_per_side, 1)) * size[::-1]
        upscaler = Upscaler(model.image_size // 4, model.image_size, input_size, size)
        features = model.compute_image_features(encoded)
        yield _Crop(box, original_size, size, input_size, encoded, features, points, upscaler)


def _find_layer(number: int) -> int:
    """Return the layer of a crop by its index in `build_crop_boxes`: 1 of layer 0, then 4, then 16."""
    layer = 0
    while number >= 4**layer:
        number, layer = number - 4**layer, layer + 1
    return layer


def _find_masks(model: FinestSam, crop: _Crop, settings: GeneratorConfig, report: FilterReport) -> GeneratedMasks:
    """Return the masks of one crop, by falling priority, without duplicates."""
    batches = [
        _predict_points(
            model, crop, range(start, min(start + settings.points_per_batch, len(crop.points))), settings, report
        )
        for start in range(0, len(crop.points), settings.points_per_batch)
    ]
    candidates = _Candidates(*(torch.cat([getattr(b, entry.name) for b in batches]) for entry in fields(_Candidates)))
    kept = nms(candidates.boxes.float(), candidates.priorities, settings.box_nms_thresh)
    report.duplicates += len(candidates.scores) - len(kept)
    return _compress(candidates[kept], crop)


def make_point_prompts(
    points: np.ndarray, size: tuple[int, int], input_size: tuple[int, int], device: torch.device
) -> Prompts:
    """Return the prompts of one point each, P x 2, XY, of an image or crop of (height, width) `size`."""
    inputs = torch.tensor(scale_points(points, size, input_size), dtype=torch.float32, device=device)
    return Prompts(inputs[:, None], torch.ones(len(points), 1, dtype=torch.int, device=device))


def _predict_points(
    model: FinestSam, crop: _Crop, indices: range, settings: GeneratorConfig, report: FilterReport
) -> _Candidates:
    """Predict the masks of some points of a crop, and return those that are good, stable and not cut by the crop."""
    points = crop.points[indices.start : indices.stop]
    prompts = make_point_prompts(points, crop.size, crop.input_size, model.device)
    # A threshold of 0 lets every number pass, as in segment_anything: the score head may return less than 0.
    only_best = settings.masks_per_point == "best"
    predicted = model.predict_above(crop.features, prompts, settings.pred_iou_thresh or -np.inf, only_best)
    scores, is_good = predicted.scores.flatten(), predicted.is_kept.flatten()
    point_indices = torch.tensor(indices, device=model.device).repeat_interleave(predicted.scores.shape[1])
    stability, boxes = measure_masks(crop.upscaler, predicted.logits, settings.stability_score_offset)
    class_logits = model.classify(crop.embedding, predicted.tokens, predicted.logits)
    probabilities = predicted.logits.new_zeros(len(boxes), 0) if class_logits is None else class_logits.softmax(dim=1)
    kept_scores = scores[is_good]
    priorities = kept_scores * stability.clamp(min=LEAST_STABILITY) if only_best else kept_scores
    candidates = _Candidates(
        predicted.logits, kept_scores, point_indices[is_good], stability, priorities, boxes, probabilities
    )
    if only_best:
        report.count_scores(predicted.scores.amax(dim=1), predicted.is_kept.any(dim=1))
    else:
        report.count_scores(scores, is_good)
    return _filter_measured(candidates, crop, settings, report)


def _filter_measured(
    candidates: _Candidates, crop: _Crop, settings: GeneratorConfig, report: FilterReport
) -> _Candidates:
    is_empty = candidates.boxes[:, 2] < candidates.boxes[:, 0]
    is_stable = (candidates.stability >= settings.stability_score_thresh) & ~is_empty
    report.count_stability(candidates.stability, is_stable)
    candidates = candidates[is_stable]
    if candidates.class_probabilities.shape[1]:
        is_object = candidates.class_probabilities[:, 0] <= settings.no_object_thresh
        report.count_no_object(candidates.class_probabilities[:, 0], is_object)
        candidates = candidates[is_object]
    height, width = crop.original_size
    is_cut = is_box_near_crop_edge(candidates.boxes, crop.box, [0, 0, width, height])
    report.cut_by_crop += int(is_cut.sum())
    return candidates[~is_cut]


def _compress(candidates: _Candidates, crop: _Crop) -> GeneratedMasks:
    """Return the masks in the original frame, as run lengths."""
    x0, y0, x1, y1 = crop.box
    mask = np.zeros(crop.original_size, dtype=bool, order="F")  # pycocotools needs F; reused for each mask
    rles = []
    for logits in candidates.logits:
        mask[y0:y1, x0:x1] = crop.upscaler.render(logits).cpu().numpy()
        rles.append(encode_mask(mask))
    return GeneratedMasks(
        rles=rles,
        boxes_xywh=np.array([rle_box(rle) for rle in rles], dtype=np.int64).reshape(-1, 4),
        scores=candidates.scores.cpu().numpy(),
        stability=candidates.stability.cpu().numpy(),
        priorities=candidates.priorities.cpu().numpy(),
        areas=np.array([rle_area(rle) for rle in rles], dtype=np.int64),
        points=crop.points[candidates.point_indices.cpu().numpy()] + [x0, y0],
        crop_boxes_xywh=np.tile(np.array([[x0, y0, x1 - x0, y1 - y0]]), (len(rles), 1)),
        class_probabilities=candidates.class_probabilities.cpu().numpy(),
    )


def _drop_duplicates(masks: GeneratedMasks, priorities: Tensor, max_overlap: float) -> GeneratedMasks:
    """Return masks by falling priority, K, without those whose box overlaps that of an earlier mask too much."""
    kept = nms(torch.from_numpy(masks.corners).float(), priorities.float(), max_overlap)
    masks.report.duplicates += len(masks) - len(kept)
    return masks[kept.numpy()]


def clean_regions(masks: GeneratedMasks, settings: GeneratorConfig) -> GeneratedMasks:
    """Fill small holes, remove small islands, then drop duplicates, preferring masks that did not change.

    Changes `masks` in place.
    """
    min_area = settings.min_mask_region_area
    was_clean = torch.zeros(len(masks))
    for i, rle in enumerate(masks.rles):
        mask = decode_rle(rle)
        cleaned = remove_small_regions(mask, min_area)
        if masks.areas[i] >= min_area and (cleaned == mask).all():
            was_clean[i] = 1
            continue
        masks.rles[i] = encode_mask(cleaned)
        masks.boxes_xywh[i] = rle_box(masks.rles[i])
        masks.areas[i] = rle_area(masks.rles[i])
    return _drop_duplicates(masks, was_clean, max(settings.box_nms_thresh, settings.crop_nms_thresh))
