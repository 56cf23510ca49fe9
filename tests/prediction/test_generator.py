import copy
import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from torch import nn
from torch.nn import functional as F

from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig
from finestsam.data.synthetic import render_scene
from finestsam.errors import Defect
from finestsam.images.frames import compute_input_size, resize_image
from finestsam.masks import decode_rle, rle_to_json
from finestsam.model.architectures import build_sam
from finestsam.model.card import Card
from finestsam.model.decoder import PredictedMasks
from finestsam.model.sam import FinestSam
from finestsam.prediction.generator import LEAST_STABILITY, generate_masks, resolve_generator

SETTINGS = GeneratorConfig(
    masks_per_point="all",
    points_per_side=16,  # a power of two: its points are exact in float32 too
    points_per_batch=50,
    pred_iou_thresh=0.85,
    stability_score_thresh=0.8,
    box_nms_thresh=0.5,
    crop_n_layers=0,
    min_mask_region_area=0,
)


class View(tuple):
    def to(self, dtype):
        return self


class BlobDecoder(nn.Module):
    """A decoder whose three masks are nested blobs around the point, roughened and scored by the random one it wraps.

    Random weights alone predict for every point with the same noise all over the image, which no filter could sort.
    """

    def __init__(self, sam):
        super().__init__()
        self.decoder, self.prompt_encoder = sam.mask_decoder, sam.prompt_encoder
        self.level = 0.0  # raised: smaller blobs

    def forward(self, *, sparse_prompt_embeddings, multimask_output, **others):
        logits, scores = self.decoder(
            sparse_prompt_embeddings=sparse_prompt_embeddings, multimask_output=multimask_output, **others
        )
        positions = self.prompt_encoder.pe_layer(logits.shape[-2:])  # C x 4g x 4g
        wanted = sparse_prompt_embeddings[:, 0] - self.prompt_encoder.point_embeddings[1].weight  # N x C
        nearness = F.relu(torch.einsum("nc,chw->nhw", wanted, positions) / (len(positions) / 2))[:, None]
        levels = torch.tensor([0.85, 0.7, 0.4])[: logits.shape[1], None, None]
        return 80 * (nearness - levels - self.level) + 8 * logits, 0.85 + scores

    def compute_image_features(self, embedding, positions, dense):
        return View((embedding, positions, dense))

    def predict_above(self, view, sparse, masks, min_score, only_best=False):
        """The same numbers to the last bit: what is compared is the generator, not the decoder."""
        embedding, positions, dense = view
        logits, scores = self.forward(
            image_embeddings=embedding,
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.expand(len(sparse), *embedding.shape[1:]),
            multimask_output=masks == slice(1, None),
        )
        is_kept = scores > min_score
        if only_best:
            is_kept &= F.one_hot(scores.argmax(dim=1), scores.shape[1]).bool()
        return PredictedMasks(scores, is_kept, logits[is_kept], tokens=logits.new_zeros(int(is_kept.sum()), 32))


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    sam.mask_decoder = BlobDecoder(sam)
    return sam


@pytest.fixture(scope="module")
def model(sam):
    return FinestSam(sam)


@pytest.fixture(scope="module")
def image():
    return render_scene(0, 0, (96, 128)).image


def describe(masks):
    """Return what both generators must agree on, in an order that does not depend on them."""
    values = zip(
        [str(rle_to_json(rle)) for rle in masks.rles],
        masks.boxes_xywh.tolist(),
        masks.areas.tolist(),
        masks.scores.tolist(),
        masks.stability.tolist(),
        masks.points.tolist(),
        masks.crop_boxes_xywh.tolist(),
        strict=True,
    )
    return sorted(values)


def describe_reference(sam, image, settings):
    arguments = dataclasses.asdict(settings)
    del arguments["no_object_thresh"], arguments["masks_per_point"]  # ours alone
    found = SamAutomaticMaskGenerator(sam, output_mode="coco_rle", **arguments).generate(image)
    return sorted(
        (
            str(mask["segmentation"]),
            # Theirs ends on the last pixel inside, COCO's behind it.
            [int(side) for side in np.add(mask["bbox"], [0, 0, 1, 1])],
            mask["area"],
            mask["predicted_iou"],
            mask["stability_score"],
            mask["point_coords"][0],
            mask["crop_box"],
        )
        for mask in found
    )


