import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest

from finestsam.config import DatasetConfig
from finestsam.data import cache
from finestsam.data.read import read_parts, read_training_set
from finestsam.errors import Defect, UserError
from finestsam.formats.coco import load_json
from finestsam.formats.files import FileFinder
from finestsam.formats.layouts import Part, find_layout
from finestsam.images.files import write_image
from finestsam.masks import decode_rle, encode_mask, rle_to_json

SQUARE = [[1, 1, 4, 1, 4, 4, 1, 4]]


def make_annotation(number: int, **changes: object) -> dict:
    return {"id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": SQUARE} | changes


def read_plain(folder, **settings):
    return read_parts(find_layout(folder), DatasetConfig(**{"use_cache": False} | settings), ["all"])["all"]


def test_a_sound_dataset_is_read_with_boxes_and_areas_of_the_masks(coco_folder):
    index = read_plain(coco_folder([make_annotation(7, bbox=[0, 0, -3, 1], area=9999)]))

    (record,) = index.records
    (annotation,) = record.annotations
    assert (record.size, annotation.id, annotation.area, annotation.box) == ((10, 12), 7, 9, [1, 1, 3, 3])
    assert decode_rle(record.rle(annotation)).sum() == 9
    assert index.categories == {1: "thing"}
    assert index.report.summarize() == "dataset: 1 images, 1 usable; 1 annotations, 1 usable"


def test_what_cannot_be_used_is_skipped_counted_and_shown(coco_folder):
    index = read_plain(
        coco_folder(
            [
                make_annotation(1),
                make_annotation(2, segmentation=[]),
                make_annotation(3, image_id=99),
                make_annotation(4, iscrowd=1),
                make_annotation(5, segmentation=[[1, 1, 5, 5]]),
                make_annotation(6, segmentation=None),
                "nonsense",
            ]
        )
    )

    assert [annotation.id for annotation in index.records[0].annotations] == [1]
    assert index.report.summarize() == (
        "dataset: 1 images, 1 usable; 7 annotations, 1 usable, 6 skipped "
        "(2 unknown image, 2 empty segmentation, 1 crowd, 1 too few points)"
    )
    assert "    a.png annotation 2: empty segmentation" in index.report.list_examples()
    assert index.report.defect_count == 5  # a crowd is no defect


def test_ids_written_as_text_or_floats_are_the_same_ids(coco_folder):
    images = [{"id": "1", "file_name": "a.png", "width": "12", "height": 10.0}]
    folder = coco_folder([make_annotation(1, image_id=1.0), make_annotation("2", image_id="1")], images=images)

    assert [annotation.id for annotation in read_plain(folder).records[0].annotations] == [1, 2]


def test_duplicate_and_missing_annotation_ids_lose_no_annotation(coco_folder):
    missing = make_annotation(0)
    del missing["id"]
    index = read_plain(coco_folder([make_annotation(0), make_annotation(0), make_annotation(0), missing]))

    assert len({annotation.id for annotation in index.records[0].annotations}) == 4
    assert any("2 annotations had the id of another" in line for line in index.report.list_examples())


def test_a_missing_size_is_taken_from_the_file_and_a_wrong_one_refused(coco_folder):
    index = read_plain(coco_folder([make_annotation(1)], images=[{"id": 1, "file_name": "a.png"}]))
    assert index.records[0].size == (10, 12)

    folder = coco_folder([make_annotation(1)], images=[{"id": 1, "file_name": "a.png", "width": 40, "height": 30}])
    with pytest.raises(UserError, match="size mismatch: the annotations say 40 x 30, the file has 12 x 10"):
        read_training_set(DatasetConfig(path=str(folder), use_cache=False))


