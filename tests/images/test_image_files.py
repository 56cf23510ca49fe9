import io
import struct

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.utils.amg import build_point_grid as reference_grid
from segment_anything.utils.transforms import ResizeLongestSide

from benchmarks.mutations import encode_images, mutate_image
from finestsam.config import ImagesConfig
from finestsam.errors import Defect
from finestsam.images.files import (
    find_pixel_kind,
    hash_image,
    inspect_image,
    read_image,
    read_image_size,
    read_labels,
    write_image,
)
from finestsam.images.frames import (
    build_point_grid,
    compute_input_size,
    resize_image,
    scale_boxes,
    scale_points,
    shrink_mask,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def quadrants() -> np.ndarray:
    """40 x 60 pixels, a colour in each quarter."""
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[:20, :30], image[:20, 30:], image[20:, :30], image[20:, 30:] = RED, GREEN, BLUE, WHITE
    return image


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 333), (512, 512), (31, 2000)])
def test_images_points_and_boxes_are_resized_as_segment_anything_does(size):
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


def test_an_image_that_shrinks_to_nothing_is_refused():
    with pytest.raises(Defect, match="4000 x 1 pixels shrink to nothing at 1024"):
        compute_input_size((1, 4000), 1024)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_upright_image(tmp_path, quadrants, orientation):
    back = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}[orientation]
    stored = Image.fromarray(quadrants)
    for step in back:
        stored = stored.transpose(Image.Transpose(step))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)

    assert (read_image(tmp_path / "a.png") == quadrants).all()
    assert read_image_size(tmp_path / "a.png") == (40, 60)


def test_an_image_annotated_as_it_is_stored_is_not_turned(tmp_path, quadrants):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(quadrants).save(tmp_path / "a.png", exif=exif)

    assert (read_image(tmp_path / "a.png", expected_size=(40, 60)) == quadrants).all()
    assert read_image(tmp_path / "a.png", expected_size=(60, 40)).shape == (60, 40, 3)
    with pytest.raises(Defect, match="size mismatch: the annotations say 50 x 50, the file has 40 x 60"):
        read_image(tmp_path / "a.png", expected_size=(50, 50))


def encode_tiff(image: np.ndarray, orientation: int) -> bytes:
    """Return a plain TIFF with an orientation in place of its planar configuration, whose default it has."""
    data = cv2.imencode(".tif", image[..., ::-1] if image.ndim == 3 else image, [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1]
    data = bytearray(data.tobytes())
    first = struct.unpack_from("<I", data, 4)[0] + 2
    last = first + 12 * struct.unpack_from("<H", data, first - 2)[0]
    entries = [bytes(data[place : place + 12]) for place in range(first, last, 12)]
    kept = [entry for entry in entries if struct.unpack_from("<H", entry)[0] != 284]
    kept.append(struct.pack("<HHIHH", 274, 3, 1, orientation, 0))
    assert len(kept) == len(entries)
    data[first:last] = b"".join(sorted(kept, key=lambda entry: struct.unpack_from("<H", entry)))
    return bytes(data)


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "16 bits grey"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_checked_and_read_in_the_same_frame(tmp_path, quadrants, orientation, kind):
    path = tmp_path / "a.tif"
    pixels = quadrants if kind == "8 bits" else quadrants.astype(np.uint16) * 257
    path.write_bytes(encode_tiff(pixels[..., 0] if "grey" in kind else pixels, orientation))
    stored = np.repeat(quadrants[..., :1], 3, axis=2) if "grey" in kind else quadrants
    turn = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}[orientation]
    upright = stored if turn is None else np.asarray(Image.fromarray(stored).transpose(Image.Transpose(turn)))

    assert (read_image(path) == upright).all()
    assert read_image_size(path) == inspect_image(path).size == upright.shape[:2]
    for size in ((40, 60), (60, 40)):
        if size not in (stored.shape[:2], upright.shape[:2]):
            continue
        assert inspect_image(path, size).size == size
        assert (read_image(path, size) == (upright if size == upright.shape[:2] else stored)).all()
    for look in (inspect_image, read_image):
        with pytest.raises(Defect, match=f"the file has {upright.shape[1]} x {upright.shape[0]}"):
            look(path, (50, 50))


