"""Images with their annotations (drawn by a person or found by the generator), and findings about both."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from finestsam.errors import printable
from finestsam.runtime.whole_files import write_json

EXAMPLES_ON_SCREEN = 10
SKIPPED_IMAGE, SKIPPED_ANNOTATION, KEPT = "skipped", "skipped_annotation", "kept"

# What the user can do about a kind of finding, if the message does not say it.
ADVICE = {
    "missing_file": "put the images at the paths in the annotations, or correct file_name",
    "not_downloaded": "download the images into the dataset; addresses are never opened",
    "outside_dataset": "files must lie inside the dataset; links out of it need --dataset.follow_symlinks",
    "names_unread": "classes are numbered instead; correct the file, or copy it into the dataset",
    "long_outline": "export these objects again; use run lengths if the outlines are correct",
    "size_mismatch": "the image was resized after it was labelled, or another image has its name: export again",
    "not_an_image": "replace or remove the file",
    "broken_image": "copy or download the image again; it is truncated or damaged",
    "too_large": "raise --dataset.images.max_pixels if the image is correct, or cut it into tiles",
    "empty_segmentation": "label a mask, or use the boxes as masks with --dataset.masks_from_boxes",
    "box_only": "label a mask, or use the boxes as masks with --dataset.masks_from_boxes",
    "crowd": "regions of many objects are left out of training; --dataset.include_crowd takes each as one object",
    "vanishes": "these objects are too small for the model: use a larger --model.image_size or smaller tiles",
    "rle_size": "the run lengths belong to an image of another size: export again",
    "rle_counts": "the run lengths are damaged: export again",
    "unknown_image": "the annotations name an image id that the file does not list: export again",
    "unknown_category": "kept, since training uses only the masks; add the category to the file",
    "bad_bbox": "not used: boxes are always computed from the mask",
    "bbox_disagrees": "the box is not used, but either the box or the mask is wrong: check these objects",
    "duplicate_mask": "kept twice, so they count twice; --dataset.dedup keeps the first",
    "leakage": "the same image is in training and validation: remove the copies from one of the two",
    "ambiguous_turn": "save the image upright, without EXIF orientation",
    "clipped": "correct if the object extends beyond the image",
}


@dataclass(slots=True)
class Finding:
    """One image or annotation that was skipped, or used with a remark."""

    code: str
    file: str
    image_id: int | None
    annotation_id: int | str | None  # as in the file
    message: str
    action: str


@dataclass
class DatasetReport:
    """Counts and findings of one part of a dataset, or of all of it."""

    image_count: int = 0
    usable_image_count: int = 0
    background_image_count: int = 0  # images without objects: not trained on
    annotation_count: int = 0
    usable_annotation_count: int = 0
    findings: list[Finding] = field(default_factory=list)

    def skip_image(self, code: str, file: str, message: str) -> None:
        self.findings.append(Finding(code, file, None, None, message, SKIPPED_IMAGE))

    def skip_annotation(self, code: str, file: str, annotation_id: int | str | None, message: str) -> None:
        self.findings.append(Finding(code, file, None, annotation_id, message, SKIPPED_ANNOTATION))

    def remark(self, code: str, file: str, message: str, annotation_id: int | str | None = None) -> None:
        self.findings.append(Finding(code, file, None, annotation_id, message, KEPT))

    @property
    def defect_count(self) -> int:
        """Number of findings that `--strict` refuses: everything skipped, except crowds, which are valid."""
        return sum(finding.action != KEPT and finding.code != "crowd" for finding in self.findings)

    def summarize(self) -> str:
        """Return one line with the counts."""
        images, annotations = self._count(SKIPPED_IMAGE), self._count(SKIPPED_ANNOTATION)
        usable_images = self.usable_image_count + self.background_image_count
        return (
            f"dataset: {self.image_count} images, {usable_images} usable"
            f"{f' ({self.background_image_count} without objects)' if self.background_image_count else ''}"
            f"{_list_skipped(images)}; "
            f"{self.annotation_count} annotations, {self.usable_annotation_count} usable{_list_skipped(annotations)}"
        )

    def list_warnings(self) -> list[str]:
        """Return a warning if more than half of the images or annotations cannot be used."""
        warnings = []
        for kind, count, dropped in (
            ("images", self.image_count, self._count(SKIPPED_IMAGE).total()),
            ("annotations", self.annotation_count, self._count(SKIPPED_ANNOTATION, but="crowd").total()),
        ):
            if dropped > count / 2:
                warnings.append(f"WARNING: {dropped} of {count} {kind} cannot be used; is this the right dataset?")
        return warnings

    def list_examples(self) -> list[str]:
        """Return, for each kind of finding, a line with its count and advice, then at most ten examples."""
        by_code: dict[str, list[Finding]] = {}
        for finding in self.findings:
            by_code.setdefault(finding.code, []).append(finding)
        lines = []
        for code, found in by_code.items():
            advice = f"; {ADVICE[code]}" if code in ADVICE else ""
            outcome = "kept" if found[0].action == KEPT else "skipped"
            lines.append(f"  {len(found)} {_spell(code)}, {outcome}{advice}")
            for finding in found[:EXAMPLES_ON_SCREEN]:
                place = f" annotation {finding.annotation_id}" if finding.annotation_id is not None else ""
                lines.append(f"    {printable(finding.file)}{place}: {printable(finding.message)}")
            if len(found) > EXAMPLES_ON_SCREEN:
                lines.append(f"    ... and {len(found) - EXAMPLES_ON_SCREEN} more of this kind")
        return lines

    def list_lines(self) -> list[str]:
        """Return all lines to print: warnings, the summary, the examples."""
        return [*self.list_warnings(), self.summarize(), *self.list_examples()]

    def to_json(self) -> dict:
        """Return the content of `dataset_report.json`, without the usable objects, which the records hold."""
        skipped = [
            {"id": finding.annotation_id, "file": finding.file, "code": finding.code, "message": finding.message}
            for finding in self.findings
            if finding.action == SKIPPED_ANNOTATION
        ]
        return {"summary": self.summarize(), **asdict(self), "skipped": skipped}

    def _count(self, action: str, but: str = "") -> Counter:
        return Counter(finding.code for finding in self.findings if finding.action == action and finding.code != but)


def merge_reports(reports: Iterable[DatasetReport]) -> DatasetReport:
    """Return one report over several parts of a dataset."""
    merged = DatasetReport()
    for report in reports:
        merged.image_count += report.image_count
        merged.usable_image_count += report.usable_image_count
        merged.background_image_count += report.background_image_count
        merged.annotation_count += report.annotation_count
        merged.usable_annotation_count += report.usable_annotation_count
        merged.findings += report.findings
    return merged


def write_report(path: Path, content: dict) -> None:
    """Write a report as json."""
    write_json(path, content, indent=1)


def _spell(code: str) -> str:
    return code.replace("_", " ")


def _list_skipped(counts: Counter) -> str:
    if not counts:
        return ""
    kinds = ", ".join(f"{count} {_spell(code)}" for code, count in counts.most_common())
    return f", {counts.total()} skipped ({kinds})"


UNNAMED_CATEGORY = "object"
MIN_AREA_PIXELS = 1.0  # of the input frame: of a smaller object the model sees nothing


@dataclass(slots=True)
class Annotation:
    """One object. Takes a few hundred bytes, since a dataset can have millions."""

    id: int
    category_id: int
    counts: bytes  # compressed run lengths of the mask, as in pycocotools
    area: int  # pixels inside the mask
    box: list[int]  # of the mask, XYWH
    source_id: int | str | None = None  # the id in the file that it was read from


@dataclass(slots=True)
class Record:
    """One image and its objects."""

    image_id: int
    file_name: str
    path: Path
    size: tuple[int, int]
    annotations: list[Annotation]
    crowds: list[bytes] = field(default_factory=list)  # run lengths of regions where no prediction counts as wrong
    digest: str = ""  # hash of the file's bytes: equal for copies of an image under two names
    crowd_categories: list[int | None] = field(default_factory=list)  # one for each crowd; None: any category

    def rle(self, annotation: Annotation) -> dict:
        return {"size": list(self.size), "counts": annotation.counts}

    def list_crowds(self) -> list[tuple[bytes, int | None]]:
        """Return crowd regions with the id of their category; None: any category."""
        return list(zip(self.crowds, self.crowd_categories or [None] * len(self.crowds), strict=True))


@dataclass
class Index:
    """One part of a dataset, read and checked."""

    records: list[Record]  # by image id, including images without objects
    categories: dict[int, str]
    report: DatasetReport
