"""Label maps: overlaps, crowds, what is not labelled, and the cells that training sees."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from finestsam.config import DatasetConfig, build_config
from finestsam.data.augment import View
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.read import read_training_set
from finestsam.data.semantic import IGNORED, match_classes, number_classes, render_label_cells, render_label_map
from finestsam.masks import encode_mask, rle_area, rle_box
from finestsam.records import Annotation, Record

SIZE = (8, 12)
CATEGORIES = {7: "roof", 3: "wall", 90: "tree"}


def sample_box(rows: slice, columns: slice) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[rows, columns] = True
    return encode_mask(mask)


def make_record(tmp_path, boxes: list[tuple[int, slice, slice]], crowds: list[tuple[slice, slice]] = ()) -> Record:
    annotations = []
    for number, (category, rows, columns) in enumerate(boxes, start=1):
        rle = sample_box(rows, columns)
        annotations.append(Annotation(number, category, rle["counts"], rle_area(rle), rle_box(rle)))
    regions = [sample_box(*crowd)["counts"] for crowd in crowds]
    return Record(1, "a.png", tmp_path / "a.png", SIZE, annotations, regions)


def test_classes_are_numbered_by_the_ids_of_the_file():
    table = number_classes(CATEGORIES, ignores_unlabelled=False)

    assert table.names == ["background", "wall", "roof", "tree"]
    assert table.by_category == {3: 1, 7: 2, 90: 3}


def test_categories_of_another_dataset_are_found_by_name():
    table = match_classes({1: "tree", 2: "car", 5: "background"}, ["background", "wall", "roof", "tree"], False)

    assert table.by_category == {1: 3}


@pytest.mark.parametrize("order", [1, -1])
def test_of_overlapping_objects_the_smaller_lies_on_top(tmp_path, order):
    boxes = [(3, slice(0, 8), slice(0, 6)), (7, slice(2, 4), slice(2, 4))]
    record = make_record(tmp_path, boxes[::order])

    labels = render_label_map(record, number_classes(CATEGORIES, False))

    assert (labels[2:4, 2:4] == 2).all()
    assert labels[0, 0] == 1
    assert (labels == 1).sum() == 48 - 4
    assert (labels[:, 6:] == 0).all()


def test_crowds_are_ignored_where_no_object_lies_on_them(tmp_path):
    record = make_record(tmp_path, [(90, slice(0, 4), slice(0, 4))], [(slice(0, 8), slice(2, 8))])

    labels = render_label_map(record, number_classes(CATEGORIES, False))

    assert (labels[:4, :4] == 3).all()
    assert (labels[:, 4:8] == IGNORED).all()
    assert (labels[4:, 2:8] == IGNORED).all()
    assert (labels[:, 8:] == 0).all()


def test_what_is_not_labelled_and_what_is_unknown_can_be_ignored(tmp_path):
    record = make_record(tmp_path, [(3, slice(0, 4), slice(0, 4)), (7, slice(4, 8), slice(0, 4))])

    labels = render_label_map(record, match_classes({3: "wall", 7: "car"}, ["background", "wall"], True))

    assert (labels[:4, :4] == 1).all()
    assert (labels[4:, :4] == IGNORED).all()
    assert (labels[:, 4:] == IGNORED).all()


def test_cells_hold_the_class_in_their_middle_and_nothing_in_the_padding(tmp_path):
    record = make_record(tmp_path, [(3, slice(0, 4), slice(0, 6))])
    table = number_classes(CATEGORIES, False)
    plain, flipped = (View((0, 0, 12, 8), is_mirrored=flag) for flag in (False, True))

    # 12 x 8 pixels become 24 x 16, 6 x 4 cells of 4 input pixels, in a square of 8 x 8.
    cells, mirrored = (render_label_cells(record, table, view, (16, 24), 8) for view in (plain, flipped))

    expected = torch.full((8, 8), IGNORED)
    expected[:4, :6] = 0
    expected[:2, :3] = 1
    assert torch.equal(cells, expected)
    assert torch.equal(mirrored[:4, :6], expected[:4, :6].flip(1))


def test_samples_of_classes_have_no_objects(records):
    config = build_config({})
    label_cells = partial(render_label_cells, table=number_classes({1: "shape"}, False))
    settings = SampleSettings(64, 16, 0, config.prompts, config.dataset, label_cells=label_cells, prompts_objects=False)

    sample = SampleDataset(records, settings)[(0, 0)]

    assert sample.cells.shape == (16, 16)
    assert len(sample) == len(sample.prompts) == 0
    assert sample.image is not None


def test_grey_values_can_be_classes_and_void_is_ignored(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name, values in (("a", (2, 5, 255)), ("b", (0, 5, 2))):
        Image.fromarray(np.full((12, 12, 3), 90, dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
        mask = np.repeat(np.array(values, dtype=np.uint8), 4)[None].repeat(12, axis=0)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    settings = DatasetConfig(path=str(tmp_path), mask_instances="classes", val_size=0.0, use_cache=False)
    data = read_training_set(settings)
    table = number_classes(data.category_names, False)

    found = {record.file_name: render_label_map(record, table)[0, ::4].tolist() for record in data.train}

    assert table.names == ["background", "value 2", "value 5"]
    assert found == {"a.png": [1, 2, IGNORED], "b.png": [0, 2, 1]}


def test_grey_values_are_the_same_classes_whichever_part_has_them_first(tmp_path):
    for part, values in (("train", (0, 9, 4)), ("val", (7, 4, 0))):
        for folder in ("images", "masks"):
            (tmp_path / part / folder).mkdir(parents=True)
        Image.fromarray(np.full((12, 12, 3), 90, dtype=np.uint8)).save(tmp_path / part / "images" / "a.png")
        mask = np.repeat(np.array(values, dtype=np.uint8), 4)[None].repeat(12, axis=0)
        Image.fromarray(mask).save(tmp_path / part / "masks" / "a.png")
    data = read_training_set(DatasetConfig(path=str(tmp_path), mask_instances="classes", use_cache=False))
    table = number_classes(data.category_names, False)

    (first,), (second,) = (
        [render_label_map(record, table)[0, ::4].tolist() for record in part] for part in (data.train, data.val)
    )

    assert data.category_names == {4: "value 4", 7: "value 7", 9: "value 9"}
    assert (first, second) == ([0, 3, 1], [2, 1, 0])
