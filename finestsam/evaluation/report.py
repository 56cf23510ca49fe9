"""`report.html`: the results of an evaluation, in one file that needs no network."""

from importlib.resources import files
from pathlib import Path
from string import Template

from finestsam.config import Config, flatten_config
from finestsam.errors import name_count
from finestsam.evaluation.charts import plot_calibration, plot_clicks, plot_history, plot_precision
from finestsam.evaluation.measurement import FEWEST_IMAGES, TOO_FEW, Difference
from finestsam.evaluation.report_images import write_images
from finestsam.evaluation.report_tables import escape_text, write_categories, write_mistakes, write_row
from finestsam.evaluation.result import BASELINE, OURS, SAM_THRESHOLDS, Evaluation
from finestsam.runtime.whole_files import write_text

REPORT_NAME = "report.html"
TITLES = {
    "generator/ap": "Generator: average precision",
    "generator/ap50": "Generator: average precision at IoU 0.5",
    "generator/ap75": "Generator: average precision at IoU 0.75",
    "generator/f1": "Generator: F1",
    "generator/ar_10": "Generator: recall, 10 masks an image",
    "generator/ar_100": "Generator: recall, 100 masks an image",
    "generator/ar_1000": "Generator: recall, 1000 masks an image",
    "generator/masks_per_image": "Generator: masks an image",
    "counting/mean_absolute_error": "Counting: absolute error of the number of masks, mean over images",
    "counting/relative_error": "Counting: the same error divided by the number of objects",
    "classes/ap": "By category: average precision, mean",
    "classes/ap50": "By category: average precision at IoU 0.5, mean",
    "classes/ar_100": "By category: recall, 100 masks an image, mean",
    "point/iou": "One point: IoU of the mask with the highest score",
    "point/best_iou": "One point: IoU of the best mask",
    "point/boundary_iou": "One point: boundary IoU",
    "box/iou": "One box: IoU",
    "box/boundary_iou": "One box: boundary IoU",
    "clicks/iou_1": "IoU after one click",
    "clicks/iou_8": "IoU after eight clicks",
    "background/score": "Background point: predicted IoU",
    "background/taken_share": "Background point: share above the generator's threshold",
}
# Figures that are better the lower they are.
LOWER_IS_BETTER = (
    "background/score", "background/taken_share", "counting/mean_absolute_error", "counting/relative_error",
)  # fmt: skip


def write_report_page(path: Path, evaluation: Evaluation, config: Config) -> None:
    """Write the page, whole or not at all."""
    body = [
        _write_summary(evaluation),
        _write_setups(evaluation),
        _write_headlines(evaluation),
        _write_worse(evaluation),
        write_categories(evaluation),
        _write_charts(evaluation),
        write_mistakes(evaluation),
        write_images(evaluation, config),
        _write_settings(evaluation, config),
    ]
    columns = 2 + sum(measured.found is not None for measured in evaluation.measurements.values())
    page = Template(files("finestsam.evaluation").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape_text(f"Evaluation of {evaluation.name}"),
        subtitle=escape_text(_describe_set(evaluation)),
        columns=str(columns),
        body="\n".join(part for part in body if part),
    )
    write_text(path, page)


def _describe_set(evaluation: Evaluation) -> str:
    objects = sum(len(record.annotations) for record in evaluation.ours.records)
    return f"{name_count(objects, 'object')} in {evaluation.described_images or len(evaluation.ours.records)}"


def _write_summary(evaluation: Evaluation) -> str:
    summary = f"<p><b>{escape_text(evaluation.summarize())}</b></p>"
    if not evaluation.learned:
        return summary
    count, names = len(evaluation.learned), sorted(evaluation.learned)
    listed = ", ".join(f"<code>{escape_text(name)}</code>" for name in names[:20]) + (", ..." if count > 20 else "")
    return (
        f"{summary}<p class='worse'>{count} of the {len(evaluation.ours.records)} images were trained on; "
        f"expect lower figures on other images: {listed}</p>"
    )


def _write_setups(evaluation: Evaluation) -> str:
    """Return a table of the models: weights, image size, thresholds and their origin."""
    setups = {title: measured.setup for title, measured in evaluation.measurements.items() if measured.setup}
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
        rows[name] = [setup.settings.get(name, "") for setup in setups.values()]
    lines = "".join(write_row([title, *cells]) for title, cells in rows.items())
    return f"<h2>Models</h2><table class='words'>{write_row(['', *setups], 'th')}{lines}</table>"


