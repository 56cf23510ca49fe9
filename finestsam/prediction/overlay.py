"""Render masks over an image, each in a colour of its own or of its category."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finestsam.errors import printable
from finestsam.masks import decode_rle, rle_area, rle_box

# Hues a golden angle apart at three lightnesses (OKLCH), so that colours near in the list are far apart to the eye.
PALETTE = np.frombuffer(
    bytes.fromhex(
        "ff7362 0688ed bec90a ee6bd3 0a999d ffa755 9a96fe 01a235 ff9dae 0bb3ee a08405 "
        "e39efe 0fbfa6 de5206 9dbdff 88b708 d7449a 0ad5f0 dc9305 9464ee 09e090"
    ),
    dtype=np.uint8,
).reshape(-1, 3)
# Factor and addend of each round through the palette: the colours themselves, darker, paler, darkest.
CLASS_SHADES = np.array([(1, 0), (0.65, 0), (0.5, 127), (0.4, 0)])
OUTLINE_SHADE = 0.35  # of the mask's own colour; separates neighbours of similar colours
OUTLINE_WIDTH = 1 / 900  # of the image's longest side


def render_overlay(
    image: np.ndarray, rles: list[dict], opacity: float, colours: np.ndarray | None = None
) -> np.ndarray:
    """Return the image in its own size with masks and their outlines over it, small masks above large ones.

    Args:
        image: H x W x 3, uint8, RGB.
        rles: K masks of the same H x W.
        opacity: 0 leaves the image as it is, 1 hides it under the masks.
        colours: of the masks, K x 3, uint8, RGB; None: chosen so that neighbours differ.
    """
    rles, boxes, colours = _sort_masks(rles, colours)
    filled = image.copy()
    outlines = []  # rendered after all masks are filled, so that no mask hides the outline of the one below
    for rle, (x, y, width, height), colour in zip(rles, boxes.tolist(), colours, strict=True):
        mask = decode_rle(rle)[y : y + height, x : x + width]
        filled[y : y + height, x : x + width][mask] = colour
        outlines.append(_trace(mask, (x, y)))
    blended = _blend(image, filled, opacity)
    outlined = blended.copy()
    for contours, colour in zip(outlines, colours, strict=True):
        shade = (colour * OUTLINE_SHADE).tolist()
        cv2.polylines(outlined, contours, True, shade, _choose_thickness(image), cv2.LINE_AA)
    return _blend(blended, outlined, opacity**0.5)  # thin lines need more opacity to be seen


def render_named_overlay(
    image: np.ndarray, rles: list[dict], classes: np.ndarray, names: Sequence[str], opacity: float
) -> np.ndarray:
    """Return `render_overlay` with a colour for each category, and a legend of the categories in the image below it.

    Args:
        classes: of the masks, K, counted from 1.
        names: of the classes 1, 2, ...
    """
    colours = colour_classes(len(names) + 1)
    overlay = render_overlay(image, rles, opacity, colours[classes])
    if opacity == 0:
        return overlay
    return add_legend(overlay, [(names[number - 1], colours[number]) for number in np.unique(classes)])


def _sort_masks(rles: list[dict], colours: np.ndarray | None) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """Return the masks, largest first, with their boxes (XYWH) and colours."""
    order = sorted(range(len(rles)), key=lambda index: rle_area(rles[index]), reverse=True)
    rles = [rles[index] for index in order]
    boxes = np.array([rle_box(rle) for rle in rles], dtype=np.int64).reshape(-1, 4)
    return rles, boxes, PALETTE[choose_colours(boxes)] if colours is None else colours[order]


def render_classes(image: np.ndarray, classes: np.ndarray, opacity: float) -> np.ndarray:
    """Return the image with each class but 0, the background, as a colour with outlines over it.

    Args:
        image: H x W x 3, uint8, RGB.
        classes: H x W, whole numbers.
    """
    colours = colour_classes(int(classes.max(initial=0)) + 1)
    filled = np.where((classes > 0)[..., None], _blend(image, colours[classes], opacity), image)
    outlined = filled.copy()
    for number in np.unique(classes[classes > 0]):
        shade = (colours[number] * OUTLINE_SHADE).tolist()
        contours = _trace(classes == number, (0, 0))
        cv2.polylines(outlined, contours, True, shade, _choose_thickness(image), cv2.LINE_AA)
    return _blend(filled, outlined, opacity**0.5)


def colour_classes(count: int) -> np.ndarray:
    """Return the colours of classes 0, 1, ..., count x 3, uint8, RGB; they repeat from class 85 on."""
    turns, indices = np.divmod(np.arange(count) - 1, len(PALETTE))
    factors, addends = CLASS_SHADES[turns % len(CLASS_SHADES)].T[..., None]
    return (PALETTE[indices] * factors + addends).astype(np.uint8)


def render_layer(
    size: tuple[int, int], rles: list[dict], opacity: float, colours: np.ndarray | None = None
) -> np.ndarray:
    """Return masks and their outlines on a transparent layer, H x W x 4, uint8, RGBA.

    Args:
        size: (height, width) of the image.
        rles: masks of that size.
        colours: as of `render_overlay`.
    """
    shown, boxes, colours = _sort_masks(rles, colours)
    layer = np.zeros((*size, 4), dtype=np.uint8)
    outlines = []
    for rle, (x, y, width, height), colour in zip(shown, boxes.tolist(), colours, strict=True):
        mask = decode_rle(rle)[y : y + height, x : x + width]
        layer[y : y + height, x : x + width][mask] = [*colour, round(255 * opacity)]
        outlines.append((_trace(mask, (x, y)), [*colour.tolist(), 255]))
    thickness = max(round(max(size) * OUTLINE_WIDTH), 1)
    for contours, colour in outlines:
        cv2.polylines(layer, contours, isClosed=True, color=colour, thickness=thickness)
    return layer


def choose_colours(boxes_xywh: np.ndarray) -> np.ndarray:
    """Return an index into PALETTE for each mask, the same from run to run.

    The position of a mask decides its colour, so that the colour stays when other masks appear or disappear. Where an
    earlier mask with a touching box has that colour, the next colour is taken.
    """
    first, behind = boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    # Two large primes scatter indices that are near each other over the whole palette.
    indices = (first + behind) // 2 @ np.array([73_856_093, 19_349_663]) % len(PALETTE)
    chosen = np.zeros(len(boxes_xywh), dtype=np.int64)
    for i, index in enumerate(indices):
        touches = ((first[:i] <= behind[i]) & (first[i] <= behind[:i])).all(axis=1)
        uses = np.bincount(chosen[:i][touches], minlength=len(PALETTE))
        preferred = (index + np.arange(len(PALETTE))) % len(PALETTE)
        chosen[i] = preferred[np.argmin(uses[preferred])]
    return chosen


def _trace(mask: np.ndarray, offset: tuple[int, int]) -> list[np.ndarray]:
    """Return the closed lines around a mask and around its holes, each K x 1 x 2, XY."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=offset)
    return list(contours)


