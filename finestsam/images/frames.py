"""Move images, points and boxes between frames; build grids of points and crops.

`original` is the file, upright. `input` is the image with its longest side resized to the model's size, before the
padding at the right and bottom.
"""

import math

import cv2
import numpy as np
from PIL import Image

from finestsam.errors import Defect


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
    """Return a mask resized to (height, width) `size`: the covered share of each pixel, float32 in [0, 1]."""
    shrinks = size[0] <= mask.shape[0] and size[1] <= mask.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(mask.astype(np.float32), size[::-1], interpolation=interpolation)


def enlarge(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarge an image or a map to (height, width) `size`, bicubic."""
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of `sigma` pixels."""
    return cv2.GaussianBlur(image, (0, 0), sigma)


def build_point_grid(points_per_side: int) -> np.ndarray:
    """Return the generator's grid, K x 2, XY, in shares of the image's width and height, row by row."""
    centres = (np.arange(points_per_side) + 0.5) / points_per_side
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def build_crop_boxes(size: tuple[int, int], layer_count: int, overlap_ratio: float) -> list[list[int]]:
    """Return the box of the whole image, then the overlapping crops of each layer (4^n in layer n), XYXY pixels.

    Source: `generate_crop_boxes` in segment_anything's utils/amg.py.

    Args:
        size: (height, width) of the image.
        overlap_ratio: overlap of crops in layer 1, share of the image's short side; halved in each further layer.
    """
    height, width = size
    boxes = [[0, 0, width, height]]
    for layer in range(1, layer_count + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        crop_width, crop_height = (int(math.ceil((overlap * (count - 1) + side) / count)) for side in (width, height))
        for left in range(count):
            for top in range(count):
                x0, y0 = int((crop_width - overlap) * left), int((crop_height - overlap) * top)
                boxes.append([x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)])
    return boxes
