"""Render a contact sheet: images with their masks and the prompts that training would use."""

import hashlib
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finestsam.config import DatasetConfig
from finestsam.data.prompts import (
    POSITIVE,
    PointCounts,
    build_image_grid,
    cut_out,
    find_grid_points_inside,
    sample_points,
)
from finestsam.errors import Defect, printable
from finestsam.images.files import read_image
from finestsam.images.frames import compute_input_size, resize_image, shrink_mask
from finestsam.masks import decode_rle
from finestsam.records import Annotation, Record

TILE_PIXELS = 384  # longest side of an image; smaller on a sheet of many images
CAPTION_PIXELS, LEGEND_PIXELS, MARGIN_PIXELS = 40, 34, 10
# 30 megapixels take 90 MB.
MAX_SHEET_PIXELS = 30_000_000
MAX_OBJECTS = 400  # rendered in one image
PAPER, INK, GREY = (250, 250, 250), (30, 30, 30), (150, 150, 150)
INSIDE, OUTSIDE = (40, 230, 90), (240, 40, 40)
OPACITY = 0.45
# An object that covers a larger share of the image gets only an outline, so that the image stays visible.
MOST_TINTED_SHARE = 0.25
# Steps of the golden ratio around the colour circle keep each hue far from all hues before.
GOLDEN_TURN = 0.618034


def render_contact_sheet(records: list[Record], count: int, dataset: DatasetConfig, points_per_side: int) -> np.ndarray:
    """Return a sheet of randomly chosen images with masks and prompts, H x W x 3, uint8, RGB.

    Args:
        count: of images, at most.
        points_per_side: of the generator's grid.
    """
    shown = sorted(records, key=_rank)[:count]
    columns = max(1, round(math.sqrt(len(shown) * 1.5)))
    rows = math.ceil(len(shown) / columns)
    side = min(TILE_PIXELS, int(math.sqrt(MAX_SHEET_PIXELS / (rows * columns))) - CAPTION_PIXELS - MARGIN_PIXELS)
    tiles = [_render_tile(record, dataset, points_per_side, side) for record in shown]
    heights = [max(tile.height for tile in tiles[row * columns : (row + 1) * columns]) for row in range(rows)]
    width = max(columns * (side + MARGIN_PIXELS) + MARGIN_PIXELS, 560)
    sheet = Image.new("RGB", (width, LEGEND_PIXELS + sum(heights) + MARGIN_PIXELS * (rows + 1)), PAPER)
    _render_legend(sheet, dataset)
    top = LEGEND_PIXELS + MARGIN_PIXELS
    for row in range(rows):
        for column, tile in enumerate(tiles[row * columns : (row + 1) * columns]):
            sheet.paste(tile, (MARGIN_PIXELS + column * (side + MARGIN_PIXELS), top))
        top += heights[row] + MARGIN_PIXELS
    return np.asarray(sheet)


