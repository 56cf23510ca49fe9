"""`comparison.png`: images in rows, and in columns the image, its annotations, the baseline and this model."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finestsam.config import Config
from finestsam.errors import Defect, name_count, printable
from finestsam.evaluation.measurement import Measurement
from finestsam.evaluation.result import BASELINE, OURS, SAM_THRESHOLDS, Evaluation
from finestsam.images.files import read_image
from finestsam.images.frames import compute_input_size, resize_image
from finestsam.masks import decode_rle, encode_mask
from finestsam.prediction.overlay import render_overlay

COMPARISON_NAME = "comparison.png"
IMAGES_SHOWN = 3
PANEL_PIXELS, LINE_PIXELS, MARGIN_PIXELS, FONT_PIXELS = 384, 24, 8, 14
PAPER, INK, GREY = (250, 250, 250), (30, 30, 30), (110, 110, 110)
# From left to right, so that what was before stands left of what is now.
COLUMNS = (SAM_THRESHOLDS, BASELINE, OURS)


def render_comparison(evaluation: Evaluation, config: Config) -> np.ndarray | None:
    """Return a few images from where ours does best to where it does worst, H x W x 3, uint8, RGB.

    Returns:
        None where the generator did not run, or no image with objects can be read.
    """
    indices = list(evaluation.ratings)[::-1]
    chosen = np.unique(np.linspace(0, len(indices) - 1, IMAGES_SHOWN).round().astype(int)) if indices else []
    rows = [row for row in (_render_row(evaluation, indices[rank], config) for rank in chosen) if row is not None]
    return np.concatenate(rows) if rows else None


def _render_row(evaluation: Evaluation, index: int, config: Config) -> np.ndarray | None:
    record = evaluation.ours.records[index]
    try:
        pixels = read_image(record.path, record.size, config.dataset.images)
    except Defect:
        return None
    size = compute_input_size(record.size, PANEL_PIXELS)
    image = resize_image(pixels, size)
    truth = [record.rle(annotation) for annotation in record.annotations]
    panels = [
        _render_panel("image", record.file_name, image),
        _render_panel(
            "annotated",
            name_count(len(truth), "object"),
            _lay(image, truth, evaluation.ours.colour_truth(index), config),
        ),
    ]
    for title in COLUMNS:
        one = evaluation.measurements.get(title)
        if one is not None and one.found is not None:
            shown = _lay(image, one.found[index].rles, one.colour_found(index), config)
            panels.append(_render_panel(title, describe_found(one, index), shown))
    return np.concatenate(panels, axis=1)


def describe_found(measured: Measurement, index: int) -> str:
    """Return how many masks there are in an image, and how many of its objects they find."""
    counts = measured.counts[index]
    return f"{name_count(counts.mask_count, 'mask')}, finds {counts.objects['found']} of {counts.object_count}"


def _lay(image: np.ndarray, rles: list[dict], colours: np.ndarray | None, config: Config) -> np.ndarray:
    size = image.shape[:2]
    return render_overlay(image, [shrink_rle(rle, size) for rle in rles], config.opacity, colours)


def _render_panel(title: str, caption: str, shown: np.ndarray) -> np.ndarray:
    """Return an image on paper, its title above and its caption below; panels are of one width."""
    height, width = shown.shape[:2]
    side = PANEL_PIXELS + MARGIN_PIXELS
    panel = Image.new("RGB", (side, height + MARGIN_PIXELS + 2 * LINE_PIXELS), PAPER)
    panel.paste(Image.fromarray(shown), ((side - width) // 2, LINE_PIXELS + MARGIN_PIXELS // 2))
    letters = int(PANEL_PIXELS / (0.55 * FONT_PIXELS))
    font, pen = ImageFont.load_default(FONT_PIXELS), ImageDraw.Draw(panel)
    pen.text((MARGIN_PIXELS, MARGIN_PIXELS // 2), title, INK, font)
    pen.text((MARGIN_PIXELS, height + MARGIN_PIXELS + LINE_PIXELS), printable(caption)[:letters], GREY, font)
    return np.asarray(panel)


def shrink_rle(rle: dict, size: tuple[int, int]) -> dict:
    """Return a mask at another size (height, width), nearest pixels."""
    if tuple(rle["size"]) == tuple(size):
        return rle
    mask = decode_rle(rle)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape, strict=True))
    return encode_mask(mask[np.ix_(rows, columns)])
