import json

import pytest
from conftest import run_evaluation

from finestsam.cli import main
from finestsam.data.read import DatasetConfig, read_evaluation_set
from finestsam.errors import UserError
from finestsam.evaluation.result_files import read_results
from finestsam.masks import rle_to_json


@pytest.fixture
def everything(scenes):
    return read_evaluation_set(DatasetConfig(path=str(scenes), use_cache=False), "auto").val


def list_results(records) -> list[dict]:
    return [
        {
            "image_id": record.image_id,
            "category_id": 7,
            "segmentation": rle_to_json(record.rle(annotation)),
            "score": 0.5 + annotation.area / 1e6,
        }
        for record in records
        for annotation in record.annotations
    ]


def test_the_truth_scores_full_marks(scenes, everything, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(list_results(everything)))

    figures = run_evaluation(scenes, tmp_path / "out", f"--evaluate.predictions={path}")

    assert figures["generator/ap"] == pytest.approx(1) and figures["generator/f1"] == pytest.approx(1)
    assert not any(name.startswith(("point/", "baseline")) for name in figures)


def test_images_of_a_file_that_lists_them_are_known_by_name(scenes, everything, tmp_path):
    results = list_results(everything)
    for entry in results:
        entry["image_id"] += 1000
    images = [{"id": record.image_id + 1000, "file_name": f"x/{record.file_name}"} for record in everything]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"images": images, "annotations": results}))

    assert run_evaluation(scenes, tmp_path / "out", f"--evaluate.predictions={path}")["generator/ap"] == pytest.approx(
        1
    )


def test_an_image_of_the_same_name_in_another_folder_is_another(scenes, everything, tmp_path):
    folder = everything[0].path.parent.name
    images, results = [], []
    for number, place in enumerate(("elsewhere", folder)):
        ids = {record.image_id: 1000 * (number + 1) + record.image_id for record in everything}
        images += [{"id": ids[one.image_id], "file_name": f"x/{place}/{one.path.name}"} for one in everything]
        if place == folder:
            results += [entry | {"image_id": ids[entry["image_id"]]} for entry in list_results(everything)]
        else:
            box = [[0, 0, 9, 0, 9, 9, 0, 9]]
            results += [{"image_id": id_, "segmentation": box, "score": 1, "category_id": 7} for id_ in ids.values()]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"images": images, "annotations": results}))

    assert run_evaluation(scenes, tmp_path / "out", f"--evaluate.predictions={path}")["generator/ap"] == pytest.approx(
        1
    )


def test_an_empty_mask_is_one_that_is_wrong(scenes, everything, tmp_path):
    height, width = everything[0].size
    empty = {"size": [height, width], "counts": [height * width]}
    results = list_results(everything)
    results.append({"image_id": everything[0].image_id, "category_id": 7, "segmentation": empty, "score": 0.1})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))

    figures = run_evaluation(scenes, tmp_path / "out", f"--evaluate.predictions={path}")

    assert figures["generator/ar_1000"] == pytest.approx(1) and figures["generator/f1"] < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "results.json: not JSON: Expecting value at line 1 column 1"),
        ("{}", "not a COCO results file"),
        ('[{"image_id": 99999, "segmentation": [], "score": 1}]', "none of its 1 results is of an image of this set"),
        ('[{"image_id": 1, "segmentation": [[1, 2]], "score": 1}]', "result 0"),
        ('[{"image_id": 1, "segmentation": [[1, 2, 3, 4, 5, 9]], "score": "high"}]', "its score is 'high'"),
        ('[{"image_id": 1, "segmentation": [[1, 2, 3, 4, 5, 9]], "score": NaN}]', "its score is nan"),
    ],
)
def test_a_file_that_is_none_is_reported(scenes, everything, tmp_path, capsys, content, message):
    path = tmp_path / "results.json"
    path.write_text(content.replace('"image_id": 1,', f'"image_id": {everything[0].image_id},'))

    code = main(["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={tmp_path}", f"--evaluate.predictions={path}"])

    assert code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def read(everything, tmp_path, capsys):
    """Read a file of this content as results of the scenes; return the number of masks by image, and what is said."""

    def read(content: object, task: str = "auto") -> tuple[list[int], str]:
        path = tmp_path / "results.json"
        path.write_text(json.dumps(content))
        detections, _ = read_results(path, everything, {7: "thing", 8: "other"}, task)
        return [len(found.rles) for found in detections], capsys.readouterr().out

    return read


