import os

import numpy as np
import pytest

from finestsam.config import DatasetConfig
from finestsam.data.read import read_parts
from finestsam.formats.layouts import find_layout
from finestsam.images.files import write_image
from finestsam.masks import segmentation_to_rle

HEIGHT, WIDTH = 40, 80
SQUARE = "0 0.25 0.25 0.5 0.25 0.5 0.5 0.25 0.5"


@pytest.fixture
def read(tmp_path):
    """Return a function that writes one image's lines and reads the folder."""

    def write_and_read(*lines: str, **settings: object):
        for name in ("images", "labels"):
            (tmp_path / name).mkdir(exist_ok=True)
        write_image(tmp_path / "images" / "a.png", np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8))
        write_image(tmp_path / "images" / "without.png", np.full((HEIGHT, WIDTH, 3), 91, dtype=np.uint8))
        (tmp_path / "labels" / "a.txt").write_text("\n".join(lines))
        layout = find_layout(tmp_path)
        assert "YOLO" in layout.name
        return read_parts(layout, DatasetConfig(use_cache=False, **settings), ["all"])["all"]

    return write_and_read


def test_a_line_is_the_polygon_of_its_shares(read):
    index = read(SQUARE, "", "1 0.1 0.1 0.3 0.1 0.2 0.9")

    record, without = index.records
    assert (record.file_name, without.annotations) == ("a.png", [])
    square, triangle = record.annotations
    assert (square.box, square.area, square.source_id, triangle.source_id) == ([20, 10, 20, 10], 200, 1, 3)
    assert triangle.counts == segmentation_to_rle([[8, 4, 24, 4, 16, 36]], (HEIGHT, WIDTH))["counts"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("0 0.5 0.5 0.2 0.2", "box_only"),
        ("0 0.1 0.1 0.3 0.1 0.2", "odd_coordinates"),
        ("0 a b c d e f", "not_a_number"),
        ("nan 0.1 0.1 0.3 0.1 0.2 0.9", "not_a_number"),
        ("0 nan 0.1 0.3 0.1 0.2 0.9", "not_finite"),
        ("0 1e9 0.1 0.3 0.1 0.2 0.9", "far_outside"),
        ("0 0.1 0.1", "too_few_points"),
        ("0", "empty_segmentation"),
        ("0 2 2 3 2 3 3", "empty_mask"),
        ("0 " + "0 0 900 1 " * 900, "long_outline"),
    ],
)
def test_a_line_that_gives_no_mask_is_skipped(read, line, code):
    index = read(SQUARE, line)

    skipped = [(finding.annotation_id, finding.code) for finding in index.report.findings if "skip" in finding.action]
    assert skipped == [(2, code)]
    assert index.report.usable_annotation_count == 1


def test_boxes_are_masks_where_that_is_requested(read):
    (annotation,) = read("0 0.5 0.5 0.25 0.5", masks_from_boxes=True).records[0].annotations

    assert (annotation.box, annotation.area) == ([30, 10, 20, 20], 400)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.yaml", "names: [nut, fig]"),
        ("data.yaml", "names: {0: nut, 1: fig}\ntrain: images/train"),
        ("classes.txt", "nut\nfig\n"),
    ],
)
def test_classes_have_the_names_that_a_file_gives_them(read, tmp_path, name, text):
    (tmp_path / name).write_text(text)

    assert read(SQUARE).categories == {0: "nut", 1: "fig"}


@pytest.mark.parametrize(("name", "text"), [("data.yaml", "names: [{}]"), ("classes.txt", "{}")])
def test_a_name_that_was_corrected_is_read_anew(read, tmp_path, name, text):
    found = []
    for category in ("nut", "fig"):  # of one length
        (tmp_path / name).write_text(text.format(category))
        read(SQUARE)
        part = find_layout(tmp_path)
        os.utime(tmp_path / "labels" / "a.txt", (1, 1))
        for file in (tmp_path / "images").iterdir():
            os.utime(file, (1, 1))
        found.append(read_parts(part, DatasetConfig(), ["all"])["all"].categories)

    assert found == [{0: "nut"}, {0: "fig"}]


def test_code_in_a_yaml_file_is_not_run(read, tmp_path):
    (tmp_path / "data.yaml").write_text(f"names: !!python/object/apply:os.mkdir ['{tmp_path}/made']")

    assert read(SQUARE).categories == {0: "category 0"}
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["names: [2024-13-45, nut]", "a: &a [*a]", "names: [" * 500, "names: !!int ''"])
def test_a_yaml_file_of_odd_values_ends_no_check(read, tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)

    index = read(SQUARE)

    if "nut" in text:
        assert index.categories[0] == "2024-13-45"
    else:
        assert "names_unread" in [finding.code for finding in index.report.findings]


def test_text_files_that_are_no_text_skip_their_image(read, tmp_path):
    read(SQUARE)
    (tmp_path / "labels" / "without.txt").write_bytes(b"\xff\xfe\x00")

    layout = find_layout(tmp_path)
    index = read_parts(layout, DatasetConfig(use_cache=False), ["all"])["all"]

    assert [finding.code for finding in index.report.findings if finding.action == "skipped"] == ["broken_labels"]
