import json

import pytest
from test_evaluate import run_evaluation

from finestsam.cli import main
from finestsam.data.read import DatasetConfig, read_evaluation_set
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


def test_pictures_of_a_file_that_lists_them_are_known_by_name(scenes, everything, tmp_path):
    results = list_results(everything)
    for entry in results:
        entry["image_id"] += 1000
    images = [{"id": record.image_id + 1000, "file_name": f"x/{record.file_name}"} for record in everything]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps({"images": images, "annotations": results}))

    assert run_evaluation(scenes, tmp_path / "out", f"--evaluate.predictions={path}")["generator/ap"] == pytest.approx(
        1
    )


def test_a_picture_of_the_same_name_in_another_folder_is_another(scenes, everything, tmp_path):
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
        ('[{"image_id": 99999, "segmentation": [], "score": 1}]', "none of its 1 results is of a picture of this set"),
        ('[{"image_id": 1, "segmentation": [[1, 2]], "score": 1}]', "result 0"),
        ('[{"image_id": 1, "segmentation": [[1, 2, 3, 4, 5, 9]], "score": "high"}]', "its score is 'high'"),
        ('[{"image_id": 1, "segmentation": [[1, 2, 3, 4, 5, 9]], "score": NaN}]', "its score is nan"),
    ],
)
def test_a_file_that_is_none_is_told(scenes, everything, tmp_path, capsys, content, message):
    path = tmp_path / "results.json"
    path.write_text(content.replace('"image_id": 1,', f'"image_id": {everything[0].image_id},'))

    code = main(["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={tmp_path}", f"--evaluate.predictions={path}"])

    assert code == 2
    assert message in capsys.readouterr().err
