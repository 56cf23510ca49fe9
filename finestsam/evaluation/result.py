"""What an evaluation found: two models on the same images, and on which of these ours does well."""

from dataclasses import dataclass
from functools import cached_property

from finestsam.errors import name_count
from finestsam.evaluation.errors import Mistakes, sum_mistakes
from finestsam.evaluation.history import History
from finestsam.evaluation.measurement import Difference, Measurement

OURS, BASELINE, SAM_THRESHOLDS = "this model", "baseline", "baseline, SAM's thresholds"


@dataclass(frozen=True)
class Rating:
    """How well the generator does on one image, a mask counting as an object from an IoU of 0.5 on."""

    f1: float
    recall: float


@dataclass(frozen=True)
class Evaluation:
    """What screen, files, report and comparison show; all models on the same images, in the same order.

    Attributes:
        name, baseline_name: of the weights, for the reader.
        baseline: None: there is nothing to compare with.
        sam_thresholds: the generator of the baseline with segment_anything's own thresholds; None: it gives nearly the
            same masks, or there is no baseline.
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
        """Return ours and what it is compared with, by what the reader knows them as."""
        known = {OURS: self.ours, BASELINE: self.baseline, SAM_THRESHOLDS: self.sam_thresholds}
        return {title: one for title, one in known.items() if one is not None}

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
        before = {row["file_name"]: row.get("point/iou") for row in self.baseline.list_images()}
        losses = []
        for row in self.ours.list_images():
            now, then = row.get("point/iou"), before.get(row["file_name"])
            if now is not None and then is not None and now < then:
                losses.append((now - then, row["file_name"]))
        return [name for _, name in sorted(losses)]

    def summarize(self) -> str:
        """Return in one sentence what our model finds, beside the baseline."""
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
            return "It has nothing that could be compared with the annotations."
        text = f"A point in an object gives a mask with an IoU of {self.ours.figures['point/iou']:.2f} on average"
        if self.baseline is not None and "point/iou" in self.baseline.figures:
            text += f" (baseline: {self.baseline.figures['point/iou']:.2f})"
        return f"{text}."


def _rate(counts: Mistakes) -> Rating:
    found, objects = counts.objects["found"], counts.object_count
    return Rating(2 * found / max(counts.mask_count + objects, 1), found / max(objects, 1))


def _count(measured: Measurement) -> Mistakes:
    return sum_mistakes(measured.mistakes)["all"]
