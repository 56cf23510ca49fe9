from dataclasses import replace

import numpy as np
import pytest
import torch

from finestsam.config import AugmentConfig, build_config
from finestsam.data.augment import sample_view, show_all
from finestsam.data.cells import label_cells
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.images.frames import compute_input_size
from finestsam.masks import decode_rle


def test_a_cell_belongs_to_the_smallest_object_in_its_middle(records):
    record = records[0]
    view, _ = show_all(record)
    height, width = compute_input_size(record.size, 64)

    labels = label_cells(record, view, (height, width), 16)

    assert labels.shape == (16, 16) and labels.dtype == torch.int32
    order = sorted(record.annotations, key=lambda annotation: -annotation.area)
    masks = [decode_rle(record.rle(annotation)) for annotation in order]
    for row in range(16):
        for column in range(16):
            if 4 * row >= height or 4 * column >= width:
                assert labels[row, column] == -1
                continue
            y = min(int((4 * row + 2) * record.size[0] / height), record.size[0] - 1)
            x = min(int((4 * column + 2) * record.size[1] / width), record.size[1] - 1)
            there = [number for number, mask in enumerate(masks, start=1) if mask[y, x]]
            assert labels[row, column] == (there[-1] if there else 0)


def test_cells_are_turned_and_flipped_with_the_image_and_hold_objects_that_are_not_requested(records):
    config = build_config({})
    settings = SampleSettings(64, 16, 0, config.prompts, config.dataset, max_objects=1, label_cells=label_cells)
    position = next(place for place, record in enumerate(records) if record.size[0] == record.size[1])

    plain = SampleDataset(records, settings)[(0, position)]
    flips = SampleDataset(records, replace(settings, augment=AugmentConfig(orientations="mirrored")))
    epoch = next(epoch for epoch in range(20) if flips._choose_view(records[position], 1 + epoch)[0].is_mirrored)
    flipped = flips[(epoch, position)]

    assert len(plain) == 1
    assert plain.cells.max() > 1
    same = plain.cells.numpy() == flipped.cells.numpy()[:, ::-1]
    assert same.mean() > 0.9  # the middle of a cell of an even number of pixels lies on the other side of it
    assert np.unique(flipped.cells).size == np.unique(plain.cells).size


@pytest.mark.parametrize("seed", range(12))
def test_cells_of_a_part_of_the_image_are_read_off_that_part(records, seed):
    record = records[seed % len(records)]
    view = sample_view(AugmentConfig(crop_min=0.1, orientations="all"), record.size, np.random.default_rng(seed))
    labels = np.zeros(record.size, dtype=np.int32)
    for number, annotation in enumerate(sorted(record.annotations, key=lambda one: -one.area), start=1):
        labels[decode_rle(record.rle(annotation))] = number
    x, y, width, height = view.window
    shown = np.rot90(labels[y : y + height, x : x + width], view.quarter_turns)
    shown = shown[:, ::-1] if view.is_mirrored else shown
    # As many pixels in the input frame as there are: the middle of a cell is a pixel.
    side = -(-max(view.size) // 4)

    cells = label_cells(record, view, view.size, side)

    rows, columns = (np.minimum(np.arange(0, length, 4) + 2, length - 1) for length in view.size)
    assert (cells.numpy()[: len(rows), : len(columns)] == shown[np.ix_(rows, columns)]).all()


def test_without_being_requested_there_are_none(records):
    config = build_config({})
    assert SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))[(0, 0)].cells is None
