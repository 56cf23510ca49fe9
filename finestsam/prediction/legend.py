"""The names of categories on a strip of paper below an image, which hides nothing of it."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finestsam.errors import printable

# Of the letters: a share of the image's longest side, and not below what can be read.
FONT_SHARE, MIN_FONT_PIXELS = 1 / 50, 11
# Lines of the strip at most, and the share of its width for one name; what has no room is counted.
MOST_LINES, MOST_WIDTH = 4, 0.5
# Of the strip, so that the names below a narrow image can be read.
LEAST_WIDTH_LETTERS = 16
# Comes with matplotlib; Pillow's own font knows ASCII alone.
FONT = Path("mpl-data/fonts/ttf/DejaVuSans.ttf")
PAPER, INK = (250, 250, 250), (30, 30, 30)

Entry = tuple[str, np.ndarray]  # a name, and its colour, 3, uint8, RGB


def add_legend(image: np.ndarray, entries: list[Entry]) -> np.ndarray:
    """Return an image (H x W x 3, uint8, RGB) with a name beside each colour below it; it is higher, and not narrower.

    Without entries it is returned as it is.
    """
    if not entries:
        return image
    height, width = image.shape[:2]
    size = max(round(max(height, width) * FONT_SHARE), MIN_FONT_PIXELS)
    strip = _render_strip(entries, size, max(width, LEAST_WIDTH_LETTERS * size))
    shown = np.full((height + strip.shape[0], strip.shape[1], 3), PAPER, dtype=np.uint8)
    shown[:height, :width] = image
    shown[height:] = strip
    return shown


def _render_strip(entries: list[Entry], size: int, width: int) -> np.ndarray:
    """Return colours and names on paper, in lines from left to right; a name that is too long is cut."""
    font, line_height, margin = _load_font(size), round(1.5 * size), size // 2
    cut = [(_shorten(printable(name), font, int(MOST_WIDTH * width) - 2 * size), colour) for name, colour in entries]
    lines = _break_lines(cut, font, width, size)
    strip = Image.new("RGB", (width, line_height * len(lines) + 2 * margin), PAPER)
    pen = ImageDraw.Draw(strip)
    for row, line in enumerate(lines):
        top, left = margin + row * line_height, margin
        for name, colour in line:
            swatch = [left, top + (line_height - size) // 2, left + size, top + (line_height + size) // 2]
            pen.rectangle(swatch, tuple(colour.tolist()))
            pen.text((left + size + margin, top + line_height // 2), name, INK, font, anchor="lm")
            left += _measure_width(name, font, size)
    return np.asarray(strip)


def _break_lines(entries: list[Entry], font: ImageFont.FreeTypeFont, width: int, size: int) -> list[list[Entry]]:
    """Return entries in lines; those that have no room in the last line are counted there."""
    lines: list[list[Entry]] = [[]]
    margin = size // 2
    for place, entry in enumerate(entries):
        left = len(entries) - place
        counted = (f"and {left} more", np.array(PAPER, dtype=np.uint8))
        # The last line keeps room for the count of what comes after this entry.
        needed = [*lines[-1], entry]
        if len(lines) == MOST_LINES and left > 1:
            needed.append(counted)
        is_fitting = margin + sum(_measure_width(name, font, size) for name, _ in needed) <= width
        if is_fitting or not lines[-1]:
            lines[-1].append(entry)
        elif len(lines) < MOST_LINES:
            lines.append([entry])
        else:
            lines[-1].append(counted)
            break
    return lines


def _measure_width(name: str, font: ImageFont.FreeTypeFont, size: int) -> int:
    """Return the pixels of a colour, its name and the space behind it."""
    return 2 * size + size // 2 + round(font.getlength(name))


def _load_font(size: int) -> ImageFont.FreeTypeFont:
    found = find_spec("matplotlib")
    path = Path(found.origin).parent / FONT if found and found.origin else FONT
    return ImageFont.truetype(path, size) if path.is_file() else ImageFont.load_default(size)


def _shorten(name: str, font: ImageFont.FreeTypeFont, most_pixels: int) -> str:
    whole = name
    while name and font.getlength(name if name == whole else f"{name}...") > most_pixels:
        name = name[:-1]
    return name if name == whole else f"{name}..."
