from dataclasses import replace

import numpy as np
import pytest
import torch

from finestsam.config import AugmentConfig, build_config
from finestsam.data.augment import show_all
from finestsam.data.categories import list_category_ids, number_categories
from finestsam.data.cells import CROWD, label_cells
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.images.frames import compute_input_size
from finestsam.masks import encode_mask


def test_categories_are_numbered_in_the_order_of_their_ids_and_those_of_one_name_together():
    table = number_categories({7: "crate", 3: "ball", 12: "crate"})

    assert table.names == ["no object", "ball", "crate"]
    assert table.by_category == {3: 1, 7: 2, 12: 2}
    assert list_category_ids(table) == [3, 7]


def test_categories_of_another_dataset_are_found_by_name():
    table = number_categories({1: "crate", 2: "bird"}, ["ball", "crate"])

    assert table.names == ["no object", "ball", "crate"]
    assert table.by_category == {1: 2}
    assert list_category_ids(table) == [2, 1]  # the ball has none in this dataset and gets a free one


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(orientations="mirrored", crop_min=0.5, variants=1)])
def test_objects_come_with_their_classes_and_cells_with_those_of_all(records, augment):
    config = build_config({})
    table = number_categories({number: f"category {number}" for number in range(1, 6)})
    settings = SampleSettings(64, 16, 0, config.prompts, replace(config.dataset, prompts_per_object=2), max_objects=3)
    sample = SampleDataset(records, replace(settings, label_cells=label_cells, categories=table, augment=augment))[
        (0, 1)
    ]
    plain = SampleDataset(records, replace(settings, augment=augment))[(0, 1)]

    by_id = {one.id: one.category_id for one in records[1].annotations}
    assert sample.object_classes == [table.by_category[by_id[number]] for number in sample.annotation_ids]
    assert len(sample.cell_classes) == len(records[1].annotations) > 3
    assert sample.cells.max() <= len(sample.cell_classes)
    assert plain.cells is None and plain.object_classes == [] == plain.cell_classes
    torch.testing.assert_close(sample.prompts.points, plain.prompts.points)


def test_crowd_regions_are_marked_where_no_object_lies(records):
    record = records[0]
    mask = np.zeros(record.size, dtype=bool)
    mask[: record.size[0] // 2] = True
    view, _ = show_all(record)
    size = compute_input_size(record.size, 64)
    before = label_cells(record, view, size, 16)

    after = label_cells(replace(record, crowds=[encode_mask(mask)["counts"]]), view, size, 16)

    changed = before != after
    assert changed.any()
    assert (before[changed] == 0).all() and (after[changed] == CROWD).all()
