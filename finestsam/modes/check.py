"""`--mode check`: read a whole dataset; print its defects and the share of objects that the generator can reach."""

from collections import Counter
from pathlib import Path

import numpy as np

from finestsam.config import GENERATOR_DEFAULTS, IMAGE_SIZES, Config
from finestsam.data.contact_sheet import render_contact_sheet
from finestsam.data.coverage import SIZES, measure_reach, name_size
from finestsam.data.labels import describe_labels
from finestsam.data.read import describe_dataset, list_categories, read_parts, report_vanishing
from finestsam.errors import printable
from finestsam.formats.layouts import find_layout
from finestsam.images.files import write_image
from finestsam.records import DatasetReport, Index, Record, merge_reports, write_report
from finestsam.runtime.folders import claim_output_folder

REPORT_NAME, SHEET_NAME = "dataset_report.json", "samples.png"


def check(config: Config) -> int:
    """Read a dataset as training would, and write `dataset_report.json` and a contact sheet into out_dir.

    Returns:
        0; 2 where nothing can be trained on, or where `strict` is set and there is a defect.
    """
    names = [REPORT_NAME, SHEET_NAME] if config.check.samples else [REPORT_NAME]
    folder = claim_output_folder(Path(config.out_dir), config.dataset.path, names)
    layout = find_layout(Path(config.dataset.path), config.dataset.auto_split)
    indexes = read_parts(layout, config.dataset, list(layout.parts))
    report = merge_reports(index.report for index in indexes.values())
    records = [record for index in indexes.values() for record in index.records]
    _drop_vanishing(config, records, report)
    statistics = describe_records(indexes)
    reach = measure_reach(records)
    content = describe_dataset(report, records) | {"layout": layout.name, "statistics": statistics, "reach": reach}
    write_report(folder / REPORT_NAME, content)
    print("\n".join([f"layout: {layout.name}", *report.list_lines()]))
    if records:
        labels = describe_labels(records, config.dataset.labels)
        print("\n".join([*_list_statistics(statistics), *labels, *_list_reach(reach)]))
    _write_sheet(config, folder / SHEET_NAME, records)
    print(f"report: {folder / REPORT_NAME}")
    return _choose_exit_code(config, report)


def describe_records(indexes: dict[str, Index]) -> dict:
    """Return counts of images, objects and categories, and the spread of their sizes."""
    records = [record for index in indexes.values() for record in index.records]
    annotations = [found for record in records for found in record.annotations]
    names = {name: index.categories for name, index in indexes.items()}
    categories = Counter(
        names[part][found.category_id]
        for part, index in indexes.items()
        for record in index.records
        for found in record.annotations
    )
    return {
        "images": {name: len(index.records) for name, index in indexes.items()},
        "width_pixels": _spread([record.size[1] for record in records]),
        "height_pixels": _spread([record.size[0] for record in records]),
        "objects_per_image": _spread([len(record.annotations) for record in records]),
        "object_area_pixels": _spread([found.area for found in annotations]),
        "objects_by_size": {size: sum(name_size(found.area) == size for found in annotations) for size in SIZES},
        "objects_by_category": {name: categories[name] for name in list_categories(indexes)},
        "crowd_regions": sum(len(record.crowds) for record in records),
    }


def _drop_vanishing(config: Config, records: list[Record], report: DatasetReport) -> None:
    """Report the objects that training leaves out at the model's image size, and remove them from `records`."""
    image_size = config.model.image_size or IMAGE_SIZES.get(config.model.type, IMAGE_SIZES["vit_b"])
    for record, annotation in report_vanishing(records, image_size, report):
        record.annotations.remove(annotation)


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    return {"smallest": min(values), "median": float(np.median(values)), "largest": max(values)}


def _list_statistics(statistics: dict) -> list[str]:
    def show(name: str) -> str:
        spread = statistics[name]
        return f"{spread['smallest']:.0f} to {spread['largest']:.0f}, median {spread['median']:.0f}" if spread else "-"

    categories = sorted(statistics["objects_by_category"].items(), key=lambda item: -item[1])
    used = [f"{printable(name)} {count}" for name, count in categories if count]
    more = f", and {len(used) - 10} more" if len(used) > 10 else ""
    unused = f"; {len(categories) - len(used)} without objects" if len(used) < len(categories) else ""
    sizes = ", ".join(f"{count} {name}" for name, count in statistics["objects_by_size"].items())
    return [
        f"images: width {show('width_pixels')}; height {show('height_pixels')} pixels",
        f"objects: {show('objects_per_image')} an image; area {show('object_area_pixels')} pixels; {sizes}",
        f"categories: {', '.join(used[:10])}{more}{unused}",
    ]


def _list_reach(reach: dict[str, dict[str, float]]) -> list[str]:
    lines = ["share of objects with a point of the generator's grid inside, the upper limit of its recall:"]
    for grid, shares in reach.items():
        parts = ", ".join(f"{group} {share:.1%}" for group, share in shares.items())
        lines.append(f"  points_per_side {grid}: {parts}")
    return lines


def _write_sheet(config: Config, path: Path, records: list[Record]) -> None:
    shown = [record for record in records if record.annotations]
    if not config.check.samples or not shown:
        return
    points_per_side = config.generator.points_per_side or GENERATOR_DEFAULTS["points_per_side"]
    write_image(path, render_contact_sheet(shown, config.check.samples, config.dataset, points_per_side))
    print(f"images with masks and prompts: {path}")


def _choose_exit_code(config: Config, report: DatasetReport) -> int:
    if report.usable_annotation_count == 0:
        print("nothing to train on")
        return 2
    if config.strict and report.defect_count:
        print(f"--strict: {report.defect_count} defects")
        return 2
    return 0