def test_a_byte_order_mark_is_read_over(coco_folder):
    folder = coco_folder([make_annotation(1)])
    path = folder / "annotations.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert len(read_plain(folder).records) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: .* at line 1 column"),
        ("[]", "expected an object with images, annotations and categories, got a list"),
        ('[{"image_id": 1, "score": 0.5}]', "looks like a list of COCO results"),
        ("3", "expected an object"),
        ('{"images": [], "categories": []}', "`annotations` is missing"),
        ('{"annotations": []}', "`images` is missing"),
        ('{"shapes": [], "imagePath": "a.png"}', "labelme"),
        ("[" * 200_000, "nested too deeply|not JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "nothing to train on"),
    ],
)
def test_a_file_that_is_no_coco_annotations_is_refused(coco_folder, text, message):
    folder = coco_folder([])
    (folder / "annotations.json").write_text(text)

    with pytest.raises(UserError, match=message):
        read_training_set(DatasetConfig(path=str(folder), use_cache=False))


def test_one_image_id_for_two_files_is_refused(coco_folder):
    images = [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]
    folder = coco_folder([make_annotation(1)], images=images)
    write_image(folder / "images" / "b.png", np.zeros((10, 12, 3), dtype=np.uint8))

    with pytest.raises(UserError, match="two images have the id 1: 'a.png' and 'b.png'"):
        read_plain(folder)


@pytest.mark.parametrize(
    "name", ["a.png", "images\\a.png", "..\\upload\\a.png", "../../a.png", "/tmp/a.png", "C:\\a.png"]
)
def test_an_image_is_found_inside_the_dataset_alone(coco_folder, name):
    folder = coco_folder([])

    assert (
        FileFinder(Part(folder / "images", folder, "coco", folder), DatasetConfig())(name)[0]
        == folder / "images" / "a.png"
    )


@pytest.mark.parametrize("name", ["../annotations.json", "/etc/passwd", "..\\..\\etc\\passwd", "http://host/x.png"])
def test_a_name_that_leads_outside_is_never_opened(coco_folder, name):
    folder = coco_folder([])

    with pytest.raises(Defect, match="leads outside the dataset"):
        FileFinder(Part(folder / "images", folder, "coco", folder), DatasetConfig())(name)


def test_the_cached_index_is_the_index_until_a_file_changes(coco_folder, tmp_path_factory):
    folder = coco_folder([make_annotation(1), make_annotation(2, segmentation=[])])
    kept = {"use_cache": True, "sav": "index.json"}

    first = read_plain(folder, **kept)
    again = read_plain(folder, **kept)

    assert again.records == first.records == read_plain(folder).records
    assert again.categories == first.categories
    assert again.report == first.report
    coco_folder([make_annotation(5)])
    assert [annotation.id for annotation in read_plain(folder, **kept).records[0].annotations] == [5]


@pytest.mark.parametrize("poison", ["{garbage", "", "[]", "key changed", "body changed"])
def test_a_poisoned_cache_is_made_anew(coco_folder, poison):
    folder = coco_folder([make_annotation(5)])
    kept = {"use_cache": True, "sav": "index.json"}
    read_plain(folder, **kept)
    path = folder / "index.json"
    changed = {"key changed": ('"key": "', '"key": "0'), "body changed": ("[1, 1, 3, 3]", "[0, 0, 9, 9]")}
    path.write_text(path.read_text().replace(*changed[poison]) if poison in changed else poison)

    (annotation,) = read_plain(folder, **kept).records[0].annotations

    assert (annotation.id, annotation.box) == (5, [1, 1, 3, 3])


def forge(path, change, sign):
    """Change what a cached index says, and sign it."""
    head, body = path.read_text().split("\n", 1)
    content = json.loads(body)
    change(content["records"][0])
    key, body = json.loads(head)["key"], json.dumps(content)
    path.write_text(json.dumps({"key": key} | sign(key, body)) + "\n" + body)


def sign_by_hash(key, body):
    return {"sha256": hashlib.sha256(body.encode()).hexdigest()}


def sign_by_guess(key, body):
    return {"signature": hashlib.sha256(body.encode()).hexdigest()}


def sign_by_own_key(key, body):
    return {"signature": cache._sign(key, body)}


def move_box(record):
    record["annotations"][0][4] = [0, 0, 9, 9]


@pytest.mark.parametrize("sign", [sign_by_hash, sign_by_guess])
def test_a_cache_whose_hash_was_computed_again_is_made_anew(coco_folder, sign):
    folder = coco_folder([make_annotation(5)])
    kept = {"use_cache": True, "sav": "index.json"}
    read_plain(folder, **kept)
    forge(folder / "index.json", move_box, sign)

    assert read_plain(folder, **kept).records[0].annotations[0].box == [1, 1, 3, 3]


