"""`--mode convert`: write any readable dataset in finestSAM's layout, with pixel-exact masks."""

import os
import re
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from finestsam.config import Config
from finestsam.data.read import describe_dataset, list_categories, read_parts, refuse_empty
from finestsam.data.split import split_records
from finestsam.errors import UserError, printable
from finestsam.formats.layouts import ANNOTATION_FILE, find_layout
from finestsam.masks import rle_area, rle_box, rle_to_json
from finestsam.records import Annotation, Index, Record, merge_reports, write_report
from finestsam.runtime.folders import make_output_folder
from finestsam.runtime.whole_files import remove_unfinished, unfinished_folder, write_json

# Characters that some system forbids in names, or that a shell or a terminal interprets.
UNSAFE = re.compile(r'[<>:"|?*\x00-\x1f\x7f\\]')


def convert(config: Config) -> int:
    """Read a dataset and write it into out_dir, whole or not at all."""
    root, folder = Path(config.dataset.path), Path(config.out_dir)
    _check_target(root, folder)
    layout = find_layout(root, config.dataset.auto_split)
    indexes = read_parts(layout, config.dataset, list(layout.parts))
    report = merge_reports(index.report for index in indexes.values())
    print("\n".join([f"layout: {layout.name}", *report.list_lines()]))
    if config.strict and report.defect_count:
        raise UserError(f"--strict: {report.defect_count} defects; nothing is written")
    refuse_empty(config.dataset, next(iter(indexes.values())), report)
    parts = _divide(config, indexes)
    categories = {name: number for number, name in enumerate(list_categories(indexes), start=1)}
    names = next(iter(indexes.values())).categories
    numbers = {category_id: categories[name] for category_id, name in names.items()}
    try:
        remove_unfinished(folder.resolve().parent)
        with unfinished_folder(folder.resolve()) as unfinished:
            whole = unfinished / "dataset"
            for name, records in parts.items():
                _write_part(whole / name, records, categories, numbers, config.convert.images == "link")
            records = [record for records in parts.values() for record in records]
            write_report(whole / "dataset_report.json", describe_dataset(report, records))
            folder.rmdir()
            whole.replace(folder)
    except OSError as error:
        raise UserError(f"out_dir {printable(folder)}: cannot be written: {error.strerror or error}") from None
    counts = ", ".join(f"{len(records)} in {name}/" for name, records in parts.items())
    print(f"images: {counts}\nto train on them: python -m finestsam --mode train --dataset {printable(folder)}")
    return 0


def _check_target(root: Path, folder: Path) -> None:
    make_output_folder(folder, str(root))
    if root.resolve() in folder.resolve().parents:
        raise UserError(f"out_dir {printable(folder)} lies in the dataset, which is never written to")
    if any(folder.iterdir()):
        raise UserError(f"out_dir {printable(folder)} holds files; choose a new folder")


def _divide(config: Config, indexes: dict[str, Index]) -> dict[str, list[Record]]:
    """Return the images by the name of the folder that they go to."""
    if len(indexes) > 1:
        return {name: index.records for name, index in indexes.items()}
    (index,) = indexes.values()
    if not config.convert.split:
        return {"data": index.records}
    train, val = split_records(index.records, config.dataset.val_size, config.dataset.seed)
    return {"train": train, "val": val} if val else {"train": train}


def _write_part(
    folder: Path, records: list[Record], categories: dict[str, int], numbers: dict[int, int], links: bool
) -> None:
    """Write images/ and annotations.json.

    Args:
        categories: the new numbers by name.
        numbers: the new number of each category that the records have.
    """
    images, annotations = [], []
    taken: set[str] = set()
    next_id = 1 + max((found.id for record in records for found in record.annotations), default=0)
    for record in tqdm(records, desc=folder.name, disable=not sys.stderr.isatty(), leave=False):
        name = _choose_name(record, taken)
        _place_image(record.path, folder / "images" / name, links)
        height, width = record.size
        images.append({"id": record.image_id, "file_name": name, "width": width, "height": height})
        for found in record.annotations:
            annotations.append(_describe(record, found, found.id, numbers[found.category_id]))
        for counts, category_id in record.list_crowds():
            rle = {"size": list(record.size), "counts": counts}
            crowd = Annotation(next_id, 0, counts, rle_area(rle), rle_box(rle))
            annotations.append(_describe(record, crowd, next_id, numbers.get(category_id, 1), is_crowd=True))
            next_id += 1
    content = {
        "info": {"description": "converted by finestsam"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in categories.items()],
    }
    write_json(folder / ANNOTATION_FILE, content)


def _describe(
    record: Record, found: Annotation, annotation_id: int, category_id: int, is_crowd: bool = False
) -> dict[str, object]:
    return {
        "id": annotation_id,
        "image_id": record.image_id,
        "category_id": category_id,
        "iscrowd": int(is_crowd),
        "segmentation": rle_to_json(record.rle(found)),  # a polygon would lose pixels
        "area": found.area,
        "bbox": found.box,
    }


def _choose_name(record: Record, taken: set[str]) -> str:
    """Return a relative path for an image: its own with safe characters, and unique on every system."""
    steps = [UNSAFE.sub("_", step) for step in record.file_name.replace("\\", "/").split("/")]
    path = Path(*([step for step in steps if step.strip(". ")] or ["image"]))
    suffix = path.suffix or record.path.suffix
    stem, number, name = path.with_suffix("").as_posix(), 1, path.with_suffix(suffix).as_posix()
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}{suffix}"
    taken.add(name.casefold())
    return name


def _place_image(source: Path, target: Path, links: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if links:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copyfile(source, target)
