"""Read and write image files: RGB images, label images, sizes and hashes."""

import functools
import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH

from finestsam.config import ImagesConfig
from finestsam.errors import Defect
from finestsam.runtime.whole_files import replacing

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
# The formats that Pillow may detect, whatever the file's name is. Its readers of rare formats fail in many more ways.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
JPEG_QUALITY = 85
ORIENTATION_TAG = 0x0112  # of EXIF; orientations 5 to 8 exchange width and height
# By EXIF orientation: the turn that makes a stored image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNS_BACK = TURNS | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


@dataclass
class ImageFacts:
    """Facts about an image whose whole file was read."""

    size: tuple[int, int]  # of the image as `read_image` returns it
    digest: str  # hash of the file's bytes; for deep pixels also of the setting that converts them to 8 bits
    remarks: list[tuple[str, str]] = field(default_factory=list)  # code and message; the image is used anyway


def read_image(
    path: Path, expected_size: tuple[int, int] | None = None, settings: ImagesConfig | None = None
) -> np.ndarray:
    """Read an image of any common format, upright.

    Args:
        expected_size: (height, width) that the annotations were drawn on. Labelling tools disagree about the EXIF
            orientation: if the stored size is the expected one and the upright size is not, the image is returned
            as it is stored.

    Returns:
        H x W x 3, uint8, RGB.

    Raises:
        Defect: the file is missing, not an image, truncated, too large, or has an unexpected size.
    """
    return decode_image(_read_bytes(path), expected_size, settings)


def read_hashed_image(path: Path, settings: ImagesConfig | None = None) -> tuple[np.ndarray, str]:
    """Return the results of `read_image` and `hash_image` from the same bytes."""
    data = _read_bytes(path)
    return decode_image(data, settings=settings), _hash_image(data, settings)


def decode_image(
    data: bytes, expected_size: tuple[int, int] | None = None, settings: ImagesConfig | None = None
) -> np.ndarray:
    """Return an image from the bytes of its file, as `read_image` does."""
    settings = settings or ImagesConfig()
    with _open_image(data, settings) as image:
        has_deep_colours = _has_deep_colours(image)
        frame = _read_frame(image)
        if has_deep_colours:
            image = _read_deep_colours(data, settings)
        image.load()
        return _to_rgb(_turn(image, frame, expected_size), settings)


def read_labels(path: Path, settings: ImagesConfig | None = None) -> tuple[np.ndarray, bool]:
    """Read a label image as it is stored: grey values, palette indices, or one number for each colour.

    Returns:
        H x W, int64, and whether the format is lossy (JPEG): then only dark and bright pixels are reliable.

    Raises:
        Defect: as `read_image`.
    """
    with _open_image(_read_bytes(path), settings or ImagesConfig()) as image:
        image.load()
        is_lossy = image.format in ("JPEG", "MPO")
        if is_lossy or image.mode in ("1", "LA", "La"):
            return np.asarray(image.convert("L")).astype(np.int64), is_lossy
        if image.mode in ("L", "P") or image.mode.startswith("I"):
            return np.asarray(image).astype(np.int64), False
        if image.mode.startswith("F"):
            return np.nan_to_num(np.asarray(image)).astype(np.int64), False
        colours = np.asarray(image.convert("RGB")).astype(np.int64)
        red, green, blue = (colours[..., channel] for channel in range(3))
        if (red == green).all() and (green == blue).all():
            return red, False
        return (red << 16) | (green << 8) | blue, False


def find_pixel_kind(path: Path, settings: ImagesConfig | None = None) -> Literal["palette", "grey", "colour", "deep"]:
    """Return the kind of an image's pixels. Colour images with only grey pixels are grey; more than 8 bits are deep.

    Raises:
        Defect: as `read_image`.
    """
    with _open_image(_read_bytes(path), settings or ImagesConfig()) as image:
        if image.mode == "P":
            return "palette"
        if image.mode not in ("L", "LA", "La", "RGB", "RGBA"):
            return "deep"
        colours = np.asarray(image.convert("RGB"))
        return "grey" if (colours == colours[..., :1]).all() else "colour"


