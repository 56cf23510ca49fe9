"""Figures by category against plain pycocotools, and where they are shown."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_evaluation
from named_shapes import CATEGORIES, write_named_shapes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco_scores import SIZE, draw, make_record, move

from finestsam.cli import main
from finestsam.config import build_config
from finestsam.data.categories import number_categories
from finestsam.evaluation.class_scores import describe_categories, score_classes
from finestsam.evaluation.coco_scores import Detections, score_detections
from finestsam.masks import encode_mask, rle_area, rle_box, rle_to_json
from finestsam.model.architectures import build_sam
from finestsam.model.card import Card, write_card
from finestsam.model.heads import ClassHead, head_path
from finestsam.modes.evaluate import evaluate
from finestsam.records import Record

# Of the dataset; no image has an object of the last, and the model lacks the third and knows another one.
NAMES = {2: "ball", 5: "crate", 6: "wheel", 9: "bird"}
OURS = ["crate", "ball", "bird", "fish"]


@pytest.fixture
def images() -> tuple[list[Record], list[Detections]]:
    """Objects of three categories, crowds, and detections of all of ours: moved, wrong, of the wrong category."""
    rng = np.random.default_rng(3)
    records, found = [], []
    for _ in range(10):
        record = make_record(draw(rng, rng.integers(1, 8)))
        for annotation in record.annotations:
            annotation.category_id = int(rng.choice([2, 5, 6], p=[0.6, 0.3, 0.1]))
        record.crowds = [rle["counts"] for rle in draw(rng, 2)]
        record.crowd_categories = rng.choice([2, 5, 9], 2).tolist()
        records.append(record)
        rles = [move(record.rle(one), int(rng.integers(0, 8))) for one in record.annotations]
        classes = [{2: 2, 5: 1, 6: 4}[one.category_id] for one in record.annotations]
        classes = [number if rng.random() > 0.2 else int(rng.integers(1, 5)) for number in classes]
        others = draw(rng, rng.integers(0, 4))
        scores = rng.choice([0.5, 0.7, 0.9], len(rles) + len(others)).tolist()
        found.append(Detections(rles + others, scores, classes + rng.integers(1, 5, len(others)).tolist()))
    return records, found


def test_figures_are_those_of_pycocotools(images, tmp_path):
    records, found = images
    images, annotations, results = [], [], []
    ids = {"ball": 2, "crate": 5, "bird": 9, "fish": 77}
    for number, (record, one) in enumerate(zip(records, found, strict=True), start=1):
        images.append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        parts = [(one.counts, one.category_id, 0) for one in record.annotations]
        parts += [(counts, category_id, 1) for counts, category_id in record.list_crowds()]
        for counts, category_id, is_crowd in parts:
            rle = {"size": list(SIZE), "counts": counts}
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": category_id, "iscrowd": is_crowd,
                "segmentation": rle_to_json(rle), "area": rle_area(rle), "bbox": rle_box(rle),
            })  # fmt: skip
        for rle, score, chosen in zip(one.rles, one.scores, one.classes, strict=True):
            entry = {"image_id": number, "category_id": ids[OURS[chosen - 1]], "segmentation": rle_to_json(rle)}
            results.append(entry | {"score": score})
    categories = [{"id": number, "name": name} for number, name in (NAMES | {77: "fish"}).items()]
    (tmp_path / "truth.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = COCO(str(tmp_path / "truth.json"))
    reference = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "segm")
    reference.evaluate()
    reference.accumulate()
    precision, recall = reference.eval["precision"][:, :, :, 0, -1], reference.eval["recall"][:, :, 0, -1]
    positions = {NAMES.get(number, "fish"): place for place, number in enumerate(reference.params.catIds)}

    figures = score_classes(records, found, number_categories(NAMES, OURS))

    for name in ("ball", "crate"):
        place = positions[name]
        assert figures[f"ap/{name}"] == pytest.approx(precision[:, :, place].mean(), abs=1e-12)
        assert figures[f"ap50/{name}"] == pytest.approx(precision[0, :, place].mean(), abs=1e-12)
        assert figures[f"ar_100/{name}"] == pytest.approx(recall[:, place].mean(), abs=1e-12)
        assert figures[f"objects/{name}"] == sum(
            NAMES[one.category_id] == name for record in records for one in record.annotations
        )
    for measure in ("ap", "ap50", "ar_100"):
        assert figures[measure] == pytest.approx((figures[f"{measure}/ball"] + figures[f"{measure}/crate"]) / 2)
        assert not {f"{measure}/{name}" for name in ("bird", "fish", "wheel", "no object")} & set(figures)
    assert 0 < figures["ap"] < 1 and all(value >= 0 for value in figures.values())


def test_one_category_for_everything_gives_the_figures_without_any(images):
    records, found = images
    for record in records:
        for annotation in record.annotations:
            annotation.category_id = 4
        record.crowd_categories = [4] * len(record.crowds)
    found = [Detections(one.rles, one.scores, [1] * len(one.rles)) for one in found]

    figures = score_classes(records, found, number_categories({4: "thing"}))
    without = score_detections(records, found)

    for measure in ("ap", "ap50", "ar_100"):
        assert figures[measure] == figures[f"{measure}/thing"] == pytest.approx(without[measure], abs=1e-12)


def test_what_lies_in_a_crowd_is_no_mistake_of_its_category_and_of_any_where_it_has_none():
    objects, crowd = [make_square(0)], make_square(100)
    table = number_categories({1: "ball", 2: "crate"})
    found = [Detections([crowd, objects[0]], [0.9, 0.8], [1, 1])]

    def score(crowds: list[dict], categories: list[int | None]) -> float:
        record = make_record(objects, crowds)
        record.annotations[0].category_id, record.crowd_categories = 1, categories
        return score_classes([record], found, table)["ap/ball"]

    assert score([crowd], [1]) == score([crowd], [None]) == score([crowd], []) == pytest.approx(1)
    assert score([crowd], [2]) == score([crowd], [77]) == score([], []) < 0.9


def make_square(x: int) -> dict:
    mask = np.zeros(SIZE, dtype=bool)
    mask[20:80, x : x + 60] = True
    return encode_mask(mask)


def test_nothing_to_find_and_nothing_found_are_defined():
    table = number_categories({1: "ball"})
    record = make_record([make_square(0)])

    assert score_classes([make_record([])], [Detections([make_square(0)], [0.5], [1])], table) == {}
    figures = score_classes([record], [Detections([], [], [])], table)
    assert (figures["ap"], figures["ar_100"], figures["objects/ball"]) == (0, 0, 1)
    assert describe_categories(figures)[0].startswith("ball ")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_named_shapes(tmp_path_factory.mktemp("shapes"), 5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A model that knows what it sees by chance, and balls among it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    sam = build_sam("vit_tiny_test")
    for network in sam.mask_decoder.output_hypernetworks_mlps:
        network.layers[-1].weight.data *= 10  # masks that differ
    torch.save(sam.state_dict(), path)
    names = ["crate", CATEGORIES[3], "fish"]
    torch.save(ClassHead(32, 4).state_dict(), head_path(path, ClassHead))
    settings = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "no_object_thresh": 1.0, "points_per_side": 4}
    settings["box_nms_thresh"] = 1.0
    write_card(path, Card("vit_tiny_test", 64, True, names, settings, task="classes", category_ids=[7, 3, 8]))
    return path


def test_evaluation_shows_every_category_with_its_name_escaped(shapes, weights, tmp_path, capsys):
    flags = [f"--model.checkpoint={weights}", "--evaluate.clicks=0"]

    figures = run_evaluation(shapes, tmp_path, *flags)

    for measure in ("ap", "ap50", "ar_100"):
        values = [figures[f"classes/{measure}/{name}"] for name in ("crate", CATEGORIES[3])]
        assert figures[f"classes/{measure}"] == pytest.approx(sum(values) / 2)
        assert f"classes/{measure}/fish" not in figures
    assert "generator/ap" in figures
    page = (tmp_path / "report.html").read_text()
    assert "ball &lt;b&gt; &amp; co" in page and "ball <b>" not in page
    assert "By category: average precision, mean" in page
    assert (tmp_path / "comparison.png").is_file()
    assert "ball <b> & co" in capsys.readouterr().out


def test_masks_alone_are_evaluated_where_they_are_requested(shapes, weights, tmp_path):
    figures = run_evaluation(shapes, tmp_path, f"--model.checkpoint={weights}", "--task=masks", "--evaluate.clicks=0")

    assert "generator/ap" in figures and not any(name.startswith("classes/") for name in figures)


def test_categories_are_matched_by_name_or_refused(weights, tmp_path, capsys):
    flags = [f"--model.checkpoint={weights}", "--evaluate.clicks=0"]
    partly = write_named_shapes(tmp_path / "partly", 3, categories={3: "crate", 7: "wheel"})
    figures = run_evaluation(partly, tmp_path / "out", *flags)
    assert [name for name in figures if name.startswith("classes/ap/")] == ["classes/ap/crate"]
    assert "ignored, as the model has no such class: wheel" in capsys.readouterr().out

    strange = write_named_shapes(tmp_path / "strange", 3, categories={3: "wheel", 7: "bird"})
    assert main(["--mode=evaluate", f"--dataset={strange}", "--device=cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert "no category of the dataset (wheel, bird) is a class of" in error and "(crate, ball <b> & co, fish)" in error


def predict(weights: Path, shapes: Path, folder: Path, *flags: str) -> dict:
    arguments = ["--mode=predict", f"--input={shapes / 'data' / 'images'}", f"--model.checkpoint={weights}"]
    assert main([*arguments, "--device=cpu", f"--out_dir={folder}", *flags]) == 0
    return json.loads((folder / "predictions.json").read_text())


def test_predictions_have_the_categories_of_the_model(shapes, weights, tmp_path):
    content = predict(weights, shapes, tmp_path)

    names = {7: "crate", 3: CATEGORIES[3], 8: "fish"}
    assert content["categories"] == [{"id": number, "name": name} for number, name in names.items()]
    assert content["annotations"]
    for one in content["annotations"]:
        assert one["category_name"] == names[one["category_id"]]
        assert 0 < one["class_score"] <= 1
        assert one["score"] == pytest.approx(one["predicted_iou"] * one["class_score"], abs=2e-6)
    COCO(str(tmp_path / "predictions.json")).loadRes(content["annotations"])


def test_masks_that_are_no_object_are_dropped_and_said(shapes, weights, tmp_path, capsys):
    counts = []
    for place, threshold in enumerate((1.0, 0.3, 0.25, 0.2, 0.15, 0.0)):
        flag = f"--generator.no_object_thresh={threshold}"
        counts.append(len(predict(weights, shapes, tmp_path / str(place), flag)["annotations"]))

    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0 and any(0 < count < counts[0] for count in counts)
    said = capsys.readouterr()
    assert "have a probability of no object above generator.no_object_thresh 0 (least 0." in said.out + said.err


def test_a_file_of_predictions_scores_what_the_model_does(shapes, weights, tmp_path):
    content = predict(weights, shapes, tmp_path / "predicted")
    flags = [f"--model.checkpoint={weights}", "--evaluate.clicks=0"]

    by_model = run_evaluation(shapes, tmp_path / "model", *flags)
    file = f"--evaluate.predictions={tmp_path / 'predicted' / 'predictions.json'}"
    by_file = run_evaluation(shapes, tmp_path / "file", file)
    # A bare list has the ids of the labels, and images by theirs.
    numbers = {image["id"]: int(Path(image["file_name"]).stem) for image in content["images"]}
    entries = [one | {"image_id": numbers[one["image_id"]]} for one in content["annotations"]]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    by_list = run_evaluation(shapes, tmp_path / "list", f"--evaluate.predictions={tmp_path / 'list.json'}")

    for name in (name for name in by_model if name.startswith(("classes/", "generator/"))):
        # Six digits of a score can make a tie of two.
        assert by_file[name] == by_list[name] == pytest.approx(by_model[name], abs=1e-3), name


def test_a_file_that_names_one_category_of_several_knows_none(shapes, tmp_path, capsys):
    content = json.loads((shapes / "data" / "annotations.json").read_text())
    results = [
        {"image_id": one["image_id"], "category_id": 3, "segmentation": one["segmentation"], "score": 0.9}
        for one in content["annotations"]
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))

    figures = run_evaluation(shapes, tmp_path / "auto", f"--evaluate.predictions={path}")
    assert figures["generator/ap"] == pytest.approx(1) and "classes/ap" not in figures
    figures = run_evaluation(shapes, tmp_path / "wanted", f"--evaluate.predictions={path}", "--task=classes")
    assert figures["classes/ar_100/crate"] == 0 and figures[f"classes/ar_100/{CATEGORIES[3]}"] == pytest.approx(1)

    path.write_text(json.dumps([one | {"category_id": 4} for one in results]))
    config = {"dataset.path": str(shapes), "evaluate.predictions": str(path), "task": "classes"}
    with pytest.raises(Exception, match=r"results.json: none of its categories is one of the dataset \(crate, ball"):
        evaluate(build_config(config | {"out_dir": str(tmp_path / "none")}))


def test_masks_are_those_of_the_same_weights_without_a_head(shapes, weights, tmp_path):
    """Nothing is dropped with the threshold 1, so that the head changes nothing but names and scores."""
    named = predict(weights, shapes, tmp_path / "named")
    plain = predict(weights, shapes, tmp_path / "plain", "--task=masks")

    assert [one["segmentation"] for one in named["annotations"]] == [
        one["segmentation"] for one in plain["annotations"]
    ]
    assert all(one["category_id"] == 1 and "category_name" not in one for one in plain["annotations"])
