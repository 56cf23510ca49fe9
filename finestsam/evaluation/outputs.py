"""What an evaluation prints, and its figures as files: `evaluation.json` and `per_image.csv`."""

import csv
import io
from pathlib import Path

from finestsam.errors import printable
from finestsam.evaluation.measurement import TOO_FEW, Measurement
from finestsam.evaluation.setup import Setup
from finestsam.evaluation.story import BASELINE, Story
from finestsam.whole_files import write_json, write_text

# On the screen, in this order.
HEADLINES = (
    "generator/ap", "generator/f1", "generator/ar_100", "generator/ar_1000", "generator/masks_per_image",
    "counting/mean_absolute_error", "counting/relative_error", "classes/ap", "classes/ar_100",
    "point/iou", "point/best_iou", "box/iou", "clicks/iou_8", "background/score", "background/taken_share",
)  # fmt: skip
# Before the names of the figures of what ours is compared with.
BASELINE_PREFIX, SAM_PREFIX = "baseline/", "baseline_sam/"
NAME_WIDTH, COLUMN_WIDTH = 30, 12


def describe_setup(setup: Setup | None) -> list[str]:
    """Return the lines that name the thresholds of a model."""
    if setup is None or setup.thresholds is None:
        return []
    return [f"  thresholds {setup.thresholds.origin}: {setup.listed_settings}"]


def list_headlines(story: Story) -> list[str]:
    """Return a line for each headline: ours, the baseline's, and the difference with its interval."""
    titles = list(story.measurements)
    shown = [name for name in HEADLINES if name in story.ours.figures]
    if BASELINE not in titles:
        return [f"{name:<{NAME_WIDTH}}{story.ours.figures[name]:.4f}" for name in shown]
    columns = ["this model", "baseline", *(["SAM's thr."] * (len(titles) - 2)), "difference", "95 % interval"]
    lines = [" " * NAME_WIDTH + "".join(f"{title:<{COLUMN_WIDTH}}" for title in columns).rstrip()]
    for name in shown:
        cells = [_format(measured, name) for measured in story.measurements.values()]
        cells += _list_difference(story, name)
        lines.append((f"{name:<{NAME_WIDTH}}" + "".join(f"{cell:<{COLUMN_WIDTH}}" for cell in cells)).rstrip())
    return lines


def _format(measured: Measurement, name: str) -> str:
    return f"{measured.figures[name]:.4f}" if name in measured.figures else ""


def _list_difference(story: Story, name: str) -> list[str]:
    if name not in story.baseline.figures:
        return []
    found = (story.differences or {}).get(name)
    if found is None:
        return [f"{story.ours.figures[name] - story.baseline.figures[name]:+.4f}"]
    interval = TOO_FEW if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return [f"{found.value:+.4f}", interval]


def describe_worse(story: Story) -> str:
    """Return which images a point gives worse masks on than the baseline's."""
    worse, count = story.worse, len(story.ours.records)
    names = ", ".join(map(printable, worse[:10])) + (", ..." if len(worse) > 10 else "")
    return f"one point gives worse masks than the baseline's on {len(worse)} of {count} images" + (
        f": {names}" if worse else ""
    )


def write_figures(path: Path, story: Story) -> None:
    """Write every figure by its name: ours as it is, others under their prefix, and the differences."""
    figures = dict(story.ours.figures)
    for prefix, measured in ((BASELINE_PREFIX, story.baseline), (SAM_PREFIX, story.sam_thresholds)):
        if measured:
            figures |= {f"{prefix}{name}": value for name, value in measured.figures.items()}
    for name, found in (story.differences or {}).items():
        figures[f"difference/{name}"] = found.value
        if found.low is not None:
            figures[f"difference/{name}_low"], figures[f"difference/{name}_high"] = found.low, found.high
    write_json(path, figures, indent=2)


def write_images(path: Path, story: Story) -> None:
    """Write a row for each image, with a column that marks those that our weights were trained on."""
    rows = [row | {"trained_on": str(row["file_name"] in story.learned).lower()} for row in story.ours.list_images()]
    if story.baseline:
        shared = ("file_name", "objects", "counting/labelled")
        rows = [
            row | {f"{BASELINE_PREFIX}{name}": value for name, value in other.items() if name not in shared}
            for row, other in zip(rows, story.baseline.list_images(), strict=True)
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