@pytest.mark.parametrize("kind", [2, 7])  # text, bytes
def test_an_orientation_that_is_no_number_is_none(tmp_path, quadrants, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    number, other = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHI", 0x0112, kind, 2) + b"6\0\0\0"
    data = exif.tobytes().replace(number, other)
    Image.fromarray(quadrants).save(tmp_path / "a.png", exif=data)
    with Image.open(tmp_path / "a.png") as image:
        assert image.getexif()[0x0112] in ("6", b"6\0")

    assert inspect_image(tmp_path / "a.png").size == read_image_size(tmp_path / "a.png") == (40, 60)
    assert (read_image(tmp_path / "a.png") == quadrants).all()


def test_the_hash_of_deep_pixels_shows_how_they_are_read_and_others_keep_theirs(tmp_path, quadrants):
    full, stretched = ImagesConfig(deep_range="full"), ImagesConfig()
    write_image(tmp_path / "a.png", quadrants)
    Image.fromarray(quadrants[..., 0].astype(np.uint16) * 9).save(tmp_path / "grey.png")
    (tmp_path / "colours.tif").write_bytes(encode_tiff(quadrants.astype(np.uint16) * 9, 1))

    for name, is_deep in (("a.png", False), ("grey.png", True), ("colours.tif", True)):
        digests = {hash_image(tmp_path / name, settings) for settings in (full, stretched)}
        assert len(digests) == 1 + is_deep
        assert digests == {inspect_image(tmp_path / name, settings=s).digest for s in (full, stretched)}


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
def test_deep_grey_images_are_neither_black_nor_saturated(tmp_path, bits):
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
def test_what_is_no_whole_image_is_refused(tmp_path, content, message):
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
    # A 1-bit image of 30 000 x 30 000 pixels compresses to a few kilobytes.
    Image.new("1", (30000, 30000)).save(tmp_path / "bomb.png")

    with pytest.raises(Defect, match="30000 x 30000 pixels, at most|DecompressionBomb"):
        read_image(tmp_path / "bomb.png")


def test_a_shrunk_mask_holds_the_share_that_is_covered():
    mask = np.zeros((8, 8), dtype=bool)
    mask[:4, :2] = True

    cover = shrink_mask(mask, (2, 2))

    np.testing.assert_allclose(cover, [[0.5, 0], [0, 0]])


def test_a_written_image_is_read_back(tmp_path, quadrants):
    write_image(tmp_path / "bild ä #1.png", quadrants)

    assert (read_image(tmp_path / "bild ä #1.png") == quadrants).all()
    assert torch.from_numpy(read_image(tmp_path / "bild ä #1.png")).is_contiguous()


def encode(kind: str, **options: object) -> bytes:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow was built without {kind}")
    data = io.BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3)).save(
        data, kind, **options
    )
    return data.getvalue()


# Files at which Pillow raises what it raises nowhere else, by the error.
UNUSUALLY_BROKEN = {
    "TIFF without a directory, TypeError": lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0",
    "cut AVIF, RuntimeError": lambda: encode("AVIF")[:-200],
    "DDS of an unknown format, NotImplementedError": lambda: encode("DDS")[:84] + b"ABCD" + encode("DDS")[88:],
    "BLP of an unknown version, BLPFormatError": lambda: b"BLP2" + b"\xff" * 200,
    "IM of an unknown mode, KeyError": lambda: b"Image type: nonsense\r\nFile size (no of images): 1\r\n".ljust(
        512, b"\0"
    ),
}


@pytest.mark.parametrize("name", UNUSUALLY_BROKEN)
@pytest.mark.parametrize("look", [inspect_image, read_image, read_image_size, hash_image, read_labels, find_pixel_kind])
def test_whatever_pillow_raises_is_a_defect_of_the_image(tmp_path, name, look):
    path = tmp_path / "a.jpg"
    path.write_bytes(UNUSUALLY_BROKEN[name]())

    try:
        look(path)
    except Defect as defect:
        assert defect.code in ("broken_image", "not_an_image")
    else:
        assert look in (hash_image, read_image_size) and "AVIF" in name  # its head is whole


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_kind_of_image_is_read_under_any_name(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(encode(kind))

    assert inspect_image(tmp_path / "a.jpg").size == read_image(tmp_path / "a.jpg").shape[:2] == (64, 64)


@pytest.mark.filterwarnings("ignore:IM image format")
@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI", "IM", "PSD"])
def test_rare_kinds_are_no_images(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(encode(kind) if kind != "PSD" else b"8BPS\0\1" + b"\0" * 99)

    with pytest.raises(Defect, match="not an image, despite its name"):
        inspect_image(tmp_path / "a.png")


@pytest.mark.parametrize("seed", range(3))
def test_what_the_check_of_a_broken_image_lets_pass_is_read_with_that_size(tmp_path, seed):
    generator = np.random.default_rng(seed)
    image = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    path = tmp_path / "a"
    for data in encode_images(image).values():
        for broken in (mutate_image(data, generator) for _ in range(4)):
            path.write_bytes(broken)
            try:
                size = inspect_image(path).size
            except Defect:
                continue
            assert read_image(path).shape[:2] == size
