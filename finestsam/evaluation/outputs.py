"""What an evaluation prints, and its figures as files: `evaluation.json` and `per_image.csv`."""

import csv
import io
from pathlib import Path

from finestsam.errors import printable
from finestsam.evaluation.measurement import CONFIDENCE, TOO_FEW
from finestsam.evaluation.result import BASELINE, OURS, SAM_THRESHOLDS, Evaluation
from finestsam.evaluation.setup import Setup
from finestsam.runtime.whole_files import write_json, write_text

# On the screen, in this order.
HEADLINES = (
    "generator/ap", "generator/f1", "generator/ar_100", "generator/ar_1000", "generator/masks_per_image",
    "counting/mean_absolute_error", "counting/relative_error", "classes/ap", "classes/ar_100",
    "point/iou", "point/best_iou", "box/iou", "clicks/iou_8", "background/score", "background/taken_share",
)  # fmt: skip
# Before the names of the figures of what ours is compared with.
BASELINE_PREFIX, SAM_PREFIX = "baseline/", "baseline_sam/"
NAME_WIDTH = 30
WIDTHS = (NAME_WIDTH, 12, 12, 12, 34, 12)  # letters of the columns


def describe_setup(setup: Setup | None) -> list[str]:
    """Return the lines that name the thresholds of a model."""
    if setup is None or setup.thresholds is None:
        return []
    return [f"  thresholds {setup.thresholds.origin}: {setup.listed_settings}"]


def list_headlines(evaluation: Evaluation) -> list[str]:
    """Return a line for each headline: ours, the baseline's, and the difference with its interval."""
    shown = [name for name in HEADLINES if name in evaluation.ours.figures]
    if evaluation.baseline is None:
        return [f"{name:<{NAME_WIDTH}}{evaluation.ours.figures[name]:.4f}" for name in shown]
    titles = ["", OURS, BASELINE, "difference", f"{CONFIDENCE:.0%} interval"]
    rows = [titles, *([name, *_list_cells(evaluation, name)] for name in shown)]
    if evaluation.sam_thresholds:
        figures = evaluation.sam_thresholds.figures
        rows[0].append(SAM_THRESHOLDS)
        for row in rows[1:]:
            row.append(f"{figures[row[0]]:.4f}" if row[0] in figures else "")
    return ["".join(f"{cell:<{width}}" for cell, width in zip(row, WIDTHS, strict=False)).rstrip() for row in rows]


def _list_cells(evaluation: Evaluation, name: str) -> list[str]:
    """Return a figure of both models, their difference and its interval, each empty where it is not known."""
    ours, theirs = evaluation.ours.figures[name], evaluation.baseline.figures.get(name)
    if theirs is None:
        return [f"{ours:.4f}", "", "", ""]
    found = (evaluation.differences or {}).get(name)
    interval = ""
    if found is not None:
        interval = TOO_FEW if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return [f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:+.4f}", interval]


def describe_worse(evaluation: Evaluation) -> str:
    """Return which images a point gives worse masks on than the baseline's."""
    worse, count = evaluation.worse, len(evaluation.ours.records)
    names = ", ".join(map(printable, worse[:10])) + (", ..." if len(worse) > 10 else "")
    return f"one point gives worse masks than the baseline's on {len(worse)} of {count} images" + (
        f": {names}" if worse else ""
    )


def write_figures(path: Path, evaluation: Evaluation) -> None:
    """Write every figure by its name: ours as it is, others under their prefix, and the differences."""
    figures = dict(evaluation.ours.figures)
    for prefix, measured in ((BASELINE_PREFIX, evaluation.baseline), (SAM_PREFIX, evaluation.sam_thresholds)):
        if measured:
            figures |= {f"{prefix}{name}": value for name, value in measured.figures.items()}
    for name, found in (evaluation.differences or {}).items():
        figures[f"difference/{name}"] = found.value
        if found.low is not None:
            figures[f"difference/{name}_low"], figures[f"difference/{name}_high"] = found.low, found.high
    write_json(path, figures, indent=2)


def write_images(path: Path, evaluation: Evaluation) -> None:
    """Write a row for each image, with a column that marks those that our weights were trained on."""
    rows = [
        row | {"trained_on": str(row["file_name"] in evaluation.learned).lower()}
        for row in evaluation.ours.list_images()
    ]
    if evaluation.baseline:
        shared = ("file_name", "objects", "counting/labelled")
        rows = [
            row | {f"{BASELINE_PREFIX}{name}": value for name, value in other.items() if name not in shared}
            for row, other in zip(rows, evaluation.baseline.list_images(), strict=True)
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
