"""CONFORMANCE A: the structure of annotation files."""

import json

import pytest
from conformance_zoo import BOXES, assert_refused, assert_skipped

SOUND = {number: (width * height, [x, y, width, height]) for number, (x, y, width, height) in BOXES.items()}


def test_a_sound_dataset_is_usable_whole(zoo):
    outcome = zoo.check("--strict")

    assert (outcome.code, outcome.usable, outcome.report["findings"]) == (0, SOUND, [])
    assert "dataset: 2 images, 2 usable; 4 annotations, 4 usable" in outcome.out


def test_case_01_missing_annotations_name_the_place_and_what_is_nearby(zoo):
    zoo.write()
    zoo.annotation_file.rename(zoo.root / "data" / "labels.txt")
    (zoo.root / "other.json").write_text("{}")
    zoo.annotation_file = zoo.root / "ignored.txt"

    outcome = zoo.check()

    assert_refused(outcome, "annotations.json is missing")
    assert "other.json" in outcome.err
    assert "train/ and val/" in outcome.err


@pytest.mark.parametrize("text", ["{", '{"images": [', "{'images': []}", '{"images": []} extra'])
def test_case_02_what_is_not_json_is_reported_with_line_and_column(zoo, text):
    assert_refused(zoo.check(text=text), "not JSON")
    assert "annotations.json" in zoo.check(text=text).err
    assert "at line 1 column" in zoo.check(text=text).err


def test_case_03_a_byte_order_mark_is_read_over(zoo):
    assert zoo.check(text=b"\xef\xbb\xbf" + json.dumps(zoo.content).encode()).usable == SOUND


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object with images, annotations and categories, got a list"),
        ("3", "expected an object"),
        ('"text"', "expected an object"),
        ("null", "expected an object"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.9}]', "list of COCO results"),
        ('[{"image_id": 1, "segmentation": {"size": [9, 9], "counts": "a"}, "score": 0.9}]', "list of COCO results"),
    ],
)
def test_case_04_a_list_or_number_is_refused_and_results_are_recognised(zoo, text, message):
    assert_refused(zoo.check(text=text), message)


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_case_05_a_missing_key_is_named(zoo, key):
    del zoo.content[key]

    assert_refused(zoo.check(), f"`{key}` is missing")


@pytest.mark.parametrize("categories", [..., [], None, 3])
def test_case_05_without_categories_everything_is_one_class(zoo, categories):
    zoo.content["categories"] = categories
    if categories is ...:
        del zoo.content["categories"]

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert "no_categories" in outcome.remarks
    assert "object" in outcome.out


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_case_06_nothing_to_train_on_is_an_error_with_the_summary(zoo, key):
    zoo.content[key] = []

    outcome = zoo.check()

    assert outcome.code == 2
    assert "nothing to train on" in outcome.out + outcome.err
    assert "0 usable" in outcome.out


def test_case_07_duplicate_annotation_ids_are_renumbered_and_none_is_lost(zoo):
    for annotation in zoo.annotations:
        annotation["id"] = 0

    outcome = zoo.check()

    assert len(outcome.report["usable"]) == 4
    assert "3 annotations had the id of another" in outcome.message("renumbered")


def test_case_08_one_image_id_for_two_files_is_refused_and_twice_the_same_is_taken_once(zoo):
    zoo.content["images"].append(dict(zoo.content["images"][0]))
    outcome = zoo.check()
    assert (outcome.usable, outcome.remarks) == (SOUND, ["listed_twice"])

    zoo.content["images"][-1]["file_name"] = "b.png"
    assert_refused(zoo.check(), "two images have the id 1: 'a.png' and 'b.png'")


def test_case_09_two_entries_of_one_file_are_reported(zoo):
    zoo.content["images"].append(dict(zoo.content["images"][0], id=3))

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert "file_listed_twice" in outcome.remarks


