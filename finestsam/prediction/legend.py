"""The names of categories, written into the corner of an overlay where the least is hidden."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finestsam.errors import printable

# Of the letters: a share of the picture's longest side, and not below what can be read.
FONT_SHARE, MIN_FONT_PIXELS = 1 / 50, 11
# Of the picture's height and width that the legend takes at most; what has no room is counted.
MOST_HEIGHT, MOST_WIDTH = 0.4, 0.6
# Comes with matplotlib; Pillow's own font knows ASCII alone.
FONT = Path("mpl-data/fonts/ttf/DejaVuSans.ttf")
PAPER, INK = (250, 250, 250), (30, 30, 30)


def draw_legend(image: np.ndarray, entries: list[tuple[str, np.ndarray]], covered: np.ndarray) -> np.ndarray:
    """Return the picture with a name beside each colour; as it is where the picture is too small for that.

    Args:
        image: H x W x 3, uint8, RGB.
        entries: names, and their colours, 3, uint8, RGB.
        covered: H x W, bool: pixels that are better not hidden.
    """
    size = max(round(max(image.shape) * FONT_SHARE), MIN_FONT_PIXELS)
    room = int(image.shape[0] * MOST_HEIGHT / (1.3 * size) - 0.5)
    if not entries or room < min(len(entries), 2):
        return image
    if len(entries) > room:
        left = len(entries) - room + 1
        entries = entries[: room - 1] + [(f"and {left} more", np.array(PAPER, dtype=np.uint8))]
    plate = _draw_plate(entries, size, int(image.shape[1] * MOST_WIDTH))
    height, width = plate.shape[:2]
    corners = [(y, x) for x in (0, image.shape[1] - width) for y in (0, image.shape[0] - height)]
    y, x = min(corners, key=lambda corner: covered[corner[0] : corner[0] + height, corner[1] : corner[1] + width].sum())
    drawn = image.copy()
    drawn[y : y + height, x : x + width] = plate
    return drawn


def _draw_plate(entries: list[tuple[str, np.ndarray]], size: int, most_width: int) -> np.ndarray:
    """Return colours and names on paper, one below the other; a name that is too long is cut."""
    font, line, margin = _load_font(size), round(1.3 * size), size // 2
    names = [_shorten(printable(name), font, most_width - 3 * margin - size) for name, _ in entries]
    width = min(round(max(font.getlength(name) for name in names)) + 3 * margin + size, most_width)
    plate = Image.new("RGB", (width, line * len(entries) + margin), PAPER)
    draw = ImageDraw.Draw(plate)
    for row, (name, (_, colour)) in enumerate(zip(names, entries, strict=True)):
        top = margin // 2 + row * line
        draw.rectangle(
            [margin, top + (line - size) // 2, margin + size, top + (line + size) // 2], tuple(colour.tolist())
        )
        draw.text((2 * margin + size, top + line // 2), name, INK, font, anchor="lm")
    return np.asarray(plate)


def _load_font(size: int) -> ImageFont.FreeTypeFont:
    found = find_spec("matplotlib")
    path = Path(found.origin).parent / FONT if found and found.origin else FONT
    return ImageFont.truetype(path, size) if path.is_file() else ImageFont.load_default(size)


def _shorten(name: str, font: ImageFont.FreeTypeFont, most_pixels: int) -> str:
    whole = name
    while name and font.getlength(name if name == whole else f"{name}...") > most_pixels:
        name = name[:-1]
    return name if name == whole else f"{name}..."
