from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finestsam.config import DatasetConfig
from finestsam.data import contact_sheet
from finestsam.data.contact_sheet import render_contact_sheet, sample_prompts
from finestsam.masks import decode_rle, encode_mask
from finestsam.records import Annotation

PROMPTS = {
    "grid": {},
    "center": {"use_center": True, "snap_to_grid": False},
    "grid center": {"use_center": True},
    "random": {"snap_to_grid": False},
}


def draw(records, samples: int, **settings) -> np.ndarray:
    return render_contact_sheet(records, samples, DatasetConfig(**settings), points_per_side=32)


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_points_of_training_are_drawn_the_same_in_any_order(records, kind):
    sheet = draw(records, 4, positive_points=2, **PROMPTS[kind])

    assert sheet.dtype == np.uint8
    assert (sheet == draw(records[::-1], 4, positive_points=2, **PROMPTS[kind])).all()
    assert not (sheet == draw(records, 4, positive_points=9)).all()


@pytest.mark.parametrize("kind", PROMPTS)
def test_points_lie_inside_their_object_and_negative_ones_outside(records, kind):
    dataset = DatasetConfig(positive_points=3, negative_points=2, **PROMPTS[kind])
    for record in records:
        for annotation in record.annotations:
            mask = decode_rle(record.rle(annotation))
            found, labels = sample_prompts(record, annotation, dataset, points_per_side=32)
            x, y = np.floor(found + 0.5).astype(int).T
            is_inside = mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]
            assert (is_inside == (labels == 1)).all()


def test_an_image_that_is_gone_and_a_name_that_is_hostile_are_drawn(records):
    gone = replace(records[0], path=Path("/nowhere/a.png"), file_name="<b>\x1b[31m\n" + "long" * 90)

    assert draw([gone], samples=3).shape[1] > 0


def test_thousands_of_objects_and_of_images_stay_bounded(records, monkeypatch):
    monkeypatch.setattr(contact_sheet, "MAX_SHEET_PIXELS", 400_000)
    record = records[0]
    dot = np.zeros(record.size, dtype=bool)
    dot[5:7, 5:7] = True
    counts = encode_mask(dot)["counts"]
    crowded = replace(record, annotations=[Annotation(number, 1, counts, 4, [5, 5, 2, 2]) for number in range(5000)])

    sheet = draw([crowded, *records[1:]] * 3, samples=18)

    assert sheet.shape[0] * sheet.shape[1] < 600_000


@pytest.mark.parametrize(("share", "is_tinted"), [(0.2, True), (0.3, False), (1.0, False)])
def test_large_objects_are_outlined_alone(records, share, is_tinted):
    record = records[0]
    mask = np.zeros(record.size, dtype=bool)
    mask[: round(share * record.size[0])] = True
    rle = encode_mask(mask)
    large = Annotation(1, 1, rle["counts"], int(mask.sum()), [0, 0, record.size[1], round(share * record.size[0])])

    alone, drawn = (draw([replace(record, annotations=found)], samples=1) for found in ([], [large]))

    is_changed = (alone != drawn).any(axis=-1)
    inside = is_changed[contact_sheet.LEGEND_PIXELS + contact_sheet.MARGIN_PIXELS :][: contact_sheet.TILE_PIXELS]
    height = round(share * contact_sheet.TILE_PIXELS)
    assert is_changed.any()  # the outline
    assert (inside[10 : height - 10, 30:360].mean() > 0.9) == is_tinted


def test_crowd_regions_are_hatched(records):
    everything = encode_mask(np.ones(records[0].size, dtype=bool))["counts"]

    assert (draw([replace(records[0], crowds=[everything])], samples=1) != draw(records[:1], samples=1)).any()