@pytest.mark.parametrize("image_id", [99, "x", None, [1], float("nan"), True])
def test_case_10_an_annotation_of_an_unknown_image_is_skipped(zoo, image_id):
    zoo.add(9, image_id=image_id)

    assert_skipped(zoo, 9, "unknown_image")


def test_case_11_an_unknown_category_is_kept_and_reported(zoo):
    zoo.annotations[0]["category_id"] = 9

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert "category_id 9 is not in the file's categories 1" in outcome.message("unknown_category")


def test_case_12_ids_as_text_or_floats_lose_no_annotation(zoo):
    zoo.content["images"][0]["id"], zoo.content["images"][1]["id"] = "1", 2.0
    zoo.annotations[0].update(id="1", image_id=1.0, category_id="1")
    zoo.annotations[1].update(id=2.0, image_id="1", category_id=1.0)
    zoo.annotations[2].update(id="part-3")
    zoo.annotations[3].update(image_id="2")

    outcome = zoo.check()

    assert outcome.usable == {"1": SOUND[1], 2: SOUND[2], "part-3": SOUND[3], 4: SOUND[4]}
    assert "unknown_category" not in outcome.remarks


def test_case_13_a_missing_id_is_given_and_a_missing_image_id_skipped(zoo):
    del zoo.annotations[0]["id"]
    zoo.add(9, image_id=...)

    outcome = zoo.check()

    assert outcome.skipped == {9: "unknown_image"}
    assert len(outcome.report["usable"]) == 4


def test_case_14_a_missing_category_is_object_and_reported(zoo):
    del zoo.annotations[0]["category_id"]

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert outcome.remarks == ["no_category"]
    assert outcome.report["statistics"]["objects_by_category"] == {"parcel": 3, "object": 1}


def test_case_15_missing_iscrowd_area_and_bbox_are_found_from_the_mask(zoo):
    for annotation in zoo.annotations:
        for key in ("iscrowd", "area", "bbox"):
            del annotation[key]

    assert zoo.check("--strict").usable == SOUND


@pytest.mark.parametrize("width", [..., None, 0, float("nan")])
def test_case_16_a_missing_size_comes_from_the_file(zoo, width):
    image = zoo.content["images"][0]
    image["width"] = width
    if width is ...:
        del image["width"], image["height"]

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert outcome.remarks == ["no_size"]


def test_case_16_a_size_as_text_is_a_size(zoo):
    zoo.content["images"][0].update(width="160", height="120")

    assert zoo.check("--strict").usable == SOUND


@pytest.mark.parametrize(
    ("entry", "code", "message"),
    [
        ({"id": 3}, "no_file_name", "without a file name"),
        ({"id": 3, "file_name": 7}, "no_file_name", "without a file name"),
        ({"id": 3, "file_name": ""}, "no_file_name", "without a file name"),
        ({"id": 3, "coco_url": "http://images.org/a.jpg"}, "not_downloaded", "not downloaded"),
        ({"file_name": "a.png"}, "no_image_id", "without an id"),
        ("nonsense", "no_image_id", "without an id"),
    ],
)
def test_case_17_an_image_without_a_name_is_skipped(zoo, entry, code, message):
    zoo.content["images"].append(entry)

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert list(outcome.skipped_images.values()) == [code]
    assert message in outcome.message(code)
    assert zoo.check("--strict").code == 2


def test_case_18_unknown_keys_captions_and_keypoints_are_passed_over(zoo):
    zoo.content |= {"info": {"x": [1]}, "licenses": None, "captions": [], "attributes": {"deep": {"er": 1}}}
    zoo.annotations[0] |= {"caption": "a field", "keypoints": [1, 2, 2], "attributes": {"occluded": False}}

    assert zoo.check("--strict").usable == SOUND


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_case_19_nesting_without_end_is_refused(zoo, opening):
    outcome = zoo.check_apart(text=opening * 200_000)

    assert_refused(outcome, "annotations.json")
    assert "nested too deeply" in outcome.err or "not JSON" in outcome.err