@pytest.mark.parametrize("size", [(96, 128), (150, 60), (64, 64)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_n_layers": 1},
        {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2, "crop_overlap_ratio": 0.6},
        {"min_mask_region_area": 60},
        {"crop_n_layers": 1, "min_mask_region_area": 60, "crop_nms_thresh": 0.3},
        {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.5, "stability_score_offset": 3.0},
        {"points_per_batch": 64, "box_nms_thresh": 1.0},
    ],
    ids=str,
)
def test_masks_are_those_of_segment_anything(sam, model, size, changes):
    image, settings = render_scene(1, 0, size).image, dataclasses.replace(SETTINGS, **changes)

    masks = generate_masks(model, image, settings)

    assert len(masks) >= 5
    assert describe(masks) == describe_reference(sam, image, settings)


def test_a_grid_that_float32_rounds_finds_the_same_masks(sam, model, image):
    settings = dataclasses.replace(SETTINGS, points_per_side=12, crop_n_layers=1)

    masks, expected = describe(generate_masks(model, image, settings)), describe_reference(sam, image, settings)

    assert [values[:3] for values in masks] == [values[:3] for values in expected]
    for values, expected_values in zip(masks, expected, strict=True):
        np.testing.assert_allclose(np.hstack(values[3:]), np.hstack(expected_values[3:]), rtol=1e-6)


def test_every_filter_of_that_comparison_removes_something(model, image):
    masks = generate_masks(model, image, dataclasses.replace(SETTINGS, crop_n_layers=1))

    report = masks.report
    removed = [report.low_score, report.unstable, report.cut_by_crop, report.duplicates]
    assert min(removed) > 10
    assert report.candidates == 5 * 16 * 16 * 3 == sum(removed) + len(masks)


def test_masks_come_largest_first_with_their_exact_boxes_and_areas(model, image):
    masks = generate_masks(model, image, SETTINGS)

    keys = [(-area, box) for area, box in zip(masks.areas.tolist(), masks.boxes_xywh.tolist(), strict=True)]
    assert keys == sorted(keys)
    for rle, area, box in zip(masks.rles, masks.areas, masks.boxes_xywh, strict=True):
        y, x = decode_rle(rle).nonzero()
        assert box.tolist() == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
        assert area == len(x)
        assert rle["size"] == [96, 128]


def test_a_one_mask_model_gives_one_candidate_a_point(sam, image):
    masks = generate_masks(
        FinestSam(sam, multimask_output=False), image, dataclasses.replace(SETTINGS, pred_iou_thresh=0.0)
    )

    assert masks.report.candidates == 16 * 16
    assert len(masks) > 5


def test_the_best_mask_of_each_point_is_the_one_with_the_highest_score(model, image):
    open_settings = dataclasses.replace(SETTINGS, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=1.0)
    every = generate_masks(model, image, open_settings)

    best = generate_masks(model, image, dataclasses.replace(open_settings, masks_per_point="best"))

    assert best.report.candidates == 16**2 and len(best) <= 16**2 < len(every)
    highest = {tuple(point): -np.inf for point in every.points.tolist()}
    for point, score in zip(every.points.tolist(), every.scores.tolist(), strict=True):
        highest[tuple(point)] = max(highest[tuple(point)], score)
    for point, score in zip(best.points.tolist(), best.scores.tolist(), strict=True):
        assert score == highest[tuple(point)]
    np.testing.assert_array_equal(best.priorities, best.scores * best.stability.clip(LEAST_STABILITY))
    np.testing.assert_array_equal(every.priorities, every.scores)


