"""The results of an evaluation: our model and the baseline on the same images, and a rating of each image."""

import csv
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finestsam.errors import name_count, printable
from finestsam.evaluation.errors import Mistakes, sum_mistakes
from finestsam.evaluation.measurement import CONFIDENCE, TOO_FEW, Difference, Measurement
from finestsam.evaluation.own_run import History
from finestsam.evaluation.subject import Setup
from finestsam.runtime.whole_files import write_json, write_text

OURS, BASELINE, SAM_THRESHOLDS = "this model", "baseline", "baseline, SAM's thresholds"


@dataclass(frozen=True)
class Rating:
    """F1 and recall of the generator on one image, at an IoU of 0.5."""

    f1: float
    recall: float


@dataclass(frozen=True)
class Evaluation:
    """All results that are printed and written; all models on the same images, in the same order.

    Attributes:
        name, baseline_name: of the weights, to print.
        baseline: None: there is nothing to compare with.
        sam_thresholds: the baseline's generator with segment_anything's own thresholds; None: it gives nearly the same
            masks, or there is no baseline.
        history: of the run that our weights come from; None: it is not known.
        learned: file names of the images that our weights were trained on.
        described_images: how many images, and of which split.
    """

    name: str
    ours: Measurement
    baseline_name: str = ""
    baseline: Measurement | None = None
    differences: dict[str, Difference] | None = None
    history: History | None = None
    sam_thresholds: Measurement | None = None
    learned: frozenset[str] = frozenset()
    described_images: str = ""

    @property
    def measurements(self) -> dict[str, Measurement]:
        """Return the measurements that exist, by their titles in the report."""
        known = {OURS: self.ours, BASELINE: self.baseline, SAM_THRESHOLDS: self.sam_thresholds}
        return {title: measured for title, measured in known.items() if measured is not None}

    @cached_property
    def ratings(self) -> dict[int, Rating]:
        """Return the rating of each image with objects by its index, the worst first."""
        indices = [index for index, record in enumerate(self.ours.records) if record.annotations and self.ours.counts]
        rated = {index: _rate(self.ours.counts[index]) for index in indices}
        return dict(sorted(rated.items(), key=lambda item: (item[1].f1, item[1].recall)))

    @cached_property
    def worse(self) -> list[str]:
        """Return the file names of the images where a point gives worse masks than the baseline's, the worst first."""
        if self.baseline is None:
            return []
        baseline_ious = {row["file_name"]: row.get("point/iou") for row in self.baseline.list_images()}
        losses = []
        for row in self.ours.list_images():
            iou, baseline_iou = row.get("point/iou"), baseline_ious.get(row["file_name"])
            if iou is not None and baseline_iou is not None and iou < baseline_iou:
                losses.append((iou - baseline_iou, row["file_name"]))
        return [name for _, name in sorted(losses)]

    def summarize(self) -> str:
        """Return one sentence about what our model finds, compared with the baseline."""
        if self.ours.found is None:
            return self._summarize_prompts()
        ours = _count(self.ours)
        text = f"It finds {ours.objects['found']} of {name_count(ours.object_count, 'object')} with "
        text += name_count(ours.mask_count, "mask")
        error = self.ours.figures.get("counting/mean_absolute_error", 0.0)
        counted = f"its number of masks is off by {error:.1f} an image"
        if self.baseline is not None and self.baseline.found is not None:
            theirs = _count(self.baseline)
            text += f" (baseline: {theirs.objects['found']} with {theirs.mask_count})"
            counted += f" (baseline: {self.baseline.figures.get('counting/mean_absolute_error', 0.0):.1f})"
        return f"{text}; {counted}."

    def _summarize_prompts(self) -> str:
        if "point/iou" not in self.ours.figures:
            return "Nothing could be compared with the annotations."
        text = f"A point in an object gives a mask with an IoU of {self.ours.figures['point/iou']:.2f} on average"
        if self.baseline is not None and "point/iou" in self.baseline.figures:
            text += f" (baseline: {self.baseline.figures['point/iou']:.2f})"
        return f"{text}."


def _rate(counts: Mistakes) -> Rating:
    found, objects = counts.objects["found"], counts.object_count
    return Rating(2 * found / max(counts.mask_count + objects, 1), found / max(objects, 1))


def _count(measured: Measurement) -> Mistakes:
    return sum_mistakes(measured.mistakes)["all"]


# The figures that are printed, in this order.
HEADLINES = (
    "generator/ap", "generator/f1", "generator/ar_100", "generator/ar_1000", "generator/masks_per_image",
    "counting/mean_absolute_error", "counting/relative_error", "classes/ap", "classes/ar_100",
    "point/iou", "point/best_iou", "box/iou", "clicks/iou_8", "background/score", "background/taken_share",
)  # fmt: skip
# The names of the baseline's figures start with these.
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
    """Return a figure of both models, the difference and its interval; unknown ones are empty."""
    ours, theirs = evaluation.ours.figures[name], evaluation.baseline.figures.get(name)
    if theirs is None:
        return [f"{ours:.4f}", "", "", ""]
    found = (evaluation.differences or {}).get(name)
    interval = ""
    if found is not None:
        interval = TOO_FEW if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
    return [f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:+.4f}", interval]


def describe_worse(evaluation: Evaluation) -> str:
    """Return the images on which one point gives worse masks than the baseline's."""
    worse, count = evaluation.worse, len(evaluation.ours.records)
    names = ", ".join(map(printable, worse[:10])) + (", ..." if len(worse) > 10 else "")
    return f"one point gives worse masks than the baseline's on {len(worse)} of {count} images" + (
        f": {names}" if worse else ""
    )


def write_figures(path: Path, evaluation: Evaluation) -> None:
    """Write every figure by its name, those of the baseline with a prefix, and the differences."""
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
            row | {f"{BASELINE_PREFIX}{name}": value for name, value in baseline_row.items() if name not in shared}
            for row, baseline_row in zip(rows, evaluation.baseline.list_images(), strict=True)
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