@pytest.mark.slow
def test_case_20_a_hundred_thousand_annotations_fit_into_the_memory(zoo):
    zoo.annotations.clear()
    for number in range(100_000):
        x, y = number % 100, number // 100 % 60
        circle = [[x + dx, y + dy] for dx, dy in ((0, 4), (2, 1), (8, 0), (14, 1), (16, 4), (14, 7), (8, 8), (2, 7))]
        zoo.annotations.append(
            {"id": number, "image_id": 1, "category_id": 1, "segmentation": [sum(circle, [])], "bbox": [x, y, 16, 8]}
        )

    outcome = zoo.check_apart()

    assert outcome.code == 0
    assert outcome.report["usable_annotation_count"] == 100_000


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_case_21_numbers_that_are_none_do_no_harm_anywhere(zoo, value):
    text = json.dumps(zoo.content)
    text = text.replace('"area": 1200', f'"area": {value}').replace('"bbox": [80,', f'"bbox": [{value},')
    text = text.replace('"segmentation": [[20,', f'"segmentation": [[{value},').replace(
        '"iscrowd": 0', f'"iscrowd": {value}'
    )

    outcome = zoo.check_apart(text=text)

    assert outcome.skipped == {3: "not_finite"}
    assert outcome.usable == {number: SOUND[number] for number in (1, 2, 4)}
    assert "bad_bbox" in outcome.remarks


def move_images(zoo, folder) -> None:
    folder.mkdir(parents=True)
    for path in zoo.images_dir.iterdir():
        path.rename(folder / path.name)
    zoo.images_dir.rmdir()


def test_case_22_roboflows_layout_is_read_with_its_placeholder_category(zoo):
    zoo.content["categories"].insert(0, {"id": 0, "name": "parcels", "supercategory": "none"})
    for name in ("train", "valid"):
        (zoo.root / name).mkdir()
        for path in zoo.images_dir.iterdir():
            (zoo.root / name / path.name).write_bytes(path.read_bytes() + name.encode())
        (zoo.root / name / "_annotations.coco.json").write_text(json.dumps(zoo.content))
    (zoo.root / "data").rename(zoo.root.parent / "elsewhere")
    zoo.annotation_file = zoo.root.parent / "elsewhere" / "annotations.json"

    outcome = zoo.check()

    assert "valid/_annotations.coco.json" in outcome.report["layout"]
    assert len(outcome.report["usable"]) == 8


@pytest.mark.parametrize("images", ["images/default", "images", "default"])
def test_case_22_cvats_layout_is_read(zoo, images):
    move_images(zoo, zoo.root / images)
    (zoo.root / "annotations").mkdir()
    zoo.annotation_file = zoo.root / "annotations" / "instances_default.json"

    outcome = zoo.check()

    assert outcome.usable == SOUND
    assert "instances_default.json" in outcome.report["layout"]


def test_case_22_label_studios_layout_is_read(zoo):
    move_images(zoo, zoo.root / "images")
    zoo.annotation_file = zoo.root / "result.json"
    zoo.content["images"][0]["file_name"] = "images/a.png"
    zoo.content["images"][1]["file_name"] = "..\\..\\label-studio\\media\\upload\\4\\b.png"

    assert zoo.check().usable == SOUND


def test_case_23_a_labelme_folder_is_read_and_its_file_in_cocos_place_reported(zoo):
    shape = {"label": "parcel", "points": [[10, 20], [50, 20], [50, 50], [10, 50]], "shape_type": "polygon"}
    labelme = {"shapes": [shape], "imagePath": "a.png", "imageHeight": 120, "imageWidth": 160}

    assert_refused(zoo.check(text=json.dumps(labelme)), "this is labelme's format")

    zoo.annotation_file.unlink()
    zoo.annotation_file = zoo.images_dir / "a.json"
    outcome = zoo.check(text=json.dumps(labelme))
    assert "labelme" in outcome.report["layout"]
    assert outcome.usable == {0: SOUND[1]}