def test_a_known_embedding_takes_the_place_of_the_encoder(model, image):
    inputs = torch.tensor(resize_image(image, compute_input_size((96, 128), 64))).permute(2, 0, 1)
    with torch.no_grad():
        embedding = model.encode([inputs])
    settings = dataclasses.replace(SETTINGS, crop_n_layers=1)

    same = generate_masks(model, image, settings, embedding)
    other = generate_masks(model, image, settings, torch.zeros_like(embedding))

    expected = generate_masks(model, image, settings)
    assert describe(same) == describe(expected)
    assert other.scores.tolist() != expected.scores.tolist()


def test_an_encoder_in_bfloat16_finds_nearly_the_same_masks(sam, image):
    masks = generate_masks(FinestSam(sam, encoder_dtype=torch.bfloat16), image, SETTINGS)

    expected = generate_masks(FinestSam(sam), image, SETTINGS)
    assert len(masks) == pytest.approx(len(expected), rel=0.2)
    assert masks.scores.mean() == pytest.approx(expected.scores.mean(), abs=0.01)


@pytest.mark.parametrize("crop_n_layers", [0, 1])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pred_iou_thresh": 1.0, "points_per_side": 4},
            r"(48|240) of \1 candidates have a predicted IoU of at most generator.pred_iou_thresh 1 \(best 0\.9\d\d\)",
        ),
        (
            {"stability_score_thresh": 1.0, "points_per_side": 4},
            r"\d+ are empty or less stable than generator.stability_score_thresh 1 \(best 0\.\d\d\d\)",
        ),
    ],
)
def test_an_image_without_masks_says_which_threshold_removed_them(model, image, crop_n_layers, changes, message):
    settings = dataclasses.replace(SETTINGS, crop_n_layers=crop_n_layers, min_mask_region_area=9, **changes)

    masks = generate_masks(model, image, settings)

    assert len(masks) == 0
    assert masks.boxes_xywh.shape == (0, 4)
    assert re.search(message, masks.report.explain_no_masks(settings))


def test_empty_masks_are_dropped_without_a_warning_even_where_no_threshold_is_set(model, image):
    settings = dataclasses.replace(SETTINGS, pred_iou_thresh=0.0, stability_score_thresh=0.0, points_per_side=2)
    empty_model = copy.deepcopy(model)
    empty_model.sam.mask_decoder.level = 2.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = generate_masks(empty_model, image, settings)

    assert len(masks) == 0
    assert masks.report.unstable == masks.report.candidates == 12


def test_broken_weights_are_named_as_the_reason_for_no_masks(model, image):
    broken = copy.deepcopy(model)
    for weight in broken.parameters():
        weight.data.fill_(torch.nan)

    masks = generate_masks(broken, image, dataclasses.replace(SETTINGS, pred_iou_thresh=0.0))

    assert len(masks) == 0
    assert re.search("none of the 768 predicted IoUs is a number", masks.report.explain_no_masks(SETTINGS))


def test_an_image_with_fewer_pixels_than_crops_is_searched(model):
    settings = dataclasses.replace(SETTINGS, crop_n_layers=3, points_per_side=2, pred_iou_thresh=0.0)

    masks = generate_masks(model, np.zeros((3, 4, 3), np.uint8), settings)

    assert masks.report.candidates > 12


def test_an_image_that_is_too_thin_is_a_defect(model):
    with pytest.raises(Defect, match="4000 x 1 pixels shrink to nothing at 64"):
        generate_masks(model, np.zeros((1, 4000, 3), np.uint8), SETTINGS)


def test_open_settings_come_from_the_card_and_then_from_segment_anything():
    card = Card("vit_b", 1024, True, ["cell"], generator={"pred_iou_thresh": 0.5, "box_nms_thresh": 0.6, "other": 1})

    resolved = resolve_generator(GeneratorConfig(box_nms_thresh=0.3), card)

    assert (resolved.box_nms_thresh, resolved.pred_iou_thresh) == (0.3, 0.5)
    assert resolved.points_per_side == GENERATOR_DEFAULTS["points_per_side"] == 32
    assert dataclasses.asdict(resolve_generator(GeneratorConfig(), None)).items() >= GENERATOR_DEFAULTS.items()
