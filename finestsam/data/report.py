"""What was found wrong in a dataset, counted by kind, with examples for the screen and everything for the file."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

EXAMPLES_ON_SCREEN = 10


@dataclass
class Finding:
    """One picture or annotation that was skipped, or used with a remark."""

    code: str
    file: str
    image_id: int | None
    annotation_id: int | None
    message: str
    action: str  # "skipped" or "kept"


@dataclass
class DatasetReport:
    """Counts and findings of one annotation file."""

    image_count: int = 0
    usable_image_count: int = 0
    background_image_count: int = 0  # pictures without objects: not trained on
    annotation_count: int = 0
    usable_annotation_count: int = 0
    findings: list[Finding] = field(default_factory=list)

    def skip_image(self, code: str, file: str, image_id: int | None, message: str) -> None:
        self.findings.append(Finding(code, file, image_id, None, message, "skipped"))

    def skip_annotation(self, code: str, file: str, image_id: int | None, annotation_id: object, message: str) -> None:
        number = annotation_id if isinstance(annotation_id, int) else None
        self.findings.append(Finding(code, file, image_id, number, message, "skipped_annotation"))

    def remark(self, code: str, file: str, message: str) -> None:
        self.findings.append(Finding(code, file, None, None, message, "kept"))

    @property
    def defect_count(self) -> int:
        """What a strict reader refuses: everything skipped but crowds, which are sound and only not trainable."""
        return sum(finding.action != "kept" and finding.code != "crowd" for finding in self.findings)

    def summarize(self) -> str:
        """Return the one line for the screen."""
        images = self._count("skipped")
        annotations = self._count("skipped_annotation")
        return (
            f"dataset: {self.image_count} images, {self.usable_image_count} usable{_list_skipped(images)}"
            f"{f', {self.background_image_count} without objects' if self.background_image_count else ''}; "
            f"{self.annotation_count} annotations, {self.usable_annotation_count} usable{_list_skipped(annotations)}"
        )

    def list_examples(self) -> list[str]:
        """Return at most ten lines per kind of finding."""
        lines = []
        for code in dict.fromkeys(finding.code for finding in self.findings if finding.code != "crowd"):
            found = [finding for finding in self.findings if finding.code == code]
            for finding in found[:EXAMPLES_ON_SCREEN]:
                place = f" annotation {finding.annotation_id}" if finding.annotation_id is not None else ""
                lines.append(f"  {finding.file}{place}: {finding.message}")
            if len(found) > EXAMPLES_ON_SCREEN:
                lines.append(f"  ... and {len(found) - EXAMPLES_ON_SCREEN} more of this kind")
        return lines

    def write(self, path: Path) -> None:
        """Write everything as json."""
        content = asdict(self) | {"summary": self.summarize()}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _count(self, action: str) -> Counter:
        return Counter(finding.code for finding in self.findings if finding.action == action)


def merge_reports(reports: list[DatasetReport]) -> DatasetReport:
    """Return one report over several annotation files."""
    merged = DatasetReport()
    for report in reports:
        merged.image_count += report.image_count
        merged.usable_image_count += report.usable_image_count
        merged.background_image_count += report.background_image_count
        merged.annotation_count += report.annotation_count
        merged.usable_annotation_count += report.usable_annotation_count
        merged.findings += report.findings
    return merged


def _list_skipped(counts: Counter) -> str:
    if not counts:
        return ""
    kinds = ", ".join(f"{count} {code.replace('_', ' ')}" for code, count in counts.most_common())
    return f", {counts.total()} skipped ({kinds})"