@pytest.mark.parametrize("write", [str, float, lambda number: f"{number}.0"])
@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_ids_are_numbers_however_they_are_written(everything, read, write, key):
    results = list_results(everything)
    for entry in results[1::2]:  # mixed, as programs that join files write them
        entry[key] = write(entry[key])

    assert read(results, task="classes") == ([len(record.annotations) for record in everything], "")


@pytest.mark.parametrize("value", [[1], {"a": 1}, True, None, "scene", "", 1.5, float("nan"), float("inf")])
def test_an_id_that_is_none_is_reported(everything, read, value):
    results = list_results(everything)
    results[3]["image_id"] = value
    with pytest.raises(UserError, match=r"results.json: result 3: its image_id is .*, expected a whole number"):
        read(results)
    if value is None:
        return
    results = list_results(everything)
    results[3]["category_id"] = value
    with pytest.raises(UserError, match=r"results.json: result 3: its category_id is .*, expected a whole number"):
        read(results)
    assert sum(read(results, task="masks")[0]) == len(results)  # where it does not count


def test_an_id_beyond_all_images_is_counted_and_said(everything, read):
    results = list_results(everything)
    results[0]["image_id"], results[1]["image_id"] = 10**300, 99

    counts, out = read(results)

    assert sum(counts) == len(results) - 2
    assert f"results.json: 2 of {len(results)} results are of other images than these, left out" in out


def test_a_category_beyond_all_is_of_no_category(everything, read):
    results = list_results(everything)
    results[0]["category_id"] = 10**300

    assert sum(read(results)[0]) == len(results)


@pytest.mark.parametrize("value", [10**400, -(10**400), True, "0.5", None, [1], float("nan")])
def test_a_score_that_is_none_is_reported(everything, read, value):
    results = list_results(everything)
    results[2]["score"] = value

    with pytest.raises(UserError, match="results.json: result 2: its score is "):
        read(results)


def list_images(records) -> list[dict]:
    return [{"id": record.image_id, "file_name": record.file_name} for record in records]


@pytest.mark.parametrize("entry", [{"id": [1], "file_name": "a.png"}, {"id": True}, {}, 7, None])
@pytest.mark.parametrize("part", ["images", "categories"])
def test_what_a_file_lists_without_an_id_is_reported(everything, read, entry, part):
    content = {"images": list_images(everything), "annotations": list_results(everything)}
    content[part] = [*content.get(part, []), entry]
    name = {"images": f"image {len(everything)}", "categories": "category 0"}[part]

    with pytest.raises(UserError, match=f"results.json: {name}: its id is .*, expected a whole number"):
        read(content)


def test_text_may_be_the_id_of_an_image_that_the_file_lists(everything, read):
    images, results = list_images(everything), list_results(everything)
    for entry, key in [(image, "id") for image in images] + [(result, "image_id") for result in results]:
        entry[key] = f"image {entry[key]}"

    assert read({"images": images, "annotations": results})[0] == [len(record.annotations) for record in everything]


def test_an_id_of_several_images_is_reported(records, tmp_path):
    images = list_images(records)
    images[1]["id"] = str(images[0]["id"])
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"images": images, "annotations": list_results(records)}))

    with pytest.raises(UserError, match="results.json: image id .* stands for several images"):
        read_results(path, records, {7: "thing"})
