"""CONFORMANCE F: labelme's files."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from finestsam.config import DatasetConfig
from finestsam.data.read import read_parts
from finestsam.formats.layouts import find_layout
from finestsam.images.files import write_image
from finestsam.masks import decode_rle

HEIGHT, WIDTH = 40, 60
SQUARE = [[10, 5], [30, 5], [30, 25], [10, 25]]


def encode_png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def shape(kind: str | None = "polygon", points: object = SQUARE, label: str = "nut", **changes: object) -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | changes


@pytest.fixture
def read(tmp_path):
    """Return a function that writes one labelme file beside its image and reads the folder."""

    def write_and_read(shapes: object, **changes: object):
        write_image(tmp_path / "a.png", np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8))
        content = {
            "version": "5.4.1",
            "shapes": shapes,
            "imagePath": "a.png",
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        } | changes
        (tmp_path / "a.json").write_text(json.dumps(content))
        return read_folder(tmp_path)

    return write_and_read


def read_folder(folder):
    layout = find_layout(folder)
    assert "labelme" in layout.name
    return read_parts(layout, DatasetConfig(use_cache=False), ["all"])["all"]


def list_skipped(index) -> dict:
    return {finding.annotation_id: finding.code for finding in index.report.findings if "skipped" in finding.action}


@pytest.mark.parametrize(
    "name", ["a.png", "..\\images\\a.png", "C:\\work\\a.png", "../elsewhere/a.png", "gone.png", ""]
)
def test_case_86_the_image_is_found_by_its_path_its_bare_name_or_beside_the_file(read, name):
    index = read([shape()], imagePath=name)

    assert [(record.file_name, len(record.annotations)) for record in index.records] == [("a.png", 1)]
    assert index.categories == {1: "nut"}


def test_case_86_annotations_and_images_may_lie_in_two_folders(read, tmp_path):
    read([shape()])
    for folder, name in (("images", "a.png"), ("annotations", "a.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    write_image(tmp_path / "images" / "without.png", np.zeros((8, 8, 3), dtype=np.uint8))

    index = read_folder(tmp_path)

    assert [(record.file_name, len(record.annotations)) for record in index.records] == [
        ("a.png", 1),
        ("without.png", 0),
    ]


def test_case_86_an_image_that_is_only_inside_the_file_is_read_from_there(read, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    read([shape()])
    (tmp_path / "a.png").unlink()
    content = json.loads((tmp_path / "a.json").read_text()) | {"imageData": encode_png(pixels)}
    (tmp_path / "a.json").write_text(json.dumps(content))

    (record,) = read_folder(tmp_path).records

    assert (np.asarray(Image.open(record.path)) == pixels).all()
    assert tmp_path not in record.path.parents  # nothing is written into the dataset
    Image.fromarray(pixels[::-1]).save(record.path, format="png")
    (again,) = read_folder(tmp_path).records
    assert (np.asarray(Image.open(again.path)) == pixels).all()


@pytest.mark.parametrize("points", [[[10, 5], [30, 25]], [[30, 25], [10, 5]], [[30, 5], [10, 25]]])
def test_case_87_a_rectangle_is_the_polygon_of_its_corners_in_any_order(read, points):
    (record,) = read([shape("rectangle", points), shape()]).records

    rectangle, polygon = record.annotations
    assert rectangle.counts == polygon.counts
    assert (rectangle.area, rectangle.box) == (400, [10, 5, 20, 20])


def test_case_87_a_circle_has_its_middle_and_its_radius(read):
    (record,) = read([shape("circle", [[30, 20], [30, 30]])]).records

    (circle,) = record.annotations
    assert circle.area == pytest.approx(np.pi * 100, rel=0.03)
    assert circle.box == pytest.approx([20, 10, 20, 20], abs=1)


def test_case_87_a_mask_is_pasted_where_its_box_begins_and_cut_at_the_edge(read):
    pixels = np.zeros((6, 8), dtype=np.uint8)
    pixels[1:, 2:] = 255
    whole, cut = (shape("mask", [[x, 3], [x + 7, 8]], mask=encode_png(pixels)) for x in (4, 57))
    (record,) = read([whole, cut]).records

    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[4:9, 6:12] = True
    assert (decode_rle(record.rle(record.annotations[0])) == expected).all()
    assert record.annotations[1].box == [59, 4, 1, 5]


def test_case_87_what_encloses_nothing_or_is_unknown_is_skipped(read):
    kinds = ["line", "linestrip", "point", "points", "blob", "circle", None]
    index = read([shape(kind) for kind in kinds])

    assert list_skipped(index) == dict.fromkeys(range(4), "no_area") | {4: "unknown_shape", 5: "unknown_shape"}
    assert [annotation.source_id for annotation in index.records[0].annotations] == [6]  # an old file: a polygon


def test_case_88_a_group_joins_shapes_of_one_label_and_null_joins_nothing(read):
    far = [[40, 30], [50, 30], [50, 38], [40, 38]]
    shapes = [
        shape(group_id=1), shape(points=far, group_id=1), shape(points=far, label="fig", group_id=1), shape(), shape(),
        shape("line", group_id=1),
    ]  # fmt: skip
    index = read(shapes)

    found = [(annotation.source_id, annotation.area) for annotation in index.records[0].annotations]
    assert found == [(0, 480), (2, 80), (3, 400), (4, 400)]
    assert index.report.annotation_count == 4


def test_case_89_sizes_may_be_missing_but_not_of_another_image(read):
    assert read([shape()], imageHeight=None, imageWidth=None).report.usable_annotation_count == 1

    index = read([shape()], imageHeight=400, imageWidth=600)

    assert list_skipped(index) == {None: "size_mismatch"}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "broken_labels"),
        ("[]", "no_shapes"),
        ('{"shapes": 3}', "no_shapes"),
        ('{"shapes": [], "imagePath": "b.png", "imageData": "@@@"}', "broken_base64"),
        ('{"shapes": [], "imagePath": "b.png", "imageData": "aGFsbG8="}', "not_an_image"),
        ('{"shapes": [], "imagePath": "b.png", "imageData": null}', "missing_file"),
        ("[" * 100_000, "broken_labels"),
    ],
)
def test_case_90_a_file_that_is_no_sound_labelme_file_is_skipped(read, tmp_path, text, code):
    read([shape()])
    (tmp_path / "b.json").write_text(text)

    index = read_folder(tmp_path)

    assert list_skipped(index) == {None: code}
    assert index.report.usable_annotation_count == 1


@pytest.mark.parametrize(
    ("points", "code"),
    [
        ([], "empty_segmentation"),
        (None, "not_a_number"),
        ([[1, 2, 3]], "not_a_number"),
        ([["a", "b"]], "not_a_number"),
        ([[1, 2], [3, 4]], "too_few_points"),
        ([[1, 1], [float("nan"), 2], [5, 5]], "not_finite"),
        ([[1, 1], [1e12, 2], [5, 5]], "far_outside"),
        ([[1, 1], [10**400, 2], [5, 5]], "far_outside"),
        ([[100, 100], [120, 100], [120, 120]], "empty_mask"),
    ],
)
def test_case_90_a_shape_that_gives_no_mask_is_skipped(read, points, code):
    index = read([shape(points=points), shape(), "nonsense", shape("mask", mask="@@@")])

    assert list_skipped(index) == {0: code, 2: "not_a_number", 3: "broken_base64"}