def _choose_thickness(image: np.ndarray) -> int:
    return max(round(max(image.shape) * OUTLINE_WIDTH), 1)


def _blend(below: np.ndarray, above: np.ndarray, opacity: float) -> np.ndarray:
    return cv2.addWeighted(below, 1 - opacity, above, opacity, 0)


# Font size: a share of the image's longest side, and the smallest that can be read.
FONT_SHARE, MIN_FONT_PIXELS = 1 / 50, 11
# Most lines of the legend, and the largest share of its width for one name; names that do not fit are counted.
MOST_LINES, MOST_WIDTH = 4, 0.5
# Smallest width of the legend, in letters, so that names fit below a narrow image.
LEAST_WIDTH_LETTERS = 16
# matplotlib's font; Pillow's own has only ASCII.
FONT = Path("mpl-data/fonts/ttf/DejaVuSans.ttf")
PAPER, INK = (250, 250, 250), (30, 30, 30)

Entry = tuple[str, np.ndarray]  # a name, and its colour, 3, uint8, RGB


def add_legend(image: np.ndarray, entries: list[Entry]) -> np.ndarray:
    """Return an image (H x W x 3, uint8, RGB) with a legend below it: higher, and at least as wide.

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
    """Return the legend: colours and names, in lines from left to right; long names are shortened."""
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
    """Return entries in lines; the last line ends with the count of those that do not fit."""
    lines: list[list[Entry]] = [[]]
    margin = size // 2
    for index, entry in enumerate(entries):
        left = len(entries) - index
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
