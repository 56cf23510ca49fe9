"""CONFORMANCE E: splits and sizes."""

import json
import random
import shutil

import pytest
from conformance_zoo import assert_refused

from finestsam.cli import main
from finestsam.config import DatasetConfig
from finestsam.data.read import read_training_set
from finestsam.errors import UserError


def read(zoo, **settings):
    zoo.write()
    return read_training_set(DatasetConfig(path=str(zoo.root), use_cache=False, **settings))


def names(records) -> list[str]:
    return [record.file_name for record in records]


def add_images(zoo, count: int) -> None:
    for number in range(3, count + 1):
        zoo.write_image(f"{number}.png", seed=number)
        zoo.content["images"].append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 120})
        zoo.add(100 + number, image_id=number)


def test_case_79_one_image_cannot_be_split_but_trained_without_validation(zoo):
    zoo.content["images"].pop()
    zoo.annotations.pop()

    with pytest.raises(UserError, match="need at least 2 images to split; --dataset.val_size 0"):
        read(zoo)
    assert (names(read(zoo, val_size=0.0).train), read(zoo, val_size=0.0).val) == (["a.png"], [])
    assert zoo.check().code == 0


def test_case_80_two_images_give_one_to_each_side(zoo):
    data = read(zoo, val_size=0.1)

    assert len(data.train) == len(data.val) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [("1", "must lie in [0, 1)"), ("1.5", "must lie in [0, 1)"), ("-0.1", "must lie in [0, 1)"), ("abc", "a number")],
)
def test_case_80_shares_that_are_none_are_refused(zoo, value, message):
    assert_refused(zoo.check(f"--dataset.val_size={value}"), message)


def test_case_81_the_split_does_not_depend_on_the_order_of_the_file(zoo):
    add_images(zoo, 20)
    before = read(zoo, val_size=0.3)

    random.Random(0).shuffle(zoo.content["images"])
    random.Random(1).shuffle(zoo.annotations)
    after = read(zoo, val_size=0.3)

    assert (names(before.train), names(before.val)) == (names(after.train), names(after.val))
    assert names(read(zoo, val_size=0.3, seed=7).val) != names(before.val)


def test_case_81_copies_of_an_image_stay_on_one_side(zoo):
    add_images(zoo, 12)
    for number in range(3, 13, 2):
        shutil.copy(zoo.images_dir / f"{number}.png", zoo.images_dir / f"{number + 1}.png")

    for seed in range(10):
        data = read(zoo, val_size=0.4, seed=seed)
        assert not {record.digest for record in data.train} & {record.digest for record in data.val}


def make_split_folders(zoo, names: tuple[str, ...] = ("train", "val")) -> None:
    zoo.write()
    for name in names:
        shutil.copytree(zoo.root / "data", zoo.root / name)
    shutil.rmtree(zoo.root / "data")
    zoo.annotation_file = zoo.root / names[0] / "annotations.json"


def test_case_82_images_on_both_sides_are_reported(zoo):
    make_split_folders(zoo)

    outcome = zoo.check()

    assert outcome.remarks.count("leakage") == 2
    assert "the same image as a.png of train" in outcome.message("leakage")


def test_case_83_an_empty_val_is_refused_and_a_missing_one_split(zoo):
    make_split_folders(zoo)
    (zoo.root / "val" / "annotations.json").unlink()
    shutil.rmtree(zoo.root / "val" / "images")
    assert_refused(zoo.check(), "val/ has no labels")

    (zoo.root / "val").rmdir()
    outcome = zoo.check()
    assert outcome.code == 0
    assert "train to be split" in outcome.report["layout"]


def test_case_83_two_layouts_at_once_need_a_word(zoo):
    make_split_folders(zoo)
    shutil.copytree(zoo.root / "train", zoo.root / "data")

    assert_refused(zoo.check(), "has both data/ and train/")
    assert zoo.check("--dataset.auto_split=true").report["image_count"] == 2
    assert zoo.check("--dataset.auto_split=false").report["image_count"] == 4


def test_case_84_a_dataset_smaller_than_a_batch_trains(zoo, tmp_path):
    zoo.write()
    arguments = ["--mode=train", f"--dataset={zoo.root}", f"--sav_dir={tmp_path / 'sav'}", "--run_name=run"]
    arguments += ["--model.type=vit_tiny_test", "--model.checkpoint=none", "--device=cpu", "--num_workers=0"]

    assert main([*arguments, "--num_epochs=2", "--batch_size=8"]) == 0

    rows = (tmp_path / "sav" / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3  # the header, the baseline, two epochs


def test_case_85_categories_of_the_parts_are_matched_by_name(zoo):
    make_split_folders(zoo)
    content = json.loads(json.dumps(zoo.content))
    content["categories"] = [{"id": 0, "name": "tree"}, {"id": 7, "name": "parcel"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 7
    (zoo.root / "val" / "annotations.json").write_text(json.dumps(content))

    outcome = zoo.check()
    data = read(zoo)

    assert "matched by name" in outcome.message("categories_differ")
    assert outcome.report["statistics"]["objects_by_category"] == {"parcel": 8, "tree": 0}
    assert {found.category_id for record in data.train + data.val for found in record.annotations} == {1}
    assert data.categories == ["parcel", "tree"]
