"""`report.html`: what an evaluation found, in one file that needs no network, for somebody who knows the pictures."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from finestsam.config import Config, flatten_config
from finestsam.data.index import Record
from finestsam.data.reach import SIZES
from finestsam.errors import Defect, printable
from finestsam.evaluation.charts import draw_calibration, draw_clicks, draw_history, draw_precision
from finestsam.evaluation.class_scores import MEASURES, list_classes
from finestsam.evaluation.comparison import shrink_rle
from finestsam.evaluation.measurement import Difference
from finestsam.evaluation.mistakes import Mistakes, count_mistakes, sum_mistakes
from finestsam.evaluation.story import Story
from finestsam.images import compute_input_size, encode_image, read_image, resize_image
from finestsam.prediction.overlay import colour_classes, draw_layer
from finestsam.whole_files import write_text

REPORT_NAME = "report.html"
# Of each end of the ranking.
PICTURES_SHOWN = 4
# The longest side of a picture in the report.
SHOWN_PIXELS = 768
OPACITY = 0.45
TITLES = {
    "generator/ap": "Generator: average precision",
    "generator/ap50": "Generator: average precision at IoU 0.5",
    "generator/ap75": "Generator: average precision at IoU 0.75",
    "generator/ar_10": "Generator: recall, 10 masks a picture",
    "generator/ar_100": "Generator: recall, 100 masks a picture",
    "generator/ar_1000": "Generator: recall, 1000 masks a picture",
    "generator/f1": "Generator: F1 of all its masks",
    "generator/masks_per_image": "Generator: masks a picture",
    "classes/ap": "By category: average precision, mean",
    "classes/ap50": "By category: average precision at IoU 0.5, mean",
    "classes/ar_100": "By category: recall, 100 masks a picture, mean",
    "point/iou": "One point: IoU of the mask that the model prefers",
    "point/best_iou": "One point: IoU of its best mask",
    "point/boundary_iou": "One point: boundary IoU",
    "box/iou": "One box: IoU",
    "box/boundary_iou": "One box: boundary IoU",
    "clicks/iou_1": "IoU after one click",
    "clicks/iou_8": "IoU after eight clicks",
    "background/score": "A point on no object: predicted IoU",
    "background/taken_share": "A point on no object: share above the generator's threshold",
}
# Of these, less is better.
FAULTS = ("background/score", "background/taken_share")
KINDS = {
    "found": "found",
    "missed": "missed",
    "merged": "merged with another",
    "split": "split",
    "spurious": "masks of nothing labelled",
}


def write_report_page(path: Path, story: Story, worse: Sequence[str], config: Config) -> None:
    """Write the page; a reader never meets half a file.

    Args:
        worse: names of the pictures that one point finds worse than the rival does, the worst first.
    """
    body = [
        _write_headlines(story),
        _write_worse(worse, story),
        _write_categories(story),
        _write_charts(story),
        _write_mistakes(story),
        _write_pictures(story, config),
        _write_settings(config),
    ]
    columns = 3 if story.theirs is None else 4
    page = Template(files("finestsam.evaluation").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=_text(f"Evaluation of {story.name}"),
        subtitle=_text(_describe_set(story)),
        columns=str(columns),
        body="\n".join(part for part in body if part),
    )
    write_text(path, page)


def _text(value: str) -> str:
    """Return text that cannot be taken for HTML, and that every encoding can write."""
    return escape(printable(value), quote=True)


def _describe_set(story: Story) -> str:
    objects = sum(len(record.annotations) for record in story.ours.records)
    against = f"; compared with {story.rival_name}" if story.theirs else ""
    return f"{len(story.ours.records)} pictures with {objects} objects{against}"


def _write_headlines(story: Story) -> str:
    figures = story.ours.figures
    rival = story.theirs.figures if story.theirs else {}
    head = "<th>figure</th><th>value</th>"
    if rival:
        head += "<th>compared with</th><th>difference</th><th>95 % interval</th>"
    rows = []
    for name, title in TITLES.items():
        if name not in figures:
            continue
        cells = [_text(title), f"{figures[name]:.3f}"]
        if rival:
            cells.append(f"{rival[name]:.3f}" if name in rival else "")
            cells += _write_difference(name, figures, rival, (story.differences or {}).get(name))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    note = ""
    if story.differences:
        note = (
            "<p class='quiet'>An interval tells where the difference would lie if other pictures of the same kind had "
            "been drawn; one that holds 0 means that these pictures do not decide it.</p>"
        )
    if story.ours.background:
        note += (
            "<p class='quiet'>On no object, less is better, as far as every object is labelled: the generator asks "
            "there as well.</p>"
        )
    return f"<h2>Figures</h2><table><tr>{head}</tr>{''.join(rows)}</table>{note}"


def _write_difference(
    name: str, figures: dict[str, float], rival: dict[str, float], found: Difference | None
) -> list[str]:
    if name not in rival:
        return ["", ""]
    value = figures[name] - rival[name]
    if found is None:
        return [f"{value:+.3f}", ""]
    gain, loss = (found.high < 0, found.low > 0) if name in FAULTS else (found.low > 0, found.high < 0)
    kind = "better" if gain else "worse" if loss else ""
    return [f"<span class='{kind}'>{value:+.3f}</span>", f"{found.low:+.3f} to {found.high:+.3f}"]


def _write_worse(worse: Sequence[str], story: Story) -> str:
    if story.theirs is None:
        return ""
    count = len(story.ours.records)
    if not worse:
        return f"<p>On none of the {count} pictures is one point answered worse than before.</p>"
    names = ", ".join(f"<code>{_text(name)}</code>" for name in worse[:20]) + (", ..." if len(worse) > 20 else "")
    return f"<p>One point is answered worse than by the other on {len(worse)} of {count} pictures: {names}</p>"


def _write_categories(story: Story) -> str:
    """Return a row for each category, in its colour in the pictures."""
    rows = list_classes(story.ours.by_class)
    if not rows:
        return ""
    theirs = dict(list_classes(story.theirs.by_class)) if story.theirs else {}
    table = story.ours.table
    colours = dict(zip(table.names, colour_classes(len(table.names)).tolist(), strict=True))
    lines = []
    for name, row in rows:
        swatch = f"<span style='color:#{bytes(colours[name]).hex()}'>&#9632;</span>"
        cells = [f"{swatch} {_text(name)}", str(row["objects"])]
        for measure in MEASURES:
            before = f" <span class='quiet'>({theirs[name][measure]:.3f})</span>" if name in theirs else ""
            cells.append(f"{row[measure]:.3f}{before}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = ("category", "objects", "average precision", "at IoU 0.5", "recall, 100 masks a picture")
    head = "".join(f"<th>{title}</th>" for title in titles)
    note = "in brackets the model compared with; " if theirs else ""
    return (
        f"<h2>Categories</h2><table><tr>{head}</tr>{''.join(lines)}</table><p class='quiet'>A mask counts for its own "
        f"category alone; {note}categories without an object in these pictures are left out.</p>"
    )


def _write_charts(story: Story) -> str:
    ours, theirs, charts = story.ours, story.theirs, []
    if ours.scorer and ours.scorer.has_objects:
        charts.append(draw_precision(ours.scorer, theirs.scorer if theirs else None))
    if ours.clicks:
        charts.append(draw_clicks(ours.clicks, theirs.clicks if theirs else {}))
    if ours.calibration:
        charts.append(draw_calibration(ours.calibration))
    if story.history:
        charts += draw_history(story.history)
    return f"<h2>Curves</h2><div class='charts'>{''.join(charts)}</div>" if charts else ""


def _write_mistakes(story: Story) -> str:
    if not story.mistakes:
        return ""
    ours = sum_mistakes(story.mistakes)
    theirs = None
    if story.theirs and story.theirs.found is not None:
        theirs = sum_mistakes(count_mistakes(story.theirs.records, story.theirs.found))
    sizes = ("all", *SIZES)
    head = "<th></th>" + "".join(f"<th>{size}</th>" for size in sizes)
    rows = ["<tr><td>objects</td>" + "".join(f"<td>{ours[size].objects}</td>" for size in sizes) + "</tr>"]
    for kind, title in KINDS.items():
        cells = "".join(f"<td>{_write_count(kind, size, ours, theirs)}</td>" for size in sizes)
        rows.append(f"<tr><td>{title}</td>{cells}</tr>")
    note = "in brackets the model compared with; " if theirs else ""
    return (
        f"<h2>What the generator finds and misses</h2><table><tr>{head}</tr>{''.join(rows)}</table>"
        f"<p class='quiet'>Numbers of objects, and in the last row of masks; {note}found: with an IoU of at least 0.5; "
        "small: below 32 x 32 pixels, large: from 96 x 96 on. A mask of nothing labelled is a mistake only where every "
        "object is labelled.</p>"
    )


def _write_count(kind: str, size: str, ours: dict[str, Mistakes], theirs: dict[str, Mistakes] | None) -> str:
    count = str(getattr(ours[size], kind))
    return f"{count} <span class='quiet'>({getattr(theirs[size], kind)})</span>" if theirs else count


def _write_pictures(story: Story, config: Config) -> str:
    """Return the pictures where the generator does worst, and those where it does best."""
    order = list(story.ratings)
    if not order:
        return ""
    shown = min(PICTURES_SHOWN, (len(order) + 1) // 2)
    groups = {"Where it does worst": order[:shown], "Where it does best": order[::-1][: min(shown, len(order) - shown)]}
    parts = [
        "<div class='sticky'><label><input type='checkbox' id='masks' checked> masks (key m)</label> "
        "<span class='quiet'>wheel: zoom, drag: move, double click: whole picture</span></div>"
    ]
    for title, places in groups.items():
        pictures = [_write_picture(story, place, config) for place in places]
        parts += [f"<h2>{title}</h2>", *pictures] if pictures else []
    return "\n".join(parts)


def _write_picture(story: Story, place: int, config: Config) -> str:
    record, rating = story.ours.records[place], story.ratings[place]
    try:
        pixels = read_image(record.path, record.size, config.dataset.images)
    except Defect as defect:
        return f"<p>{_text(record.file_name)}: {_text(defect.message)}</p>"
    size = compute_input_size(record.size, min(SHOWN_PIXELS, max(record.size)))
    base = _embed(encode_image(resize_image(pixels, size), ".jpg"), "jpeg")
    truth = [record.rle(annotation) for annotation in record.annotations]
    panels = [("picture", None, None), (f"truth: {len(truth)} objects", truth, story.ours.colour_truth(place))]
    for name, one in (("compared with", story.theirs), ("this model", story.ours)):
        if one and one.found is not None:
            rles = one.found[place].rles
            panels.append((f"{name}: {len(rles)} masks", rles, one.colour_found(place)))
    drawn = "".join(_write_panel(caption, base, rles, colours, record, size) for caption, rles, colours in panels)
    return (
        f"<div class='picture'><div><code>{_text(record.file_name)}</code> "
        f"<span class='quiet'>finds {rating.recall:.0%} of the objects, F1 {rating.f1:.2f}</span></div>"
        f"<div class='panels'>{drawn}</div></div>"
    )


def _write_panel(
    caption: str, base: str, rles: list[dict] | None, colours: np.ndarray | None, record: Record, size: tuple[int, int]
) -> str:
    layer = ""
    if rles is not None:
        drawn = draw_layer(size, [shrink_rle(rle, size) for rle in rles], OPACITY, colours)
        layer = f"<img alt='' src='{_embed(encode_image(drawn, '.png'), 'png')}'>"
    picture = f"<img alt='{_text(record.file_name)}' src='{base}'>"
    return (
        f"<figure class='panel'><div class='view'>{picture}{layer}</div><figcaption>{_text(caption)}</figcaption>"
        "</figure>"
    )


def _embed(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _write_settings(config: Config) -> str:
    names = ("generator", "evaluate", "model", "dataset.path")
    rows = [
        f"<tr><td>{_text(name)}</td><td>{_text(str(value))}</td></tr>"
        for name, value in flatten_config(config).items()
        if name.startswith(names)
    ]
    return f"<h2>Settings</h2><details><summary>as they were given</summary><table>{''.join(rows)}</table></details>"
