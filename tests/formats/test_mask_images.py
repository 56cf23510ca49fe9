import numpy as np
import pytest
from PIL import Image

from finestsam.config import DatasetConfig
from finestsam.data.read import read_parts
from finestsam.formats.layouts import find_layout
from finestsam.images.files import write_image
from finestsam.masks import decode_rle, labels_to_rles

HEIGHT, WIDTH = 48, 64


@pytest.fixture
def numbers() -> np.ndarray:
    """Three objects, two of them touching."""
    numbers = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    numbers[4:20, 4:20], numbers[4:20, 20:40], numbers[30:44, 10:50] = 1, 2, 3
    return numbers


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "images" / "a.png", np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8))
    return tmp_path


def read_folder(folder, **settings):
    layout = find_layout(folder)
    assert "masks" in layout.name
    return read_parts(layout, DatasetConfig(use_cache=False, **settings), ["all"])["all"]


def list_masks(index) -> list[np.ndarray]:
    (record,) = index.records
    return [decode_rle(record.rle(annotation)) for annotation in record.annotations]


def list_skipped(index) -> list[str]:
    return [finding.code for finding in index.report.findings if finding.action.startswith("skipped")]


def test_numbers_become_the_masks_of_their_pixels():
    labels = np.random.default_rng(0).integers(0, 5, (7, 9))

    rles = labels_to_rles(labels)

    assert sorted(rles) == [1, 2, 3, 4]
    for number, rle in rles.items():
        assert (decode_rle(rle) == (labels == number)).all()
    assert labels_to_rles(np.zeros((3, 3), dtype=int)) == {}
    assert decode_rle(labels_to_rles(np.full((3, 3), 7))[7]).all()


@pytest.mark.parametrize("kind", ["grey", "deep", "palette", "colours"])
def test_different_numbers_are_objects_though_they_touch(folder, numbers, kind):
    image = Image.fromarray({"deep": numbers.astype(np.uint16) * 700}.get(kind, numbers))
    if kind == "palette":
        image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 200, 0, 0])  # 1 and 3 look alike, their numbers differ
    if kind == "colours":
        image = Image.fromarray(np.array([[0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 9]], dtype=np.uint8)[numbers])
    image.save(folder / "masks" / "a.png")

    masks = list_masks(read_folder(folder))

    assert {mask.tobytes() for mask in masks} == {(numbers == number).tobytes() for number in (1, 2, 3)}


@pytest.mark.parametrize(("brightest", "suffix"), [(1, "png"), (255, "png"), (255, "jpg"), (255, "bmp")])
def test_connected_regions_of_a_black_and_white_mask_are_objects(folder, numbers, brightest, suffix):
    Image.fromarray(((numbers > 0) * brightest).astype(np.uint8)).save(folder / "masks" / f"a.{suffix}")

    masks = list_masks(read_folder(folder))

    assert [int(mask.sum()) for mask in masks] == [16 * 36, 14 * 40]


def test_smoothed_edges_are_no_objects(folder, numbers):
    grey = (numbers > 0) * 255.0
    smooth = (grey + np.roll(grey, 1, 0) + np.roll(grey, 1, 1) + np.roll(grey, -1, 0) + np.roll(grey, -1, 1)) / 5
    smooth += np.linspace(0, 3, WIDTH) * (smooth > 0) * (smooth < 255)
    Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(folder / "masks" / "a.png")

    assert len(list_masks(read_folder(folder))) == 2


def test_the_undecided_border_of_palette_masks_is_no_object(folder, numbers):
    numbers[0:2, :] = 255
    image = Image.fromarray(numbers)
    image.putpalette(bytes(range(256)) * 3)
    image.save(folder / "masks" / "a.png")

    assert len(list_masks(read_folder(folder))) == 3
    assert len(list_masks(read_folder(folder, mask_instances="values"))) == 3
    assert len(list_masks(read_folder(folder, mask_instances="classes"))) == 3