def _write_headlines(evaluation: Evaluation) -> str:
    figures, differences = evaluation.ours.figures, evaluation.differences or {}
    baseline = evaluation.baseline.figures if evaluation.baseline else {}
    sam = evaluation.sam_thresholds.figures if evaluation.sam_thresholds else {}
    titles = ["figure", OURS]
    titles += [BASELINE, "difference", "95 % interval"] if baseline else []
    titles += [SAM_THRESHOLDS] if sam else []
    rows = []
    for name, title in TITLES.items():
        if name not in figures:
            continue
        cells = [escape_text(title), f"{figures[name]:.3f}"]
        if baseline:
            cells.append(f"{baseline[name]:.3f}" if name in baseline else "")
            cells += _write_difference(name, figures, baseline, differences.get(name))
        if sam:
            cells.append(f"<span class='quiet'>{sam[name]:.3f}</span>" if name in sam else "")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<h2>Figures</h2><table>{write_row(titles, 'th')}{''.join(rows)}</table>{_write_notes(evaluation)}"


def _write_notes(evaluation: Evaluation) -> str:
    notes = []
    if any(found.low is not None for found in (evaluation.differences or {}).values()):
        notes.append(
            "The interval is a 95 % bootstrap interval of the difference, over images. If it contains 0, these images "
            "do not show which model is better."
        )
    elif evaluation.differences:
        notes.append(f"An interval needs at least {FEWEST_IMAGES} images.")
    if "counting/mean_absolute_error" in evaluation.ours.figures:
        notes.append("Counting: lower is better. Masks in crowd regions do not count.")
    if evaluation.ours.background:
        notes.append(
            "Background point: the generator prompts between the objects as well. Lower is better if every object is "
            "annotated."
        )
    return "".join(f"<p class='quiet'>{escape_text(note)}</p>" for note in notes)


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
    if name in LOWER_IS_BETTER:
        gain, loss = loss, gain
    kind = "better" if gain else "worse" if loss else ""
    return [f"<span class='{kind}'>{value:+.3f}</span>", f"{found.low:+.3f} to {found.high:+.3f}"]


def _write_worse(evaluation: Evaluation) -> str:
    if evaluation.baseline is None:
        return ""
    count, worse = len(evaluation.ours.records), evaluation.worse
    if not worse:
        return f"<p>One point gives worse masks than the baseline's on none of the {count} images.</p>"
    names = ", ".join(f"<code>{escape_text(name)}</code>" for name in worse[:20]) + (", ..." if len(worse) > 20 else "")
    return f"<p>One point gives worse masks than the baseline's on {len(worse)} of {count} images: {names}</p>"


def _write_charts(evaluation: Evaluation) -> str:
    ours, theirs, charts = evaluation.ours, evaluation.baseline, []
    if ours.scorer and ours.scorer.has_objects:
        charts.append(plot_precision(ours.scorer, theirs.scorer if theirs else None))
    if ours.clicks:
        charts.append(plot_clicks(ours.clicks, theirs.clicks if theirs else {}))
    if ours.calibration:
        charts.append(plot_calibration(ours.calibration))
    if evaluation.history:
        charts += plot_history(evaluation.history)
    return f"<h2>Curves</h2><div class='charts'>{''.join(charts)}</div>" if charts else ""


def _write_settings(evaluation: Evaluation, config: Config) -> str:
    settings = list_effective_settings(evaluation, config)
    rows = "".join(write_row([name, str(value)]) for name, value in settings.items())
    table = f"<table class='words'>{rows}</table>"
    return f"<h2>Settings</h2><details><summary>the values that were used</summary>{table}</details>"


def list_effective_settings(evaluation: Evaluation, config: Config) -> dict[str, object]:
    """Return the settings of an evaluation by their names; automatic ones have the values that were used."""
    settings = {
        name: value
        for name, value in flatten_config(config).items()
        if name.startswith(("evaluate.", "generator.", "model.")) or name == "dataset.path"
    }
    setup = evaluation.ours.setup
    if setup is None or setup.thresholds is None:
        settings = {name: value for name, value in settings.items() if not name.startswith("generator.")}
    if setup is None:
        settings = {name: value for name, value in settings.items() if not name.startswith("model.")}
    else:
        settings |= {"model.type": setup.model_type, "model.checkpoint": setup.name}
        settings["model.image_size"] = setup.image_size
        settings |= {f"generator.{name}": value for name, value in setup.settings.items()}
    settings["evaluate.against"] = evaluation.baseline_name
    settings["evaluate.search"] = setup is not None and bool(setup.thresholds) and bool(setup.thresholds.goal)
    if evaluation.described_images:
        settings["evaluate.split"] = f"{settings['evaluate.split']}: {evaluation.described_images}"
    return {name: "none" if value in (None, "") else value for name, value in settings.items()}
