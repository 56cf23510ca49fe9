"""Augmented variants of a training image: cropped, rotated, mirrored, recoloured.

A `View` describes one variant. It is sampled from a random generator and applied to the image and to its masks.
Nothing is interpolated: every pixel of a variant, and of its masks, is a pixel of the plain image. The scale applies
only when the image is resized for the model. The pixels of the variant are its `original` frame.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from finestsam.config import AugmentConfig
from finestsam.masks import box_to_rle, decode_rle, encode_mask, rle_box, shared_area
from finestsam.records import MIN_AREA_PIXELS, Annotation, Record

# A crop's aspect ratio differs from the image's by at most this factor.
MAX_ASPECT_CHANGE = 4 / 3
# Share of the images that are rotated where any orientation is right. With mirroring, all eight orientations are
# equally likely.
TURNED_SHARE = 0.75
# Largest shift of the hue, in turns of the colour circle, as a share of the largest change of saturation.
HUE_SHARE = 0.2
# An object with a smaller share of its pixels in the crop is left out: the rest is too little to recognise it.
MIN_REMAINING_SHARE = 0.1


@dataclass(frozen=True)
class View:
    """One variant: a window of the plain image, rotated, then mirrored, then recoloured."""

    window: tuple[int, int, int, int]  # x, y, width, height, pixels of the plain image
    quarter_turns: int = 0  # counter-clockwise
    is_mirrored: bool = False  # left to right
    brightness: float = 1.0  # factor
    contrast: float = 1.0  # factor
    saturation: float = 1.0  # factor
    hue: float = 0.0  # shift, turns of the colour circle

    @property
    def size(self) -> tuple[int, int]:
        _, _, width, height = self.window
        return (width, height) if self.quarter_turns % 2 else (height, width)

    def leaves_pixels(self, original_size: tuple[int, int]) -> bool:
        """Return whether every pixel of an image of (height, width) `original_size` stays at its position."""
        window = (0, 0, original_size[1], original_size[0])
        return self.window == window and not (self.quarter_turns or self.is_mirrored)

    def meets(self, box: list[int]) -> bool:
        """Return whether the window overlaps a box, XYWH, of the plain image."""
        x, y, width, height = self.window
        left, top, box_width, box_height = box
        return left < x + width and x < left + box_width and top < y + height and y < top + box_height


@dataclass
class ShownObject:
    """One object in a view."""

    annotation_id: int
    mask: np.ndarray  # H x W, bool, the view's pixels
    rle: dict  # of `mask`
    box: list[int]  # of `mask`, XYWH


def choose_variant(augment: AugmentConfig, epoch: int) -> int:
    """Return the number of the variant for an epoch, from 1; 0: the plain images."""
    if not augment.is_active:
        return 0
    return 1 + (epoch % augment.variants if augment.variants else epoch)


def show_all(record: Record) -> tuple[View, np.ndarray]:
    """Return the view of the plain image, and the indices of all objects in `record.annotations`."""
    return View((0, 0, record.size[1], record.size[0])), np.arange(len(record.annotations))


def choose_view(
    record: Record, augment: AugmentConfig, image_size: int, generator: np.random.Generator
) -> tuple[View, np.ndarray]:
    """Sample the view of a variant. If it would show no object, the view shows the whole image instead.

    Returns:
        The view, and the indices in `record.annotations` of the shown objects, ascending.
    """
    view = sample_view(augment, record.size, generator)
    indices = find_shown(record, view, image_size)
    if len(indices) == 0:
        whole, indices = show_all(record)
        view = replace(view, window=whole.window)
    return view, indices


def sample_view(augment: AugmentConfig, size: tuple[int, int], generator: np.random.Generator) -> View:
    """Sample a view of an image of (height, width) `size`."""
    # Always 11 numbers: turning one augmentation on does not change the others.
    mirror, turn, angle, share, aspect, left, top, *colours = generator.random(11).tolist()
    brightness, contrast, saturation, hue = (2 * number - 1 for number in colours)
    return View(
        window=_choose_window(size, augment.crop_min + (1 - augment.crop_min) * share, (aspect, left, top)),
        quarter_turns=1 + int(3 * angle) if augment.orientations == "all" and turn < TURNED_SHARE else 0,
        is_mirrored=augment.orientations != "upright" and mirror < 0.5,
        brightness=1 + augment.light * brightness,
        contrast=1 + augment.light * contrast,
        saturation=1 + augment.colour * saturation,
        hue=HUE_SHARE * augment.colour * hue,
    )


def _choose_window(
    size: tuple[int, int], share: float, numbers: tuple[float, float, float]
) -> tuple[int, int, int, int]:
    """Return x, y, width, height of a window.

    Args:
        share: of the image's area.
        numbers: random numbers in [0, 1) for the aspect ratio, the left and the top side.
    """
    aspect_number, left, top = numbers
    height, width = size
    # A crop of nearly the whole image has little room for another aspect ratio.
    limit = min(MAX_ASPECT_CHANGE, 1 / share)
    aspect = limit ** (2 * aspect_number - 1)
    window_width = max(1, round(width * math.sqrt(share * aspect)))
    window_height = max(1, round(height * math.sqrt(share / aspect)))
    x, y = int(left * (width - window_width + 1)), int(top * (height - window_height + 1))
    return x, y, window_width, window_height


def find_shown(record: Record, view: View, image_size: int) -> np.ndarray:
    """Return the indices in `record.annotations` of the objects that a view shows large enough, ascending."""
    pixel_scale = image_size / max(view.size)
    if min(view.size) * pixel_scale < 0.5:  # too thin: the shorter side would round to 0
        return np.arange(0)
    shown, window = [], box_to_rle(list(view.window), record.size)
    for index, annotation in enumerate(record.annotations):
        area = shared_area(record.rle(annotation), window) if view.meets(annotation.box) else 0
        if area >= MIN_REMAINING_SHARE * annotation.area and area * pixel_scale**2 >= MIN_AREA_PIXELS:
            shown.append(index)
    return np.array(shown, dtype=np.int64)


def show_image(image: np.ndarray, view: View) -> np.ndarray:
    """Return an image (H x W x 3) in a view, without the change of colours."""
    if view.leaves_pixels(image.shape[:2]):
        return image
    shown = show(torch.from_numpy(image).permute(2, 0, 1), view)
    return np.ascontiguousarray(shown.permute(1, 2, 0).numpy())


def show_object(record: Record, annotation: Annotation, view: View) -> ShownObject:
    """Return an object in a view that shows at least a part of it."""
    rle, box = record.rle(annotation), annotation.box
    mask = decode_rle(rle)
    if not view.leaves_pixels(record.size):
        mask = show(torch.from_numpy(mask), view).numpy()
        rle = encode_mask(mask)
        box = rle_box(rle)
    return ShownObject(annotation.id, mask, rle, box)


def show(pixels: Tensor, view: View) -> Tensor:
    """Return the view's window of ... x H x W pixels, rotated and mirrored."""
    x, y, width, height = view.window
    shown = torch.rot90(F.crop(pixels, y, x, height, width), view.quarter_turns, dims=(-2, -1))
    return F.horizontal_flip(shown) if view.is_mirrored else shown


def recolour(image: Tensor, view: View) -> Tensor:
    """Return an image (3 x H x W, uint8, RGB) in the view's colours."""
    for change, amount, neutral in (
        (F.adjust_brightness, view.brightness, 1),
        (F.adjust_contrast, view.contrast, 1),
        (F.adjust_saturation, view.saturation, 1),
        (F.adjust_hue, view.hue, 0),
    ):
        if amount != neutral:  # adjust_hue takes 0.2 s at 1024 pixels
            image = change(image, amount)
    return image