@pytest.mark.parametrize("instances", ["auto", "values"])
@pytest.mark.parametrize("kind", ["grey", "deep", "colours"])
def test_the_number_255_is_an_object_where_it_is_no_palettes(folder, numbers, kind, instances):
    image = Image.fromarray(np.array([0, 85, 170, 255], dtype=np.uint16 if kind == "deep" else np.uint8)[numbers])
    if kind == "colours":
        colours = [[0, 0, 0], [0, 255, 0], [255, 0, 0], [0, 0, 255]]
        image = Image.fromarray(np.array(colours, dtype=np.uint8)[numbers])
    image.save(folder / "masks" / "a.png")

    masks = list_masks(read_folder(folder, mask_instances=instances))

    assert {mask.tobytes() for mask in masks} == {(numbers == number).tobytes() for number in (1, 2, 3)}


@pytest.mark.parametrize(("kind", "count"), [("grey", 2), ("grey in colours", 2), ("deep", 3), ("colours", 3)])
def test_of_classes_the_number_255_is_undecided_in_grey_images_of_8_bits(folder, numbers, kind, count):
    numbers = np.array([0, 85, 170, 255], dtype=np.uint16 if kind == "deep" else np.uint8)[numbers]
    if "colours" in kind:
        numbers = numbers[..., None] * np.array([0, 0, 1] if kind == "colours" else [1, 1, 1], dtype=np.uint8)
    Image.fromarray(numbers).save(folder / "masks" / "a.png")

    (record,) = read_folder(folder, mask_instances="classes").records

    assert (len(record.annotations), len(record.crowds)) == (count, 3 - count)


def test_settings_decide_between_regions_and_numbers(folder, numbers):
    Image.fromarray((numbers == 1).astype(np.uint8) * 9 + (numbers == 3).astype(np.uint8) * 9).save(
        folder / "masks" / "a.png"
    )

    assert len(list_masks(read_folder(folder, mask_instances="components"))) == 2
    assert len(list_masks(read_folder(folder, mask_instances="values"))) == 1


def test_specks_are_dropped_and_counted(folder, numbers):
    mask = (numbers > 0) * 255
    mask[46, 60:63] = 255
    Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / "a.png")

    index = read_folder(folder)

    assert index.report.annotation_count == 2
    assert any("1 regions under 16 pixels dropped" in line for line in index.report.list_examples())
    assert len(list_masks(read_folder(folder, min_region_pixels=0))) == 3


@pytest.mark.parametrize("name", ["a_mask.png", "A.PNG", "a-label.png", "a_seg.tif"])
def test_masks_may_be_named_a_little_differently(folder, numbers, name):
    Image.fromarray(numbers).save(folder / "masks" / name)

    assert len(list_masks(read_folder(folder))) == 3


def test_a_folder_of_masks_has_one_object_in_each(folder, numbers):
    (folder / "masks" / "a").mkdir()
    for number in (1, 2, 3):
        Image.fromarray(((numbers == number) * 255).astype(np.uint8)).save(folder / "masks" / "a" / f"cell{number}.png")

    index = read_folder(folder)

    assert [annotation.source_id for annotation in index.records[0].annotations] == ["cell1", "cell2", "cell3"]


def test_an_empty_mask_is_an_image_without_objects_and_a_missing_one_a_defect(folder):
    Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint8)).save(folder / "masks" / "a.png")
    write_image(folder / "images" / "b.png", np.zeros((8, 8, 3), dtype=np.uint8))

    index = read_folder(folder)

    assert [len(record.annotations) for record in index.records] == [0]
    assert list_skipped(index) == ["missing_mask"]


def test_a_mask_of_another_size_or_that_is_none_is_a_defect(folder, numbers):
    Image.fromarray(numbers[:40]).save(folder / "masks" / "a.png")
    assert list_skipped(read_folder(folder)) == ["size_mismatch"]

    (folder / "masks" / "a.png").write_bytes(b"no image")
    assert list_skipped(read_folder(folder)) == ["not_an_image"]
