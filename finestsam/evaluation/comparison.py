"""`comparison.png`: pictures in rows, and in columns the picture, its labels, the model before and this one."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finestsam.config import Config
from finestsam.errors import Defect, printable
from finestsam.evaluation.coco_scores import Detections
from finestsam.evaluation.story import Story
from finestsam.images import compute_input_size, read_image, resize_image
from finestsam.masks import decode_rle, encode_mask
from finestsam.prediction.overlay import draw_overlay

COMPARISON_NAME = "comparison.png"
PICTURES_SHOWN = 3
PANEL_PIXELS, CAPTION_PIXELS, MARGIN_PIXELS, FONT_PIXELS = 384, 24, 8, 14
PAPER, INK = (250, 250, 250), (30, 30, 30)


def draw_comparison(story: Story, config: Config) -> np.ndarray | None:
    """Return a few pictures from where ours does best to where it does worst, H x W x 3, uint8, RGB.

    Returns:
        None where the generator did not run, or no picture with objects can be read.
    """
    places = list(story.ratings)[::-1]
    chosen = np.unique(np.linspace(0, len(places) - 1, PICTURES_SHOWN).round().astype(int)) if places else []
    rows = [row for row in (_draw_row(story, places[rank], config) for rank in chosen) if row is not None]
    return np.concatenate(rows) if rows else None


def _draw_row(story: Story, place: int, config: Config) -> np.ndarray | None:
    record = story.ours.records[place]
    try:
        pixels = read_image(record.path, record.size, config.dataset.images)
    except Defect:
        return None
    size = compute_input_size(record.size, PANEL_PIXELS)
    image = resize_image(pixels, size)
    truth = [record.rle(annotation) for annotation in record.annotations]
    panels = [(record.file_name, None, None), (f"labelled: {len(truth)}", truth, story.ours.colour_truth(place))]
    if story.theirs and story.theirs.found is not None:
        theirs = story.theirs.found[place]
        panels.append((_count("before", theirs), theirs.rles, story.theirs.colour_found(place)))
    rating = story.ratings[place]
    caption = f"{_count('this model', story.ours.found[place])}, finds {rating.recall:.0%}"
    panels.append((caption, story.ours.found[place].rles, story.ours.colour_found(place)))
    row = [_draw_panel(image, caption, rles, config.opacity, colours) for caption, rles, colours in panels]
    return np.concatenate(row, axis=1)


def _count(name: str, found: Detections) -> str:
    return f"{name}: {len(found.rles)} masks"


def _draw_panel(
    image: np.ndarray, caption: str, rles: list[dict] | None, opacity: float, colours: np.ndarray | None
) -> np.ndarray:
    """Return a picture with masks in a square of paper, its caption below."""
    size = image.shape[:2]
    shown = image if rles is None else draw_overlay(image, [shrink_rle(rle, size) for rle in rles], opacity, colours)
    side = PANEL_PIXELS + MARGIN_PIXELS
    panel = Image.new("RGB", (side, side + CAPTION_PIXELS), PAPER)
    panel.paste(Image.fromarray(shown), ((side - size[1]) // 2, (side - size[0]) // 2))
    letters = int(PANEL_PIXELS / (0.55 * FONT_PIXELS))
    font = ImageFont.load_default(FONT_PIXELS)
    ImageDraw.Draw(panel).text((MARGIN_PIXELS, side), printable(caption)[:letters], INK, font)
    return np.asarray(panel)


def shrink_rle(rle: dict, size: tuple[int, int]) -> dict:
    """Return a mask at another size (height, width), nearest pixels."""
    if tuple(rle["size"]) == tuple(size):
        return rle
    mask = decode_rle(rle)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape, strict=True))
    return encode_mask(mask[np.ix_(rows, columns)])