def sample_prompts(
    record: Record, annotation: Annotation, dataset: DatasetConfig, points_per_side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the points that prompt for an object, P x 2, XY, pixels of the image, and their labels."""
    cutout = cut_out(decode_rle(record.rle(annotation)), annotation.box)
    generator = np.random.default_rng([dataset.seed, annotation.id & 0xFFFFFFFF])
    inside = None
    if dataset.snap_to_grid:
        # With scale 1 points are less than a pixel away from those of the model's input size.
        inside = find_grid_points_inside(cutout, build_image_grid(points_per_side, record.size), scale=1.0)
    counts = PointCounts(dataset.positive_points, dataset.negative_points, dataset.use_center, inside)
    points, labels = sample_points(cutout, counts, generator)
    return points[labels >= 0], labels[labels >= 0]


def _rank(record: Record) -> str:
    """Return a hash of the file name. Sorting by it shuffles images in the same way on every machine."""
    return hashlib.blake2b(record.file_name.encode("utf-8", "surrogateescape")).hexdigest()


def _render_tile(record: Record, dataset: DatasetConfig, points_per_side: int, side: int) -> Image.Image:
    try:
        image = read_image(record.path, record.size, dataset.images)
        size = compute_input_size(record.size, side)
    except Defect as defect:
        tile = Image.new("RGB", (side, side + CAPTION_PIXELS), GREY)
        ImageDraw.Draw(tile).text((10, side // 2), _shorten(printable(defect.message), side, 13), INK, _load_font(13))
        _render_caption(tile, record, side, 0)
        return tile
    # Large objects first, so that smaller objects on top of them stay visible.
    annotations = sorted(record.annotations, key=lambda found: -found.area)[:MAX_OBJECTS]
    canvas = resize_image(image, size).astype(np.float32)
    for counts in record.crowds:
        _render_crowd(canvas, shrink_mask(decode_rle({"size": list(record.size), "counts": counts}), size) > 0.5)
    for number, annotation in enumerate(annotations):
        cover = shrink_mask(decode_rle(record.rle(annotation)), size)
        is_tinted = annotation.area <= MOST_TINTED_SHARE * record.size[0] * record.size[1]
        _render_mask(canvas, cover, np.array(_choose_colour(number), dtype=np.float32), is_tinted)
    tile = Image.new("RGB", (side, size[0] + CAPTION_PIXELS), PAPER)
    tile.paste(Image.fromarray(canvas.astype(np.uint8)), (0, 0))
    pen = ImageDraw.Draw(tile)
    scale = size[1] / record.size[1]
    for annotation in annotations:
        _render_object(pen, record, annotation, dataset, points_per_side, scale)
    _render_caption(tile, record, size[0], len(annotations))
    return tile


def _render_mask(canvas: np.ndarray, cover: np.ndarray, colour: np.ndarray, is_tinted: bool) -> None:
    """Render the outline of a mask (its pixels next to a pixel outside) and tint the pixels inside."""
    inside = cover >= 0.5 if cover.max() >= 0.5 else cover > 0  # an object smaller than a pixel stays visible
    framed = np.pad(inside, 1)
    core = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    if is_tinted:
        canvas[inside] += OPACITY * (colour - canvas[inside])
    canvas[inside & ~core] = colour


def _render_crowd(canvas: np.ndarray, inside: np.ndarray) -> None:
    ys, xs = np.nonzero(inside)
    striped = (xs + ys) % 8 < 3
    canvas[ys[striped], xs[striped]] = 0.5 * canvas[ys[striped], xs[striped]] + 0.5 * np.array(GREY)


def _render_object(
    pen: ImageDraw.ImageDraw,
    record: Record,
    annotation: Annotation,
    dataset: DatasetConfig,
    points_per_side: int,
    scale: float,
) -> None:
    points, labels = sample_prompts(record, annotation, dataset, points_per_side)
    for (x, y), label in zip((points + 0.5) * scale, labels, strict=True):
        if label == POSITIVE:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=INSIDE, outline=INK)
        else:
            pen.line((x - 3, y - 3, x + 3, y + 3), fill=OUTSIDE, width=2)
            pen.line((x - 3, y + 3, x + 3, y - 3), fill=OUTSIDE, width=2)


def _render_caption(tile: Image.Image, record: Record, top: int, rendered: int) -> None:
    pen = ImageDraw.Draw(tile)
    count = len(record.annotations)
    facts = f"{record.size[1]} x {record.size[0]}, {count} object{'' if count == 1 else 's'}"
    if 0 < rendered < count:
        facts += f", only the largest {rendered} shown"
    pen.text((2, top + 3), _shorten(printable(record.file_name), tile.width, 13), INK, _load_font(13))
    pen.text((2, top + 20), facts, GREY if top else INK, _load_font(13))


def _render_legend(sheet: Image.Image, dataset: DatasetConfig) -> None:
    if dataset.snap_to_grid:
        prompts = "points of the generator's grid inside the object (its centre where none is)"
    else:
        prompts = "pixels inside the object"
    if dataset.use_center:
        prompts += ", the first the one nearest to its centre" if dataset.snap_to_grid else ", the first its centre"
    negative = "; red: points outside" if dataset.negative_points else ""
    sheet_pen = ImageDraw.Draw(sheet)
    text = f"green: {prompts}{negative}; hatched: crowd regions, left out"
    sheet_pen.text((MARGIN_PIXELS, 10), _shorten(text, sheet.width - 2 * MARGIN_PIXELS, 15), INK, _load_font(15))


def _shorten(text: str, width: int, font_size: int) -> str:
    """Replace the middle of a text by ... if the text is wider than `width` pixels."""
    letters = int(width / (0.55 * font_size))
    if len(text) <= letters:
        return text
    return f"{text[: letters // 2 - 1]}...{text[-(letters // 2 - 2) :]}"


def _load_font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _choose_colour(number: int) -> tuple[int, int, int]:
    hue = int(255 * (number * GOLDEN_TURN % 1))
    return Image.new("HSV", (1, 1), (hue, 215, 255 if number % 2 else 200)).convert("RGB").getpixel((0, 0))
