"""Read any picture to RGB, resize its longest side, and move points and boxes between frames.

`original` is the file, upright. `input` is the picture with its longest side resized to the model's size, before the
padding at the right and bottom.
"""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finestsam.errors import Defect

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
# A file of a few kilobytes can claim billions of pixels; the claim is read before anything is decoded.
MAX_IMAGE_PIXELS = 256_000_000


def read_image(path: Path, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a picture of any common kind, upright.

    Args:
        expected_size: (height, width) that the annotations were drawn on. Labelling tools disagree about the EXIF
            orientation: where the stored size is the expected one and the upright size is not, the picture stays as
            it is stored.

    Returns:
        H x W x 3, uint8, RGB.

    Raises:
        Defect: the file is missing, no picture, cut short, too large, or of another size than expected.
    """
    data = _read_bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise Defect("too_large", f"{picture.width} x {picture.height} pixels, at most {MAX_IMAGE_PIXELS}")
            picture.load()
            return _to_rgb(_turn_upright(picture, expected_size))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise Defect("not_an_image", f"not an image that can be read ({error.__class__.__name__})") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise Defect("broken_image", f"truncated or broken image ({error})") from None


def read_image_size(path: Path) -> tuple[int, int]:
    """Return the upright (height, width) from the file's head, without decoding the picture."""
    try:
        with Image.open(path) as picture:
            height, width = picture.height, picture.width
            return (width, height) if picture.getexif().get(0x0112, 1) >= 5 else (height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Defect("not_an_image", f"not an image that can be read ({error.__class__.__name__})") from None


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():  # False for folders, pipes and devices too, which must not be opened
        raise Defect("missing_file", "no such file" if not path.exists() else "not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Defect("unreadable", f"cannot be read: {error.strerror}") from None


def _turn_upright(picture: Image.Image, expected_size: tuple[int, int] | None) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    if expected_size is None or (upright.height, upright.width) == expected_size:
        return upright
    if (picture.height, picture.width) == expected_size:
        return picture
    raise Defect(
        "size_mismatch",
        f"size mismatch: the annotations say {expected_size[1]} x {expected_size[0]}, "
        f"the file has {upright.width} x {upright.height}",
    )


def _to_rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):
        return np.repeat(_stretch_to_uint8(np.asarray(picture))[:, :, None], 3, axis=2)
    if picture.mode == "P":
        picture = picture.convert("RGBA")
    # Alpha is dropped, not blended: what lies under it is what the labels were drawn on.
    return np.array(picture.convert("RGB"))


def _stretch_to_uint8(values: np.ndarray) -> np.ndarray:
    """Map deep grey values to 0..255 between their 0.1 and 99.9 percentiles: 12-bit data fills only 1/16 of 16 bits."""
    finite = np.where(np.isfinite(values), values, 0).astype(np.float32)
    low, high = np.percentile(finite, (0.1, 99.9))
    return np.clip((finite - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)


def compute_input_size(original_size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Return (height, width) with the longest side at `image_size`, rounded as SAM rounds."""
    scale = image_size / max(original_size)
    height, width = (int(side * scale + 0.5) for side in original_size)
    if min(height, width) < 1:
        raise Defect("too_thin", f"{original_size[1]} x {original_size[0]} pixels shrink to nothing at {image_size}")
    return height, width


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize with the antialiased bilinear filter that SAM was trained with (Pillow's)."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def scale_points(points: np.ndarray, from_size: tuple[int, int], to_size: tuple[int, int]) -> np.ndarray:
    """Move points (... x 2, XY) from a frame of one size to a frame of another, as SAM's own transform does."""
    return points * np.array([to_size[1] / from_size[1], to_size[0] / from_size[0]])


def scale_boxes(boxes: np.ndarray, from_size: tuple[int, int], to_size: tuple[int, int]) -> np.ndarray:
    """Move boxes (N x 4, XYXY) from a frame of one size to a frame of another."""
    return scale_points(boxes.reshape(-1, 2, 2), from_size, to_size).reshape(-1, 4)


def shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the share of each target pixel that the mask covers, float32 in [0, 1], at (height, width) `size`."""
    shrinks = size[0] <= mask.shape[0] and size[1] <= mask.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(mask.astype(np.float32), size[::-1], interpolation=interpolation)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of `sigma` pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB uint8 picture; the suffix names the format. A reader never meets half a file."""
    partial = path.with_name(f".{path.name}.part")
    try:
        Image.fromarray(image).save(partial, format=Image.registered_extensions()[path.suffix.lower()])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def build_point_grid(points_per_side: int) -> np.ndarray:
    """Return the generator's grid, K x 2, XY, in shares of the picture's width and height, row by row."""
    places = (np.arange(points_per_side) + 0.5) / points_per_side
    return np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)


def use_one_thread() -> None:
    """Keep OpenCV to one thread in this process: in worker processes its threads would only be in each other's way."""
    cv2.setNumThreads(1)
