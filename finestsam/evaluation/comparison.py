"""`comparison.png`: a row for each image, with the image, its annotations, the baseline's masks and this model's."""

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
# From left to right: the baseline before this model.
COLUMNS = (SAM_THRESHOLDS, BASELINE, OURS)


def render_comparison(evaluation: Evaluation, config: Config) -> np.ndarray | None:
    """Return a few images, from our model's best to its worst, H x W x 3, uint8, RGB.

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
            _overlay(image, truth, evaluation.ours.colour_truth(index), config),
        ),
    ]
    for title in COLUMNS:
        measured = evaluation.measurements.get(title)
        if measured is not None and measured.found is not None:
            shown = _overlay(image, measured.found[index].rles, measured.colour_found(index), config)
            panels.append(_render_panel(title, describe_found(measured, index), shown))
    return np.concatenate(panels, axis=1)


def describe_found(measured: Measurement, index: int) -> str:
    """Return the number of masks in an image, and of the objects that they find."""
    counts = measured.counts[index]
    return f"{name_count(counts.mask_count, 'mask')}, finds {counts.objects['found']} of {counts.object_count}"


def _overlay(image: np.ndarray, rles: list[dict], colours: np.ndarray | None, config: Config) -> np.ndarray:
    size = image.shape[:2]
    return render_overlay(image, [shrink_rle(rle, size) for rle in rles], config.opacity, colours)


def _render_panel(title: str, caption: str, shown: np.ndarray) -> np.ndarray:
    """Return an image with its title above and its caption below; all panels have the same width."""
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
