import io

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.utils.amg import build_point_grid as reference_grid
from segment_anything.utils.transforms import ResizeLongestSide

from finestsam.errors import Defect
from finestsam.images import (
    build_point_grid,
    compute_input_size,
    read_image,
    read_image_size,
    resize_image,
    scale_boxes,
    scale_points,
    shrink_mask,
    write_image,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def quadrants() -> np.ndarray:
    """40 x 60 pixels, a colour in each quarter."""
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[:20, :30], image[:20, 30:], image[20:, :30], image[20:, 30:] = RED, GREEN, BLUE, WHITE
    return image


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 333), (512, 512), (31, 2000)])
def test_pictures_points_and_boxes_are_resized_as_segment_anything_does(size):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
    points, boxes = generator.random((7, 2)) * 100, generator.random((5, 4)) * 100
    reference = ResizeLongestSide(256)

    input_size = compute_input_size(size, 256)

    assert (resize_image(image, input_size) == reference.apply_image(image)).all()
    np.testing.assert_allclose(scale_points(points, size, input_size), reference.apply_coords(points, size))
    np.testing.assert_allclose(scale_boxes(boxes, size, input_size), reference.apply_boxes(boxes, size))


def test_the_grid_is_the_generators():
    np.testing.assert_allclose(build_point_grid(32), reference_grid(32), atol=1e-15)


def test_a_picture_that_shrinks_to_nothing_is_refused():
    with pytest.raises(Defect, match="4000 x 1 pixels shrink to nothing at 1024"):
        compute_input_size((1, 4000), 1024)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_upright_picture(tmp_path, quadrants, orientation):
    back = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = Image.fromarray(quadrants)
    for step in back:
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)

    assert (read_image(tmp_path / "a.png") == quadrants).all()
    assert read_image_size(tmp_path / "a.png") == (40, 60)


def test_a_picture_annotated_as_it_is_stored_is_not_turned(tmp_path, quadrants):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(quadrants).save(tmp_path / "a.png", exif=exif)

    assert (read_image(tmp_path / "a.png", expected_size=(40, 60)) == quadrants).all()
    assert read_image(tmp_path / "a.png", expected_size=(60, 40)).shape == (60, 40, 3)
    with pytest.raises(Defect, match="size mismatch: the annotations say 50 x 50, the file has 40 x 60"):
        read_image(tmp_path / "a.png", expected_size=(50, 50))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "P", "CMYK"])
def test_every_kind_of_pixels_becomes_rgb(tmp_path, quadrants, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(quadrants).convert(mode).save(path)

    image = read_image(path)

    assert image.shape == (40, 60, 3)
    assert image.dtype == np.uint8
    if mode in ("RGBA", "P", "CMYK"):
        assert np.abs(image.astype(int) - quadrants).max() <= 2
    else:
        assert (image[..., 0] == image[..., 1]).all()


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_deep_grey_pictures_are_neither_black_nor_saturated(tmp_path, bits):
    ramp = np.linspace(0, 2**bits - 1, 100 * 100).reshape(100, 100).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")

    image = read_image(tmp_path / "a.png")

    assert 120 < image.mean() < 135
    assert len(np.unique(image)) > 200


def write_jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an image"),
        (b"<html>not found</html>", "not an image"),
        (b"%PDF-1.4 something", "not an image"),
        (write_jpeg()[:2000], "truncated"),
    ],
)
def test_what_is_no_whole_picture_is_refused(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(content)

    with pytest.raises(Defect, match=message):
        read_image(tmp_path / "a.jpg")


def test_a_truncated_png_is_refused(tmp_path, quadrants):
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])

    with pytest.raises(Defect, match="truncated"):
        read_image(tmp_path / "a.png")


def test_folders_and_missing_files_are_refused(tmp_path):
    (tmp_path / "x.jpg").mkdir()

    with pytest.raises(Defect, match="not a regular file"):
        read_image(tmp_path / "x.jpg")
    with pytest.raises(Defect, match="no such file"):
        read_image(tmp_path / "y.jpg")


def test_a_file_that_claims_billions_of_pixels_is_refused_before_it_is_decoded(tmp_path):
    # A 1-bit picture of 30 000 x 30 000 pixels compresses to a few kilobytes.
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")

    with pytest.raises(Defect, match="30000 x 30000 pixels, at most|DecompressionBomb"):
        read_image(tmp_path / "bomb.png")


def test_a_shrunk_mask_holds_the_share_that_is_covered():
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4, :2] = True

    cover = shrink_mask(mask, (2, 2))

    np.testing.assert_allclose(cover, [[0.5, 0], [0, 0]])


def test_a_written_picture_is_read_back(tmp_path, quadrants):
    write_image(tmp_path / "bild ä #1.png", quadrants)

    assert (read_image(tmp_path / "bild ä #1.png") == quadrants).all()
    assert torch.from_numpy(read_image(tmp_path / "bild ä #1.png")).is_contiguous()
