"""Awkward annotation files by other people, where they lie beside the checkout."""

import json
from pathlib import Path

import pytest

from finestsam.config import DatasetConfig
from finestsam.data.read import read_parts
from finestsam.formats.layouts import find_layout
from finestsam.images.files import read_image

AWKWARD = Path(__file__).parents[3] / "shared" / "data" / "awkward"
FOLDERS = [path for path in sorted(AWKWARD.glob("*")) if (path / "annotations.json").is_file()]


@pytest.mark.skipif(not FOLDERS, reason="the samples are not here")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_awkward_files_give_the_objects_that_are_expected(folder):
    expected = json.loads((folder / "EXPECTED.json").read_text())

    layout = find_layout(folder)
    index = read_parts(layout, DatasetConfig(use_cache=False), list(layout.parts))["all"]

    found = [(a.source_id, a.area, a.box) for record in index.records for a in record.annotations]
    skipped = {finding.annotation_id for finding in index.report.findings if finding.action == "skipped_annotation"}
    if "usable" in expected:
        assert sorted(found) == sorted((entry["id"], entry["area"], entry["box"]) for entry in expected["usable"])
    if "usable_each" in expected:
        each = [(entry["area"], entry["box"]) for entry in expected["usable_each"]]
        assert [found[1:] for found in found] == each * len(index.records)
    assert skipped >= set(expected.get("skip", [])) | set(expected.get("crowd", []))
    if "present" in expected:
        assert sorted(record.file_name for record in index.records) == sorted(expected["present"])
    for record in index.records:
        image = read_image(record.path, record.size)
        assert image.shape == (*record.size, 3)
        assert 5 < image.mean() < 250