def inspect_image(
    path: Path, expected_size: tuple[int, int] | None = None, settings: ImagesConfig | None = None
) -> ImageFacts:
    """Check that the whole image can be decoded. Cheaper than `read_image`, and finds the same defects."""
    data = _read_bytes(path)
    settings = settings or ImagesConfig()
    with _open_image(data, settings) as image:
        is_deep = _is_deep(image)
        frame = _read_frame(image)
        height, width = frame.stored
        size = _choose_size(frame, expected_size)
        # A JPEG decoded at an eighth of its size is still read to the end, in half the time.
        image.draft(None, (width // 8 or 1, height // 8 or 1))
        image.load()
        remarks = _list_remarks(image, is_deep)
        if frame.orientation != 1 and height == width:
            remarks.append(
                (
                    "ambiguous_turn",
                    "a square image with an EXIF orientation: annotations are taken as upright, check it",
                )
            )
    return ImageFacts(size, _hash(data, is_deep, settings), remarks)


def hash_image(path: Path, settings: ImagesConfig | None = None) -> str:
    """Return the hash of an image, the same as `ImageFacts.digest`.

    Raises:
        Defect: the file is missing or not an image.
    """
    return _hash_image(_read_bytes(path), settings)


def _hash_image(data: bytes, settings: ImagesConfig | None) -> str:
    settings = settings or ImagesConfig()
    with _open_image(data, settings) as image:
        return _hash(data, _is_deep(image), settings)


def _hash(data: bytes, is_deep: bool, settings: ImagesConfig) -> str:
    """Return a hash of everything that the pixels depend on."""
    digest = hashlib.blake2b(data, digest_size=16)
    if is_deep:
        digest.update(settings.deep_range.encode())
    return digest.hexdigest()


def read_image_size(path: Path, settings: ImagesConfig | None = None) -> tuple[int, int]:
    """Return the upright (height, width) from the file's header, without decoding the image."""
    with _open_image(_read_bytes(path), settings or ImagesConfig()) as image:
        return _read_frame(image).upright


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # False for folders, pipes and devices too: they must not be opened
            raise Defect("missing_file", "no such file" if not path.exists() else "not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise Defect("unreadable", f"cannot be read: {getattr(error, 'strerror', None) or error}") from None


@contextmanager
def _open_image(data: bytes, settings: ImagesConfig) -> Iterator[Image.Image]:
    """Open an image and check the size in its header. Errors of Pillow inside the context become a Defect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about damaged metadata do not help a user
        yield from _open_checked(data, settings)


def _open_checked(data: bytes, settings: ImagesConfig) -> Iterator[Image.Image]:
    try:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # our own limit is checked below
        try:
            image = Image.open(io.BytesIO(data), formats=_list_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        with image:
            # The header of a small file can claim billions of pixels.
            if image.width * image.height > settings.max_pixels:
                limit = f"at most {settings.max_pixels} (dataset.images.max_pixels)"
                raise Defect("too_large", f"{image.width} x {image.height} pixels, {limit}")
            yield image
    except UnidentifiedImageError:
        raise Defect(
            "not_an_image", "not an image, despite its name" if data else "an empty file, not an image"
        ) from None
    except MemoryError:
        raise Defect("too_large", "too many pixels for the memory") from None
    except Defect:
        raise
    except Exception as error:  # a damaged file can make Pillow or OpenCV raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Defect("broken_image", f"truncated or broken image ({reason:.200})") from None


@functools.cache
def _list_formats() -> list[str]:
    """Return the `FORMATS` that this Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@dataclass
class _Frame:
    """Size and orientation of an image in its file."""

    stored: tuple[int, int]
    orientation: int  # of EXIF, 1 to 8
    is_turned_on_load: bool  # Pillow and OpenCV load only a TIFF upright, other formats as they are stored

    @property
    def upright(self) -> tuple[int, int]:
        return self.stored[::-1] if self.orientation >= 5 else self.stored


def _read_frame(image: Image.Image) -> _Frame:
    """Return the stored size and the orientation. Call it before loading: a loaded TIFF loses its orientation."""
    orientation = image.getexif().get(ORIENTATION_TAG, 1)  # loads a PNG
    orientation = int(orientation) if orientation in TURNS else 1  # damaged files can have text or bytes there
    if image.format == "TIFF":
        # Pillow gives the size of the upright image, the tags the stored one.
        return _Frame((image.tag_v2[IMAGELENGTH], image.tag_v2[IMAGEWIDTH]), orientation, True)
    return _Frame((image.height, image.width), orientation, False)


def _choose_size(frame: _Frame, expected_size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the upright or the stored size, whichever is expected; upright if both fit or none is expected."""
    if expected_size is None or frame.upright == expected_size:
        return frame.upright
    if frame.stored == expected_size:
        return frame.stored
    raise Defect(
        "size_mismatch",
        f"size mismatch: the annotations say {expected_size[1]} x {expected_size[0]}, "
        f"the file has {frame.upright[1]} x {frame.upright[0]}",
    )


def _turn(image: Image.Image, frame: _Frame, expected_size: tuple[int, int] | None) -> Image.Image:
    """Return a loaded image upright, or as it is stored if the annotations were drawn on the stored image."""
    is_wanted_upright = _choose_size(frame, expected_size) == frame.upright
    if frame.orientation == 1 or is_wanted_upright == frame.is_turned_on_load:
        return image
    return image.transpose((TURNS if is_wanted_upright else TURNS_BACK)[frame.orientation])


def _is_deep(image: Image.Image) -> bool:
    """Return whether pixels have more than 8 bits (see `dataset.images.deep_range`). Call it before loading."""
    return image.mode.startswith(("I", "F")) or _has_deep_colours(image)


def _has_deep_colours(image: Image.Image) -> bool:
    """Return whether an image has several channels of 16 bits; Pillow keeps only 8 of them. Call it before loading."""
    return len(image.getbands()) > 1 and any(";16" in str(tile[3]) for tile in image.tile)


def _read_deep_colours(data: bytes, settings: ImagesConfig) -> Image.Image:
    # Not IMREAD_COLOR_RGB: with it OpenCV returns uninitialised memory for a 16-bit TIFF.
    values = cv2.imdecode(
        np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    )
    if values is None:
        raise Defect("broken_image", "truncated or broken image (16 bits a channel)")
    return Image.fromarray(_stretch_to_uint8(values[:, :, ::-1], settings))


def _to_rgb(image: Image.Image, settings: ImagesConfig) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        return np.repeat(_stretch_to_uint8(np.asarray(image), settings)[:, :, None], 3, axis=2)
    if image.mode == "P":
        image = image.convert("RGBA")
    # Alpha is dropped, not blended: the annotations were drawn on the colours below it.
    return np.array(image.convert("RGB"))


def _stretch_to_uint8(values: np.ndarray, settings: ImagesConfig) -> np.ndarray:
    """Map deep grey values to 0..255, by percentiles since 12-bit data fills only 1/16 of 16 bits."""
    finite = np.where(np.isfinite(values), values, 0).astype(np.float32)
    if settings.deep_range == "full":
        low, high = (0, 65535) if values.dtype.kind in "iu" else (0, 1)
    else:
        low, high = np.percentile(finite, (0.1, 99.9))
    return np.clip((finite - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)


def _list_remarks(image: Image.Image, is_deep: bool) -> list[tuple[str, str]]:
    remarks = []
    if is_deep:
        remarks.append(("deep_pixels", "16-bit or float pixels, converted to 8 bits by dataset.images.deep_range"))
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # an MPO is an image with a preview after it
        remarks.append(("several_frames", f"{image.n_frames} frames, the first is used"))
    if "A" in image.getbands():
        low, high = image.getchannel("A").getextrema()
        if low != high:
            remarks.append(("alpha", "transparency is ignored: the colours below it are used"))
    return remarks


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB uint8 image, or H x W numbers (uint8 or uint16). The suffix chooses the format.

    Other processes never see an incomplete file.
    """
    with replacing(path) as partial:
        Image.fromarray(image).save(partial, format=Image.registered_extensions()[path.suffix.lower()])


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """Return the bytes of an image file.

    Args:
        image: H x W x 3, RGB, or H x W x 4, RGBA, uint8.
        suffix: .jpg (without transparency) or .png.
    """
    data = io.BytesIO()
    options = {"quality": JPEG_QUALITY} if suffix == ".jpg" else {"optimize": True}
    Image.fromarray(image).save(data, format=Image.registered_extensions()[suffix], **options)
    return data.getvalue()
