"""`report.html`: what an evaluation found, in one file that needs no network, for somebody who knows the images."""

import base64
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
from finestsam.evaluation.comparison import COLUMNS, describe_found, shrink_rle
from finestsam.evaluation.measurement import FEWEST_IMAGES, TOO_FEW, Difference
from finestsam.evaluation.mistakes import MASK_KINDS, OBJECT_KINDS, Mistakes, sum_mistakes
from finestsam.evaluation.story import BASELINE, OURS, SAM_THRESHOLDS, Story
from finestsam.images import compute_input_size, encode_image, read_image, resize_image
from finestsam.prediction.overlay import colour_classes, draw_layer
from finestsam.whole_files import write_text

REPORT_NAME = "report.html"
# Of each end of the ranking.
IMAGES_SHOWN = 4
# The longest side of an image in the report.
SHOWN_PIXELS = 768
OPACITY = 0.45
TITLES = {
    "generator/ap": "Generator: average precision",
    "generator/ap50": "Generator: average precision at IoU 0.5",
    "generator/ap75": "Generator: average precision at IoU 0.75",
    "generator/f1": "Generator: F1 of all its masks",
    "generator/ar_10": "Generator: recall, 10 masks an image",
    "generator/ar_100": "Generator: recall, 100 masks an image",
    "generator/ar_1000": "Generator: recall, 1000 masks an image",
    "generator/masks_per_image": "Generator: masks an image",
    "counting/mean_absolute_error": "Counting: masks more or fewer than objects, mean over images",
    "counting/relative_error": "Counting: the same as a share of the objects",
    "classes/ap": "By category: average precision, mean",
    "classes/ap50": "By category: average precision at IoU 0.5, mean",
    "classes/ar_100": "By category: recall, 100 masks an image, mean",
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
FAULTS = (
    "background/score", "background/taken_share", "counting/mean_absolute_error", "counting/relative_error",
)  # fmt: skip
OBJECT_TITLES = {"found": "found", "merged": "merged with another", "split": "split", "missed": "missed"}
MASK_TITLES = {
    "finding": "finds an object",
    "duplicate": "duplicate of a better mask",
    "merging": "merges objects",
    "fragment": "fragment of an object",
    "in_crowd": "in a crowd region",
    "invented": "of nothing annotated",
}


def write_report_page(path: Path, story: Story, config: Config) -> None:
    """Write the page; a reader never meets half a file."""
    body = [
        _write_summary(story),
        _write_setups(story),
        _write_headlines(story),
        _write_worse(story),
        _write_categories(story),
        _write_charts(story),
        _write_mistakes(story),
        _write_images(story, config),
        _write_settings(story, config),
    ]
    columns = 2 + sum(one.found is not None for one in story.measurements.values())
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
    return f"{objects} objects in {story.described_images or len(story.ours.records)}"


def _write_summary(story: Story) -> str:
    summary = f"<p><b>{_text(story.summarize())}</b></p>"
    if not story.learned:
        return summary
    count, names = len(story.learned), sorted(story.learned)
    listed = ", ".join(f"<code>{_text(name)}</code>" for name in names[:20]) + (", ..." if count > 20 else "")
    return (
        f"{summary}<p class='worse'>{count} of the {len(story.ours.records)} images were trained on, so other images "
        f"will have lower figures: {listed}</p>"
    )


def _write_setups(story: Story) -> str:
    """Return what was measured: the weights, their image size and thresholds, and what these were chosen for."""
    setups = {title: one.setup for title, one in story.measurements.items() if one.setup}
    if not setups:
        return ""
    rows = {
        "weights": [setup.name for setup in setups.values()],
        "model": [setup.model_type for setup in setups.values()],
        "image size": [f"{setup.image_size} pixels" for setup in setups.values()],
    }
    if any(setup.thresholds for setup in setups.values()):
        rows["thresholds"] = [setup.thresholds.origin if setup.thresholds else "" for setup in setups.values()]
    for name in dict.fromkeys(name for setup in setups.values() for name in setup.settings):
        values = [setup.settings.get(name) for setup in setups.values()]
        rows[name] = ["" if value is None else f"{value:g}" for value in values]
    lines = "".join(_write_row([title, *cells]) for title, cells in rows.items())
    return f"<h2>Models</h2><table class='words'>{_write_row(['', *setups], 'th')}{lines}</table>"


def _write_row(cells: list[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"


def _write_headlines(story: Story) -> str:
    figures, differences = story.ours.figures, story.differences or {}
    baseline = story.baseline.figures if story.baseline else {}
    sam = story.sam_thresholds.figures if story.sam_thresholds else {}
    titles = ["figure", OURS]
    titles += [BASELINE, "difference", "95 % interval"] if baseline else []
    titles += [SAM_THRESHOLDS] if sam else []
    rows = []
    for name, title in TITLES.items():
        if name not in figures:
            continue
        cells = [_text(title), f"{figures[name]:.3f}"]
        if baseline:
            cells.append(f"{baseline[name]:.3f}" if name in baseline else "")
            cells += _write_difference(name, figures, baseline, differences.get(name))
        if sam:
            cells.append(f"<span class='quiet'>{sam[name]:.3f}</span>" if name in sam else "")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<h2>Figures</h2><table>{_write_row(titles, 'th')}{''.join(rows)}</table>{_write_notes(story)}"


def _write_notes(story: Story) -> str:
    notes = []
    if any(found.low is not None for found in (story.differences or {}).values()):
        notes.append(
            "The interval holds the difference for 95 % of the samples of images like these; one that holds 0 means "
            "that these images do not decide it."
        )
    elif story.differences:
        notes.append(f"An interval needs {FEWEST_IMAGES} images.")
    if "counting/mean_absolute_error" in story.ours.figures:
        notes.append("Counting: less is better; masks in crowd regions do not count.")
    if story.ours.background:
        notes.append(
            "On no object, less is better, as far as every object is annotated: the generator prompts there as well."
        )
    return "".join(f"<p class='quiet'>{_text(note)}</p>" for note in notes)


def _write_difference(
    name: str, figures: dict[str, float], baseline: dict[str, float], found: Difference | None
) -> list[str]:
    if name not in baseline:
        return ["", ""]
    value = figures[name] - baseline[name]
    if found is None:
        return [f"{value:+.3f}", ""]
    if found.low is None:
        return [f"{value:+.3f}", TOO_FEW]
    gain, loss = found.is_positive, found.is_negative
    if name in FAULTS:
        gain, loss = loss, gain
    kind = "better" if gain else "worse" if loss else ""
    return [f"<span class='{kind}'>{value:+.3f}</span>", f"{found.low:+.3f} to {found.high:+.3f}"]


def _write_worse(story: Story) -> str:
    if story.baseline is None:
        return ""
    count, worse = len(story.ours.records), story.worse
    if not worse:
        return f"<p>On none of the {count} images does one point give worse masks than the baseline's.</p>"
    names = ", ".join(f"<code>{_text(name)}</code>" for name in worse[:20]) + (", ..." if len(worse) > 20 else "")
    return f"<p>One point gives worse masks than the baseline's on {len(worse)} of {count} images: {names}</p>"


def _write_categories(story: Story) -> str:
    """Return a row for each category, in its colour in the images."""
    rows = list_classes(story.ours.by_class)
    if not rows:
        return ""
    theirs = dict(list_classes(story.baseline.by_class)) if story.baseline else {}
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
    titles = ("category", "objects", "average precision", "at IoU 0.5", "recall, 100 masks an image")
    head = "".join(f"<th>{title}</th>" for title in titles)
    note = "in brackets the baseline; " if theirs else ""
    return (
        f"<h2>Categories</h2><table><tr>{head}</tr>{''.join(lines)}</table><p class='quiet'>A mask counts for its own "
        f"category alone; {note}categories without an object in these images are left out.</p>"
    )


def _write_charts(story: Story) -> str:
    ours, theirs, charts = story.ours, story.baseline, []
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
    """Return what became of the objects and of the masks; the rows of each add up to their number."""
    if not story.ours.mistakes:
        return ""
    ours = sum_mistakes(story.ours.mistakes)
    has_other = story.baseline is not None and story.baseline.found is not None
    theirs = sum_mistakes(story.baseline.mistakes) if has_other else None
    head = _write_row(["", "all", *SIZES], "th")
    rows = _write_kinds("objects", OBJECT_TITLES, ours, theirs) + _write_kinds("masks", MASK_TITLES, ours, theirs)
    kinds = {OBJECT_TITLES[kind]: text for kind, text in OBJECT_KINDS.items()}
    kinds |= {MASK_TITLES[kind]: text for kind, text in MASK_KINDS.items()}
    explained = "".join(f"<li><b>{_text(title)}</b>: {_text(text)}</li>" for title, text in kinds.items())
    note = "In brackets the baseline. " if theirs else ""
    return (
        f"<h2>What the generator finds and misses</h2><table>{head}{rows}</table><p class='quiet'>{note}The rows of "
        "objects add up to the objects, those of masks to the masks; each by its own size, small: below 32 x 32 "
        "pixels, large: from 96 x 96 on. A mask of nothing annotated is wrong only where every object is annotated.</p>"
        f"<details><summary>what each row counts: the first of its group that holds</summary><ul>{explained}</ul>"
        "</details>"
    )


def _write_kinds(
    group: str, titles: dict[str, str], ours: dict[str, Mistakes], theirs: dict[str, Mistakes] | None
) -> str:
    """Return the row of the objects or of the masks, and below it one for each kind of them that there is."""

    def list_cells(kind: str | None) -> list[str]:
        cells = []
        for size in ("all", *SIZES):
            counts = [getattr(each[size], group) for each in (ours, theirs) if each]
            numbers = [sum(one.values()) if kind is None else one[kind] for one in counts]
            other = f" <span class='quiet'>({numbers[1]})</span>" if theirs else ""
            cells.append(f"<td>{numbers[0]}{other}</td>")
        return cells

    rows = [f"<tr class='total'><td>{group}</td>{''.join(list_cells(None))}</tr>"]
    for kind, title in titles.items():
        is_there = any(getattr(each["all"], group)[kind] for each in (ours, theirs) if each)
        if kind != "in_crowd" or is_there:
            rows.append(f"<tr><td class='kind'>{title}</td>{''.join(list_cells(kind))}</tr>")
    return "".join(rows)


def _write_images(story: Story, config: Config) -> str:
    """Return the images where the generator does worst, and those where it does best."""
    order = list(story.ratings)
    if not order:
        return ""
    shown = min(IMAGES_SHOWN, (len(order) + 1) // 2)
    groups = {"Where it does worst": order[:shown], "Where it does best": order[::-1][: min(shown, len(order) - shown)]}
    parts = [
        "<div class='sticky'><label><input type='checkbox' id='masks' checked> masks (key m)</label> "
        "<span class='quiet'>wheel: zoom, drag: move, double click: whole image</span></div>"
    ]
    for title, places in groups.items():
        images = [_write_image(story, place, config) for place in places]
        parts += [f"<h2>{title}</h2>", *images] if images else []
    return "\n".join(parts)


def _write_image(story: Story, place: int, config: Config) -> str:
    record, rating = story.ours.records[place], story.ratings[place]
    try:
        pixels = read_image(record.path, record.size, config.dataset.images)
    except Defect as defect:
        return f"<p>{_text(record.file_name)}: {_text(defect.message)}</p>"
    size = compute_input_size(record.size, min(SHOWN_PIXELS, max(record.size)))
    base = _embed(encode_image(resize_image(pixels, size), ".jpg"), "jpeg")
    truth = [record.rle(annotation) for annotation in record.annotations]
    panels = [
        _write_panel("image", f"{record.size[1]} x {record.size[0]} pixels", base, None, None, record, size),
        _write_panel("annotated", f"{len(truth)} objects", base, truth, story.ours.colour_truth(place), record, size),
    ]
    for title in COLUMNS:
        one = story.measurements.get(title)
        if one is not None and one.found is not None:
            rles, colours = one.found[place].rles, one.colour_found(place)
            panels.append(_write_panel(title, describe_found(one, place), base, rles, colours, record, size))
    learned = "; trained on" if record.file_name in story.learned else ""
    return (
        f"<div class='picture'><div><code>{_text(record.file_name)}</code> "
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
        drawn = draw_layer(size, [shrink_rle(rle, size) for rle in rles], OPACITY, colours)
        layer = f"<img alt='' src='{_embed(encode_image(drawn, '.png'), 'png')}'>"
    image = f"<img alt='{_text(record.file_name)}' src='{base}'>"
    return (
        f"<figure class='panel'><h3>{_text(title)}</h3><div class='view'>{image}{layer}</div>"
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _embed(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _write_settings(story: Story, config: Config) -> str:
    settings = list_effective_settings(story, config)
    rows = "".join(_write_row([name, str(value)]) for name, value in settings.items())
    table = f"<table class='words'>{rows}</table>"
    return f"<h2>Settings</h2><details><summary>as they took effect</summary>{table}</details>"


def list_effective_settings(story: Story, config: Config) -> dict[str, object]:
    """Return the settings of an evaluation by their names, with what was found out in place of what was left open."""
    settings = {
        name: value
        for name, value in flatten_config(config).items()
        if name.startswith(("evaluate.", "generator.", "model.")) or name == "dataset.path"
    }
    setup = story.ours.setup
    if setup is None or setup.thresholds is None:
        settings = {name: value for name, value in settings.items() if not name.startswith("generator.")}
    if setup is None:
        settings = {name: value for name, value in settings.items() if not name.startswith("model.")}
    else:
        settings |= {"model.type": setup.model_type, "model.checkpoint": setup.name}
        settings["model.image_size"] = setup.image_size
        settings |= {f"generator.{name}": value for name, value in setup.settings.items()}
    settings["evaluate.against"] = story.baseline_name
    settings["evaluate.search"] = setup is not None and bool(setup.thresholds) and bool(setup.thresholds.goal)
    if story.described_images:
        settings["evaluate.split"] = f"{settings['evaluate.split']}: {story.described_images}"
    return {name: "none" if value in (None, "") else value for name, value in settings.items()}
