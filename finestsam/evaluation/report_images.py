"""The images of the report: the generator's worst and best, with their annotations and the baseline's masks."""

import base64

import numpy as np

from finestsam.config import Config
from finestsam.errors import Defect, name_count
from finestsam.evaluation.comparison import COLUMNS, describe_found, shrink_rle
from finestsam.evaluation.report_tables import escape_text
from finestsam.evaluation.result import Evaluation
from finestsam.images.files import encode_image, read_image
from finestsam.images.frames import compute_input_size, resize_image
from finestsam.prediction.overlay import render_layer
from finestsam.records import Record

# Images from each end of the ranking.
IMAGES_SHOWN = 4
# The longest side of an image in the report.
SHOWN_PIXELS = 768
OPACITY = 0.45


def write_images(evaluation: Evaluation, config: Config) -> str:
    """Return the generator's worst images, then its best."""
    order = list(evaluation.ratings)
    if not order:
        return ""
    shown = min(IMAGES_SHOWN, (len(order) + 1) // 2)
    groups = {
        "Worst images of the generator": order[:shown],
        "Best images of the generator": order[::-1][: min(shown, len(order) - shown)],
    }
    parts = [
        "<div class='sticky'><label><input type='checkbox' id='masks' checked> masks (key m)</label> "
        "<span class='quiet'>wheel: zoom, drag: move, double click: whole image</span></div>"
    ]
    for title, indices in groups.items():
        images = [_write_image(evaluation, index, config) for index in indices]
        parts += [f"<h2>{title}</h2>", *images] if images else []
    return "\n".join(parts)


def _write_image(evaluation: Evaluation, index: int, config: Config) -> str:
    record, rating = evaluation.ours.records[index], evaluation.ratings[index]
    try:
        pixels = read_image(record.path, record.size, config.dataset.images)
    except Defect as defect:
        return f"<p>{escape_text(record.file_name)}: {escape_text(defect.message)}</p>"
    size = compute_input_size(record.size, min(SHOWN_PIXELS, max(record.size)))
    base = _embed(encode_image(resize_image(pixels, size), ".jpg"), "jpeg")
    truth = [record.rle(annotation) for annotation in record.annotations]
    panels = [
        _write_panel("image", f"{record.size[1]} x {record.size[0]} pixels", base, None, None, record, size),
        _write_panel(
            "annotated",
            name_count(len(truth), "object"),
            base,
            truth,
            evaluation.ours.colour_truth(index),
            record,
            size,
        ),
    ]
    for title in COLUMNS:
        measured = evaluation.measurements.get(title)
        if measured is not None and measured.found is not None:
            rles, colours = measured.found[index].rles, measured.colour_found(index)
            panels.append(_write_panel(title, describe_found(measured, index), base, rles, colours, record, size))
    learned = "; trained on" if record.file_name in evaluation.learned else ""
    return (
        f"<div class='image'><div><code>{escape_text(record.file_name)}</code> "
        f"<span class='quiet'>finds {rating.recall:.0%} of the objects, F1 {rating.f1:.2f}{learned}</span></div>"
        f"<div class='panels'>{''.join(panels)}</div></div>"
    )


def _write_panel(
    title: str,
    caption: str,
    base: str,
    rles: list[dict] | None,
    colours: np.ndarray | None,
    record: Record,
    size: tuple[int, int],
) -> str:
    layer = ""
    if rles is not None:
        masks = render_layer(size, [shrink_rle(rle, size) for rle in rles], OPACITY, colours)
        layer = f"<img alt='' src='{_embed(encode_image(masks, '.png'), 'png')}'>"
    image = f"<img alt='{escape_text(record.file_name)}' src='{base}'>"
    return (
        f"<figure class='panel'><h3>{escape_text(title)}</h3><div class='view'>{image}{layer}</div>"
        f"<figcaption>{escape_text(caption)}</figcaption></figure>"
    )


def _embed(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
