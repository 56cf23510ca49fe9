"""CONFORMANCE C: images."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from conformance_zoo import HEIGHT, WIDTH
from PIL import Image
from test_conformance_structure import SOUND

from finestsam.cli import main
from finestsam.config import ImagesConfig
from finestsam.errors import Defect
from finestsam.images.files import inspect_image, read_image

COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10]], dtype=np.uint8)
EXIF_ORIENTATION = 0x0112
# What stores an upright image so that a viewer shows it upright again.
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def render_quarters(size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """An image with a colour in each quarter."""
    rows, columns = np.indices(size)
    return COLOURS[2 * (rows >= size[0] // 2) + (columns >= size[1] // 2)]


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def add_image(zoo, name: str, data: bytes, **changes: object) -> None:
    """Add a third image with one annotation, number 9."""
    (zoo.images_dir / name).write_bytes(data)
    zoo.content["images"].append({"id": 3, "file_name": name, "width": WIDTH, "height": HEIGHT} | changes)
    zoo.add(9, image_id=3)


def assert_image_skipped(zoo, code: str, message: str):
    outcome = zoo.check()
    (name,) = outcome.skipped_images
    assert (outcome.code, outcome.skipped_images[name], outcome.skipped) == (0, code, {9: "image_skipped"})
    assert message in outcome.message(code)
    assert f"1 skipped (1 {code.replace('_', ' ')})" in outcome.out
    assert outcome.usable == SOUND
    assert zoo.check("--strict").code == 2
    return outcome


def test_case_50_a_missing_image_is_skipped_with_its_place(zoo):
    add_image(zoo, "c.png", b"")
    (zoo.images_dir / "c.png").unlink()

    assert_image_skipped(zoo, "missing_file", str(zoo.images_dir))


def test_case_50_when_all_are_missing_the_folder_is_shown(zoo):
    for path in zoo.images_dir.iterdir():
        path.unlink()

    outcome = zoo.check()

    assert outcome.code == 2
    assert "WARNING: 2 of 2 images cannot be used" in outcome.out
    assert f"a.png: missing from {zoo.images_dir}" in outcome.out


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"%PDF-1.7 ...", b"plain text", b"\x00" * 99])
def test_case_51_what_is_no_image_is_skipped(zoo, data):
    add_image(zoo, "c.jpg", data)

    assert_image_skipped(zoo, "not_an_image", "not an image")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_case_52_a_truncated_jpeg_is_skipped_and_never_half_grey(zoo, share, options):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = encode(noise, "JPEG", quality=95, **options)
    add_image(zoo, "c.jpg", data[: int(share * len(data))])

    assert_image_skipped(zoo, "broken_image", "truncated")
    with pytest.raises(Defect, match="truncated"):
        read_image(zoo.images_dir / "c.jpg")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_case_53_a_truncated_png_is_skipped(zoo, share):
    data = encode(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8), "PNG")
    add_image(zoo, "c.png", data[: int(share * len(data))])

    assert_image_skipped(zoo, "broken_image", "truncated")


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("convention", ["upright", "stored", "unsized"])
def test_case_54_masks_lie_on_turned_images_as_their_tool_saw_them(zoo, orientation, convention):
    upright = Image.fromarray(render_quarters())
    stored = upright.transpose(UNDO[orientation])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    seen = stored if convention == "stored" else upright
    is_reported = convention != "unsized"
    size = {"width": seen.width, "height": seen.height} if is_reported else {"width": None, "height": None}
    add_image(zoo, "c.png", encode(stored, "PNG", exif=exif), **size)

    outcome = zoo.check()

    if convention == "stored" and seen.size == upright.size:
        seen = upright  # both fit: upright, which is what viewers and most tools show
    (x, y, _, _) = outcome.usable[9][1]
    expected = None if not is_reported else (seen.height, seen.width)
    image = read_image(zoo.images_dir / "c.png", expected)
    assert image.shape[:2] == (seen.height, seen.width)
    assert (image == np.asarray(seen)).all()
    assert outcome.usable[9] == SOUND[1]
    assert (image[y, x] == np.asarray(seen)[y, x]).all()


def test_case_55_a_size_that_fits_neither_way_is_skipped(zoo):
    add_image(zoo, "c.png", encode(render_quarters((300, 400)), "PNG"))

    assert_image_skipped(zoo, "size_mismatch", f"size mismatch: the annotations say {WIDTH} x {HEIGHT}, the file has")


def test_case_56_a_square_turned_image_is_taken_upright_and_reported(zoo):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    stored = Image.fromarray(render_quarters((160, 160))).transpose(UNDO[6])
    add_image(zoo, "c.png", encode(stored, "PNG", exif=exif), width=160, height=160)

    outcome = zoo.check()

    assert outcome.remarks == ["ambiguous_turn"]
    assert (read_image(zoo.images_dir / "c.png", (160, 160)) == render_quarters((160, 160))).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa"])
def test_case_57_every_kind_of_pixels_becomes_rgb(zoo, mode):
    image = Image.fromarray(render_quarters())
    image = image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)
    if mode in ("PA", "RGBa"):
        add_image(zoo, "c.tif", encode(image.convert("RGBA"), "TIFF"))
    else:
        add_image(zoo, "c.png", encode(image, "PNG"))

    outcome = zoo.check("--strict")

    assert outcome.usable[9] == SOUND[1]
    assert outcome.remarks == []
    image = read_image(next(zoo.images_dir.glob("c.*")))
    assert (image.shape, image.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
    if mode in ("P", "RGBA"):
        assert np.abs(image.astype(int) - render_quarters()).max() <= (50 if mode == "P" else 0)


def test_case_57_transparency_is_dropped_and_reported(zoo):
    pixels = np.dstack([render_quarters(), np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)])
    pixels[:60, :, 3] = 0
    add_image(zoo, "c.png", encode(pixels, "PNG"))

    assert zoo.check().remarks == ["alpha"]
    assert (read_image(zoo.images_dir / "c.png") == render_quarters()).all()


def encode_deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits in each of three channels, which Pillow reads but does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_case_58_deep_images_are_neither_black_nor_saturated(zoo, bits, channels):
    ramp = np.linspace(0, 2**bits - 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    data = encode(ramp, "PNG") if channels == 1 else encode_deep_png(np.dstack([ramp, ramp[::-1], ramp]))
    add_image(zoo, "c.png", data)

    assert zoo.check().remarks == ["deep_pixels"]
    image = read_image(zoo.images_dir / "c.png")
    assert 118 < image.mean() < 137
    assert len(np.unique(image)) > 200
    full = read_image(zoo.images_dir / "c.png", settings=ImagesConfig(deep_range="full"))
    assert full.mean() == pytest.approx(127.5 * 2 ** (bits - 16), abs=1)


def test_case_59_cmyk_is_as_pillow_converts_it(zoo):
    for name, mode in (("c.jpg", "CMYK"), ("d.tif", "CMYK")):
        image = Image.fromarray(render_quarters()).convert(mode)
        (zoo.images_dir / name).write_bytes(encode(image, "JPEG" if name == "c.jpg" else "TIFF"))
        reference = np.asarray(Image.open(zoo.images_dir / name).convert("RGB")).astype(int)
        assert np.abs(read_image(zoo.images_dir / name) - reference).max() <= 2
        inner = np.s_[10:50, 10:70]
        assert np.abs(reference[inner] - render_quarters()[inner]).mean() < 6


def test_case_60_float_pixels_several_pages_and_animations_are_reported(zoo):
    values = np.linspace(-3, 9, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.float32)
    values[3, 4] = np.nan
    add_image(zoo, "c.tif", encode(Image.fromarray(values), "TIFF"))
    assert zoo.check().remarks == ["deep_pixels"]
    assert 118 < read_image(zoo.images_dir / "c.tif").mean() < 137

    first, second = Image.fromarray(render_quarters()), Image.fromarray(255 - render_quarters())
    for kind in ("TIFF", "GIF"):
        (zoo.images_dir / "c.tif").write_bytes(encode(first, kind, save_all=True, append_images=[second]))
        assert zoo.check().remarks == ["several_frames"]
        assert np.abs(read_image(zoo.images_dir / "c.tif").astype(int) - render_quarters()).max() < 40


def make_bomb(side: int) -> bytes:
    """An image of side x side black pixels, one bit each, in a few kilobytes."""
    return encode(Image.new("1", (side, side)), "PNG", optimize=True)


@pytest.mark.parametrize("side", [15_000, 40_000])
def test_case_61_a_bomb_is_skipped_before_it_is_decoded(zoo, side):
    data = make_bomb(15_000)
    if side == 40_000:  # only the head says so
        head = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    add_image(zoo, "c.png", data, width=side, height=side)

    outcome = zoo.check_apart()

    assert outcome.skipped_images == {"c.png": "too_large"}
    assert "dataset.images.max_pixels" in outcome.message("too_large")
    assert "Warning" not in outcome.err


def test_case_61_the_limit_is_a_setting(zoo):
    outcome = zoo.check("--dataset.images.max_pixels=1000")

    assert set(outcome.skipped_images.values()) == {"too_large"}


@pytest.mark.slow
def test_case_62_a_large_photo_is_read(zoo):
    row = np.random.default_rng(0).integers(0, 255, (1, 12_000, 3), dtype=np.uint8)
    add_image(zoo, "c.jpg", encode(np.repeat(row, 9000, axis=0), "JPEG"), width=12_000, height=9000)

    outcome = zoo.check_apart()

    assert outcome.usable.keys() == {*SOUND, 9}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1)])
def test_case_63_images_too_thin_to_segment_are_skipped_and_predicted_without_a_traceback(
    zoo, tmp_path, capsys, height, width
):
    add_image(zoo, "c.png", encode(render_quarters((height, width)), "PNG"), width=width, height=height)
    assert_image_skipped(zoo, "too_thin", "too few")

    arguments = ["--mode=predict", f"--input={zoo.images_dir / 'c.png'}", f"--out_dir={tmp_path / 'predicted'}"]
    arguments += ["--model.type=vit_tiny_test", "--model.checkpoint=none", "--device=cpu"]
    assert main([*arguments, "--generator.points_per_side=2"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"), [("c.jpg", "PNG"), ("c.JPG", "JPEG"), ("c", "PNG"), ("c.png", "WEBP"), ("c.dat", "BMP")]
)
def test_case_64_the_content_shows_the_kind_and_not_the_suffix(zoo, name, kind):
    add_image(zoo, name, encode(render_quarters(), kind))

    assert zoo.check("--strict").usable[9] == SOUND[1]


@pytest.mark.parametrize(
    "name", ["Übersicht größe 東京.png", "with space.png", "a#1.png", "a%20b.png", "x" * 240 + ".png", "a&b;c'd.png"]
)
def test_case_65_any_name_is_found(zoo, name):
    add_image(zoo, name, encode(render_quarters(), "PNG"))

    assert zoo.check("--strict").usable[9] == SOUND[1]


def test_case_65_names_too_long_for_the_disk_or_encoded_for_the_web_are_predicted(zoo):
    add_image(zoo, "with space.png", encode(render_quarters(), "PNG"), file_name="with%20space.png")
    zoo.content["images"].append({"id": 4, "file_name": "y" * 5000 + ".png", "width": WIDTH, "height": HEIGHT})

    outcome = zoo.check()

    assert outcome.usable[9] == SOUND[1]
    assert list(outcome.skipped_images.values()) == ["missing_file"]


def test_case_66_a_name_that_differs_in_case_is_found_where_it_is_the_only_one(zoo):
    add_image(zoo, "Photo.JPG", encode(render_quarters(), "PNG"), file_name="photo.jpg")
    outcome = zoo.check()
    assert (outcome.usable[9], outcome.remarks) == (SOUND[1], ["found_by_name"])

    (zoo.images_dir / "PHOTO.jpg").write_bytes(encode(render_quarters(), "PNG"))
    assert zoo.check().skipped_images == {"photo.jpg": "missing_file"}


def test_case_67_an_image_that_breaks_during_training_is_passed_over(zoo, tmp_path, capsys):
    add_image(zoo, "c.png", encode(render_quarters(), "PNG"))
    zoo.write()
    arguments = ["--mode=train", f"--dataset={zoo.root}", f"--sav_dir={tmp_path / 'sav'}", "--store.max_gigabytes=0"]
    arguments += ["--model.type=vit_tiny_test", "--model.checkpoint=none", "--device=cpu", "--num_workers=0"]
    arguments += ["--dataset.val_size=0", "--num_epochs=1"]
    assert main(arguments) == 0  # what the check found is kept, with the time of change of every file
    status = (zoo.images_dir / "c.png").stat()
    data = (zoo.images_dir / "c.png").read_bytes()
    (zoo.images_dir / "c.png").write_bytes(data[:60] + bytes(len(data) - 60))
    os.utime(zoo.images_dir / "c.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()

    assert main(arguments) == 0

    assert "skipped: c.png: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "broken link", "pipe", "device"])
def test_case_68_what_is_no_regular_file_is_skipped_and_never_waited_for(zoo, kind):
    path = zoo.images_dir / "c.jpg"
    make = {
        "folder": path.mkdir,
        "broken link": lambda: path.symlink_to(zoo.images_dir / "nowhere.jpg"),
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make[kind]()
    zoo.content["images"].append({"id": 3, "file_name": "c.jpg", "width": WIDTH, "height": HEIGHT})

    outcome = zoo.check_apart()

    assert outcome.skipped_images["c.jpg"] in ("missing_file", "outside_dataset")
    assert outcome.usable == SOUND


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_case_68_a_file_that_may_not_be_read_is_skipped(zoo):
    add_image(zoo, "c.png", encode(render_quarters(), "PNG"))
    (zoo.images_dir / "c.png").chmod(0)

    assert_image_skipped(zoo, "unreadable", "cannot be read")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_changed_bytes_give_an_image_or_a_defect_and_nothing_else(tmp_path, kind):
    rng = np.random.default_rng(0)
    data = encode(np.repeat(render_quarters((40, 50)), 1, axis=0), kind)
    path = tmp_path / "a"
    for _ in range(50):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(bytes(changed[: rng.integers(len(data) // 2, len(data) + 1)]))
        outputs = []
        for look in (lambda: inspect_image(path).size, lambda: read_image(path).shape[:2]):
            try:
                outputs.append(look())
            except Defect as defect:
                outputs.append(defect.code)
        assert outputs[0] == outputs[1], outputs