@pytest.mark.parametrize("counts", ["", "0", "oooo", "P3", "Z?d0l0", "é", "0" * 99])
def test_run_lengths_of_a_cache_are_checked_whoever_signed_them(coco_folder, counts):
    folder = coco_folder([make_annotation(5)])
    kept = {"use_cache": True, "sav": "index.json"}
    whole = read_plain(folder, **kept).records
    for change in (
        lambda record: record["annotations"][0].__setitem__(2, counts),
        lambda record: record.update(crowds=[counts]),
    ):
        forge(folder / "index.json", change, sign_by_own_key)
        assert read_plain(folder, **kept).records == whole


@pytest.mark.parametrize("place", ["../secret.png", "images/link.png", "images/../../secret.png"])
def test_images_of_a_cache_lie_in_the_dataset_whoever_signed_them(coco_folder, place):
    folder = coco_folder([make_annotation(5)])
    secret = folder.parent / "secret.png"
    secret.write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(secret)
    kept = {"use_cache": True, "sav": "index.json"}
    read_plain(folder, **kept)
    forge(folder / "index.json", lambda record: record.update(path=str(folder / place)), sign_by_own_key)

    assert read_plain(folder, **kept).records[0].path.name == "a.png"


def test_the_cache_of_another_user_is_not_believed(coco_folder, tmp_path_factory, monkeypatch):
    folder = coco_folder([make_annotation(5)])
    kept = {"use_cache": True, "sav": "index.json"}
    read_plain(folder, **kept)
    with monkeypatch.context() as other:
        other.setenv("FINESTSAM_CACHE", str(tmp_path_factory.mktemp("other")))
        forge(folder / "index.json", move_box, sign_by_own_key)

    assert read_plain(folder, **kept).records[0].annotations[0].box == [1, 1, 3, 3]


def test_a_cache_that_is_no_plain_file_is_not_opened(coco_folder, tmp_path_factory):
    folder = coco_folder([make_annotation(5)])
    kept = {"use_cache": True, "sav": "index.json"}
    read_plain(folder, **kept)
    moved = (folder / "index.json").rename(tmp_path_factory.mktemp("other") / "index.json")
    (folder / "index.json").symlink_to(moved)
    before = moved.read_bytes()
    assert len(read_plain(folder, **kept).records) == 1
    assert moved.read_bytes() == before and not (folder / "index.json").is_symlink()

    (folder / "index.json").unlink()
    os.mkfifo(folder / "index.json")
    assert len(read_plain(folder, **kept).records) == 1


@pytest.mark.slow
def test_an_index_of_the_size_of_coco_val2017_takes_seconds_and_little_memory(tmp_path):
    """5 000 images, 36 000 objects: 20-gons and run lengths as large as COCO's."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "0.png", np.zeros((480, 640, 3), dtype=np.uint8))
    data = (tmp_path / "images" / "0.png").read_bytes()
    images = []
    for number in range(5000):
        (tmp_path / "images" / f"{number}.png").write_bytes(data)
        images.append({"id": number, "file_name": f"{number}.png", "width": 640, "height": 480})
    rle = rle_to_json(encode_mask(generator.random((480, 640)) > 0.999))
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    annotations = []
    for number in range(36_000):
        polygon = circle * generator.uniform(5, 120, size=2) + generator.uniform((0, 0), (640, 480))
        segmentation = rle if number % 100 == 0 else [polygon.flatten().round(2).tolist()]
        annotations.append(make_annotation(number, image_id=number % 5000, segmentation=segmentation))
    (tmp_path / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": []})
    )

    tracemalloc.start()
    index = read_plain(tmp_path)
    _, peak = tracemalloc.get_traced_memory()

    assert index.report.usable_annotation_count > 34_000
    assert peak < 500e6


def test_a_pipe_in_place_of_annotations_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "results.json")

    with pytest.raises(UserError, match="results.json: not a regular file"):
        load_json(tmp_path / "results.json")
