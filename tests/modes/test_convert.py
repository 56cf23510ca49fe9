import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finestsam.cli import main
from finestsam.config import DatasetConfig
from finestsam.data.read import read_parts
from finestsam.formats.layouts import find_layout
from finestsam.images.files import read_image, write_image
from finestsam.masks import decode_rle, encode_mask, rle_to_json
from finestsam.modes import convert as convert_module

SHARED = Path(__file__).parents[3] / "shared" / "data"


def convert(dataset: Path, out_dir: Path, *flags: str) -> int:
    return main(["--mode=convert", f"--dataset={dataset}", f"--out_dir={out_dir}", *flags])


def read(folder: Path, **settings) -> dict:
    layout = find_layout(folder)
    return read_parts(layout, DatasetConfig(use_cache=False, **settings), list(layout.parts))


def describe(indexes: dict) -> set:
    """Return what must survive, whatever the names and numbers: pixels, masks, categories, crowds."""
    return {
        (
            record.digest,
            record.size,
            tuple(sorted((found.counts, index.categories[found.category_id]) for found in record.annotations)),
            tuple(sorted((counts, index.categories.get(number)) for counts, number in record.list_crowds())),
        )
        for index in indexes.values()
        for record in index.records
    }


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Images turned by EXIF in both conventions, of one name in two folders, without objects; a crowd."""
    root = tmp_path / "mixed"
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, (name, orientation, is_upright) in enumerate(
        [("a.jpg", 6, True), ("b/a.jpg", 6, False), ("b/A.jpg", 1, True), ("empty.png", 1, True)], start=1
    ):
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path, exif=exif)
        height, width = (30, 20) if orientation == 6 and is_upright else (20, 30)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        if name != "empty.png":
            mask = np.zeros((height, width), dtype=bool)
            mask[2:9, 3:12] = True
            for is_crowd in (0, 1):
                mask[4, 5] = is_crowd  # a hole, which no polygon has
                annotations.append(
                    {
                        "id": 10 * number + is_crowd,
                        "image_id": number,
                        "category_id": 3 + number,
                        "iscrowd": is_crowd,
                        "segmentation": rle_to_json(encode_mask(mask)),
                    }
                )
    categories = [{"id": number, "name": f"kind {number}"} for number in (4, 5, 6)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("flags", [[], ["--convert.images=copy"], ["--convert.split=true", "--dataset.val_size=0.5"]])
def test_what_was_converted_reads_as_what_it_was_made_of(mixed, tmp_path, flags):
    assert convert(mixed, tmp_path / "out", *flags) == 0

    after = read(tmp_path / "out")
    assert describe(after) == describe(read(mixed))
    assert list(after) == (["train", "val"] if "--convert.split=true" in flags else ["all"])
    for index in after.values():
        for record in index.records:
            assert read_image(record.path, record.size).shape == (*record.size, 3)


@pytest.mark.parametrize("kind", ["link", "copy"])
def test_images_are_linked_or_copied(mixed, tmp_path, kind):
    convert(mixed, tmp_path / "out", f"--convert.images={kind}")

    one, other = mixed / "images" / "a.jpg", tmp_path / "out" / "data" / "images" / "a.jpg"
    assert os.path.samefile(one, other) == (kind == "link")
    assert not other.is_symlink()


def test_the_same_dataset_converts_to_the_same_bytes(mixed, tmp_path):
    for name in ("one", "two"):
        convert(mixed, tmp_path / name)

    one, two = (tmp_path / name / "data" / "annotations.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert str(tmp_path) not in one.read_text()


def test_folders_that_are_split_stay_so(scenes, tmp_path):
    for name in ("train", "valid", "test"):
        shutil.copytree(scenes / "data" / "images", tmp_path / "roboflow" / name)
        content = json.loads((scenes / "data" / "annotations.json").read_text())
        (tmp_path / "roboflow" / name / "_annotations.coco.json").write_text(json.dumps(content))

    assert convert(tmp_path / "roboflow", tmp_path / "out") == 0

    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["test", "train", "val"]
    assert describe(read(tmp_path / "out")) == describe(read(tmp_path / "roboflow"))


def test_a_folder_that_holds_files_or_is_the_dataset_is_refused(mixed, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for folder, message in (
        (tmp_path / "full", "holds files; choose a new folder"),
        (mixed, "is the dataset, which is never written to"),
        (mixed / "images" / "new", "lies in the dataset"),
    ):
        assert convert(mixed, folder) == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(mixed, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_report", interrupt)

    assert convert(mixed, tmp_path / "out") == 130
    assert [path.name for path in tmp_path.iterdir() if path.name != "mixed"] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_conversion_left_is_removed_by_the_next(mixed, tmp_path):
    script = f"""
        import os, signal
        from finestsam.cli import main
        from finestsam.modes import convert
        convert.write_report = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        main(["--mode=convert", "--dataset={mixed}", "--out_dir={tmp_path / "out"}"])
    """
    (tmp_path / ".out.4194303.part").mkdir()  # somebody else's
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=300, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 4

    assert convert(mixed, tmp_path / "out") == 0

    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.4194303.part", "mixed", "out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "dataset_report.json"]


def test_nothing_usable_and_strict_write_nothing(mixed, coco_folder, tmp_path_factory, capsys):
    nothing, out = coco_folder([{"id": 1, "image_id": 1, "segmentation": []}]), tmp_path_factory.mktemp("out")

    assert convert(nothing, out) == 2
    assert "nothing to train on" in capsys.readouterr().err
    (mixed / "images" / "a.jpg").write_bytes(b"")
    assert convert(mixed, out, "--strict") == 2
    assert not list((out).iterdir())


def test_names_that_would_be_harmful_are_changed(coco_folder, tmp_path):
    dataset = coco_folder(
        [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
        images=[{"id": 1, "file_name": "..\\..\\up\\a.png"}],
    )
    write_image(dataset / "images" / "a.png", np.zeros((10, 12, 3), dtype=np.uint8))

    assert convert(dataset, tmp_path.parent / f"{tmp_path.name}_out") == 0

    folder = tmp_path.parent / f"{tmp_path.name}_out" / "data" / "images"
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.png")] == ["up/a.png"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the samples are not here")
@pytest.mark.parametrize(("name", "count", "least_iou"), [("labelme_sample/nuts", 101, 1.0), ("mask_pairs", 220, 0.95)])
def test_real_samples_convert_to_what_their_authors_have(tmp_path, name, count, least_iou):
    shutil.copytree(SHARED / name, tmp_path / "sample")
    reference_file = (tmp_path / "sample" / "reference_coco.json").rename(tmp_path / "sample" / "images" / "r.json")

    assert convert(tmp_path / "sample", tmp_path / "out", "--dataset.min_region_pixels=50") == 0

    (index,), (reference,) = read(tmp_path / "out").values(), read(reference_file).values()
    assert sum(len(record.annotations) for record in index.records) == count
    by_name = {record.file_name: record for record in reference.records}
    ious = []
    for record in index.records:
        theirs = [decode_rle(record.rle(found)) for found in by_name[record.file_name].annotations]
        for found in record.annotations:
            mask = decode_rle(record.rle(found))
            ious.append(max((mask & other).sum() / (mask | other).sum() for other in theirs))
    assert min(ious) >= least_iou
    assert np.mean(ious) > 0.99
