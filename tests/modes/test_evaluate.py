"""`--mode evaluate` as it is called, and the figures of prompted masks against numpy's."""

import csv
import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import run_evaluation, run_training

from finestsam.batch import Batch
from finestsam.cli import main
from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig, ImagesConfig, build_config
from finestsam.data.dataset import SampleDataset, SampleSettings, collate
from finestsam.evaluation.generator_scores import find_all
from finestsam.evaluation.prompt_scores import score_batches, summarize_scores
from finestsam.images.files import read_image, write_image
from finestsam.masks import decode_rle
from finestsam.model.architectures import build_sam
from finestsam.model.resample import upscale_logits
from finestsam.prediction.embedder import Embedder
from finestsam.prediction.generator import generate_masks

SETTINGS = GeneratorConfig(
    **GENERATOR_DEFAULTS | {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
)


QUICK = ["--evaluate.clicks=0", "--evaluate.generator=false"]


@pytest.fixture
def dataset(records):
    config = build_config({"prompts.use_boxes": False})
    return SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))


def test_the_file_holds_flat_names_and_numbers(scenes, tmp_path):
    figures = run_evaluation(scenes, tmp_path)

    assert {"generator/ap", "generator/ar_1000", "point/iou", "box/iou", "box/dice"} <= set(figures)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in figures.values())
    assert (tmp_path / "dataset_report.json").is_file()


def test_the_generator_can_be_left_out(scenes, tmp_path):
    assert not any(
        name.startswith("generator/") for name in run_evaluation(scenes, tmp_path, "--evaluate.generator=false")
    )


def test_what_removed_all_masks_is_said(scenes, tmp_path, capsys):
    run_evaluation(scenes, tmp_path, "--generator.pred_iou_thresh=1", "--evaluate.clicks=0", "--evaluate.split=val")

    # 4 x 4 points, three masks each.
    assert re.search(
        r"weights, generator: no masks in 1 of 1 images: 48 of 48 candidates have a predicted IoU of at most "
        r"generator.pred_iou_thresh 1 \(best -?[\d.]+\)",
        capsys.readouterr().out,
    )


def test_an_evaluation_that_does_not_fit_into_the_memory_says_what_needs_less(scenes, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("finestsam.evaluation.prompt_scorer.score_batches", fail)
    flags = ["--model.type=vit_tiny_test", "--model.checkpoint=none", "--device=cpu", "--num_workers=0"]

    assert main(["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={tmp_path}", "--chunk_objects=5", *flags]) == 2

    error = capsys.readouterr().err
    assert "weights: out of memory; try" in error and "--chunk_objects below 5" in error
    assert "Traceback" not in error


def test_prompted_masks_are_measured_as_numpy_measures_them(tiny_sam, dataset):
    samples = [dataset[(0, place)] for place in range(3)]

    scores = score_batches(Embedder(tiny_sam), [collate([sample]) for sample in samples], chunk_objects=2)

    rows = iter(scores)
    for sample in samples:
        with torch.no_grad():
            predictions = tiny_sam(tiny_sam.encode([sample.image]), sample.prompts)
        masks = upscale_logits(predictions.logits, 64, sample.input_size, sample.original_size).numpy() > 0
        for place, rle in enumerate(sample.rles):
            truth, row = decode_rle(rle), next(rows)
            ious = [(mask & truth).sum() / (mask | truth).sum() for mask in masks[place]]
            chosen = int(predictions.scores[place].argmax())
            mask = masks[place, chosen]
            assert row.annotation_id == sample.annotation_ids[place]
            assert row.iou == pytest.approx(ious[chosen], abs=1e-12)
            assert row.best_iou == pytest.approx(max(ious), abs=1e-12)
            assert row.dice == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()), abs=1e-12)
            assert row.score == pytest.approx(float(predictions.scores[place, chosen]), abs=1e-5)
    assert next(rows, None) is None


def test_means_do_not_depend_on_the_order(tiny_sam, dataset):
    scores = score_batches(Embedder(tiny_sam), [(Batch([dataset[(0, place)]]), []) for place in range(4)], 16)

    assert summarize_scores(scores) == summarize_scores(scores[::-1])
    assert summarize_scores(scores)["objects"] == len(scores)
    assert summarize_scores([]) == {}


def test_the_generator_is_scored_on_every_image_that_can_be_read(tiny_sam, records, capsys, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    shown = [*records[:2], dataclasses.replace(records[2], path=broken)]

    found = find_all(Embedder(tiny_sam), shown, SETTINGS, ImagesConfig())

    assert found[2] is None
    assert "skipped" in capsys.readouterr().err
    for record, one in zip(shown[:2], found[:2], strict=True):
        masks = generate_masks(tiny_sam, read_image(record.path), SETTINGS)
        assert (one.rles, one.scores) == (masks.rles, masks.scores.tolist())


@pytest.mark.parametrize("generator", ["true", "false"])
def test_an_image_too_thin_for_the_model_is_skipped(generator, coco_folder, tmp_path_factory, capsys):
    square = {"category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
    line = {"category_id": 1, "segmentation": [[1, 0, 90, 0, 90, 2, 1, 2]]}
    images = [
        {"id": 1, "file_name": "a.png", "width": 12, "height": 10},
        {"id": 2, "file_name": "line.png", "width": 300, "height": 2},
    ]
    folder = coco_folder([{"id": 1, "image_id": 1} | square, {"id": 2, "image_id": 2} | line], images=images)
    write_image(folder / "images" / "line.png", np.full((2, 300, 3), 128, dtype=np.uint8))

    out = tmp_path_factory.mktemp("out")

    figures = run_evaluation(folder, out, f"--evaluate.generator={generator}")

    assert figures["point/objects"] == 1 and ("generator/ap" in figures) == (generator == "true")
    with open(out / "per_image.csv") as file:
        assert [row["file_name"] for row in csv.DictReader(file)] == ["a.png"]
    error = capsys.readouterr().err
    assert "line.png: 300 x 2 pixels shrink to nothing at 64" in error and "Traceback" not in error


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run that started from weights in a file."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    torch.save(build_sam("vit_tiny_test").state_dict(), folder / "origin.pth")
    flags = [f"--model.checkpoint={folder / 'origin.pth'}", "--generator.points_per_side=4"]
    return run_training(scenes, folder / "sav", *flags)


GIVEN = [
    "--generator.pred_iou_thresh=0", "--generator.stability_score_thresh=0", "--generator.box_nms_thresh=0.7",
    "--generator.crop_n_layers=0", "--generator.min_mask_region_area=0", "--generator.no_object_thresh=1",
    "--generator.masks_per_point=all",
]  # fmt: skip


def test_weights_are_compared_with_those_that_they_came_from(scenes, finished, tmp_path, capsys):
    figures = run_evaluation(scenes, tmp_path, f"--model.checkpoint={finished / 'best.pth'}", *GIVEN)

    output = capsys.readouterr().out
    origin = finished.parents[1] / "origin.pth"
    assert f"baseline: {origin} (vit_tiny_test at 64 pixels)" in output and "thresholds given: " in output
    before = run_evaluation(scenes, tmp_path / "before", f"--model.checkpoint={origin}", "--evaluate.split=val", *GIVEN)
    assert {name.removeprefix("baseline/"): value for name, value in figures.items() if "baseline/" in name} == before
    for name in ("point/iou", "generator/ap"):
        difference = figures[name] - figures[f"baseline/{name}"]
        assert figures[f"difference/{name}"] == pytest.approx(difference, abs=1e-12)
        assert f"difference/{name}_low" not in figures  # of one image
    rows = read_rows(tmp_path)
    assert len(rows) == 1  # a tenth of six images
    assert {"file_name", "point/iou", "generator/ap", "counting/labelled"} <= set(rows[0])
    assert {"baseline/point/iou", "baseline/counting/found"} <= set(rows[0])


def test_evaluate_measures_what_training_measured(scenes, finished, tmp_path, capsys):
    """On the run's own validation split, with the thresholds that the run chose: both models, to the last digit."""
    card = json.loads((finished / "best.json").read_text())

    figures = run_evaluation(
        scenes, tmp_path, f"--model.checkpoint={finished}", "--precision=32-true", "--seed_device=1337",
        "--dataset.val_size=0.5",
    )  # fmt: skip

    assert card["baseline_generator"] and card["goal"] and card["tuned_on"] == 1
    assert f"images: 1 image, the validation split of {finished / 'split.json'}" in capsys.readouterr().out
    for prefix, trained in (("", card["metrics"]), ("baseline/", card["baseline"])):
        for name in ("ap", "ap50", "f1", "ar_10", "ar_100", "ar_1000"):
            assert figures[f"{prefix}generator/{name}"] == trained[f"val_generator_{name}"], (prefix, name)
        assert figures[f"{prefix}generator/masks_per_image"] == trained["val_generator_masks"]
        assert figures[f"{prefix}point/iou"] == trained["val_per_mask_iou"]
        assert figures[f"{prefix}point/boundary_iou"] == trained["val_boundary_iou"]


def test_the_baseline_is_seen_at_the_image_size_of_the_weights(scenes, finished, tmp_path, capsys):
    run = run_training(
        scenes, tmp_path / "sav", f"--model.checkpoint={finished.parents[1] / 'origin.pth'}", "--num_epochs=1",
        "--model.image_size=96", "--multimask_output=false",
    )  # fmt: skip
    capsys.readouterr()

    figures = run_evaluation(scenes, tmp_path, f"--model.checkpoint={run}", *GIVEN, "--evaluate.clicks=0")

    output = capsys.readouterr().out
    assert output.count("(vit_tiny_test at 96 pixels)") == 2
    # 4 x 4 points, a mask each; three where the model gave three.
    assert figures["baseline/generator/masks_per_image"] <= 16


def test_without_stored_thresholds_of_the_baseline_they_are_chosen_here_for_the_same_goal(
    scenes, finished, tmp_path, capsys
):
    old = copy_weights(finished, tmp_path / "old", baseline_generator={}, goal="recall", tuned_on=3)

    run_evaluation(scenes, tmp_path, f"--model.checkpoint={old}", "--evaluate.clicks=0")

    output = capsys.readouterr().out
    assert "thresholds chosen for recall on 3 validation images (points_per_side given): " in output
    assert "baseline, generator: best for recall on these images: " in output
    assert "thresholds chosen for recall on these images (points_per_side given): " in output


def test_the_starting_weights_are_the_baseline_wherever_they_lie(scenes, finished, tmp_path, capsys):
    moved = tmp_path / "moved.pth"
    moved.write_bytes((finished.parents[1] / "origin.pth").read_bytes())
    quick = ["--evaluate.clicks=0"]

    run_evaluation(scenes, tmp_path, f"--model.checkpoint={finished}", f"--against={moved}", *quick)

    output = capsys.readouterr().out
    assert f"baseline: {moved} (vit_tiny_test at 64 pixels)" in output
    assert output.count(" on 1 validation image (points_per_side given): ") == 2


def test_it_ends_with_what_is_found_in_plain_words(scenes, finished, tmp_path, capsys):
    figures = run_evaluation(scenes, tmp_path, f"--model.checkpoint={finished}", *GIVEN, "--evaluate.clicks=0")

    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        r"It finds (\d+) of (\d+) objects with (\d+) masks? \(baseline: (\d+) with (\d+)\); its number of masks is "
        r"off by ([\d.]+) an image \(baseline: [\d.]+\)\. Report: " + re.escape(str(tmp_path / "report.html")),
        last,
    )
    (row,) = read_rows(tmp_path)
    names = ("counting/found", "objects", "generator/masks", "baseline/counting/found", "baseline/generator/masks")
    assert [*found.groups()[:5]] == [row[name] for name in names]
    assert float(found[6]) == pytest.approx(figures["counting/mean_absolute_error"], abs=0.05)


def read_rows(folder) -> list[dict[str, str]]:
    with open(folder / "per_image.csv") as file:
        return list(csv.DictReader(file))


def copy_weights(run, folder, **changes):
    """Return weights of a run somewhere else, their card with other values."""
    folder.mkdir()
    (folder / "best.pth").write_bytes((run / "best.pth").read_bytes())
    (folder / "best.json").write_text(json.dumps(json.loads((run / "best.json").read_text()) | changes))
    return folder / "best.pth"


@pytest.mark.parametrize(
    ("split", "count", "learned"),
    [("auto", 1, 0), ("val", 1, 0), ("train", 5, 5)],
)
@pytest.mark.parametrize("layout", ["to be split", "one folder"])
def test_weights_of_a_run_are_evaluated_on_its_own_split(
    scenes, finished, tmp_path, capsys, layout, split, count, learned
):
    """However the folder lies, and whatever the settings of the split are now."""
    dataset = scenes if layout == "to be split" else scenes / "data"

    run_evaluation(
        dataset, tmp_path, f"--model.checkpoint={finished}", f"--evaluate.split={split}", "--dataset.val_size=0.5",
        "--dataset.seed=7", *QUICK,
    )  # fmt: skip

    rows = read_rows(tmp_path)
    val = [entry["file_name"] for entry in json.loads((finished / "split.json").read_text())["val"]]
    assert len(rows) == count and sum(row["trained_on"] == "true" for row in rows) == learned
    assert ({row["file_name"] for row in rows} == set(val)) == (split != "train")
    error = capsys.readouterr().err
    assert (f"{count} of the {count} images were trained on" in error) == (learned > 0)


def test_another_dataset_that_shares_images_is_reported_and_marked(scenes, finished, tmp_path, capsys):
    split = json.loads((finished / "split.json").read_text())
    val = {entry["file_name"] for entry in split["val"]}
    shared = tmp_path / "shared"
    shutil.copytree(scenes / "data", shared)
    labels = json.loads((shared / "annotations.json").read_text())
    gone = {image["id"] for image in labels["images"] if image["file_name"] in val}  # so it is not the same dataset
    labels["images"] = [image for image in labels["images"] if image["id"] not in gone]
    labels["annotations"] = [one for one in labels["annotations"] if one["image_id"] not in gone]
    changed = labels["images"][0]["file_name"]
    write_image(shared / "images" / changed, np.full((96, 96, 3), 90, dtype=np.uint8))
    (shared / "annotations.json").write_text(json.dumps(labels))

    run_evaluation(shared, tmp_path / "out", f"--model.checkpoint={finished}", *QUICK)

    marked = {row["file_name"]: row["trained_on"] for row in read_rows(tmp_path / "out")}
    assert len(marked) == 5 and marked.pop(changed) == "false" and set(marked.values()) == {"true"}
    error = capsys.readouterr().err
    assert "4 of the 5 images were trained on; expect lower figures on other images: " in error
    assert "4 of the 5 images were trained on" in (tmp_path / "out" / "report.html").read_text()


def test_images_of_no_run_are_not_marked(scenes, finished, tmp_path, capsys):
    weights = copy_weights(finished, tmp_path / "moved")

    run_evaluation(scenes / "data", tmp_path / "out", f"--model.checkpoint={weights}", *QUICK)

    assert len(read_rows(tmp_path / "out")) == 6 and "trained on" not in capsys.readouterr().err


def test_what_tuning_found_is_stored_beside_the_weights(scenes, finished, tmp_path, capsys):
    weights = copy_weights(finished, tmp_path / "mine")
    before = json.loads(weights.with_suffix(".json").read_text())
    flags = [f"--model.checkpoint={weights}", "--evaluate.clicks=0"]
    tune = ["--evaluate.search=true", "--evaluate.goal=recall", "--evaluate.store_thresholds=true"]

    tuned = run_evaluation(scenes, tmp_path / "tuned", *flags, *tune)

    assert f"thresholds stored: {weights.with_suffix('.json')}" in capsys.readouterr().out
    card = json.loads(weights.with_suffix(".json").read_text())
    assert (card["goal"], card["tuned_on"]) == ("recall", 1)
    assert card["generator"]["pred_iou_thresh"] == tuned["generator/pred_iou_thresh"]
    assert card["generator"]["score_map"] and card["baseline_generator"]["score_map"]
    changed = {name for name in card if card[name] != before[name]}
    assert changed <= {"generator", "goal", "tuned_on", "baseline_generator"}
    again = run_evaluation(scenes, tmp_path / "again", *flags)
    for name in ("generator/ap", "generator/f1", "baseline/generator/ap", "baseline/generator/f1"):
        assert again[name] == tuned[name]
    assert "thresholds chosen for recall on" in capsys.readouterr().out
    assert sorted(path.name for path in weights.parent.iterdir()) == ["best.json", "best.pth"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.checkpoint=none"], "random weights: they have no description beside them"),
        (["--model.checkpoint=auto", "--model.type=vit_tiny"], "they are part of finestsam; copy them"),
        (["--evaluate.search=false"], "evaluate.store_thresholds has nothing to store without --evaluate.search"),
        (["--evaluate.generator=false"], "evaluate.store_thresholds needs a model's generator"),
        (["--evaluate.predictions=x.json"], "evaluate.store_thresholds needs a model's generator"),
    ],
)
def test_thresholds_that_have_no_place_are_refused_in_one_line(scenes, tmp_path, capsys, flags, message):
    arguments = ["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={tmp_path}", f"--sav_dir={tmp_path}"]
    arguments += ["--device=cpu", "--model.type=vit_tiny_test", "--evaluate.search=true"]

    assert main([*arguments, "--evaluate.store_thresholds=true", *flags]) == 2

    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "evaluation.json").exists()


def test_models_with_other_thresholds_are_prompted_the_same(scenes, finished, tmp_path):
    """The number of points along a side that is stored beside one model is that of its generator alone."""
    other = tmp_path / "other" / "best.pth"
    other.parent.mkdir()
    other.write_bytes((finished / "best.pth").read_bytes())
    card = json.loads((finished / "best.json").read_text())
    card["generator"]["points_per_side"] = 7
    other.with_suffix(".json").write_text(json.dumps(card))
    flags = ["--mode=evaluate", f"--dataset={scenes}", "--device=cpu", "--num_workers=0", "--evaluate.clicks=0"]
    flags += ["--evaluate.generator=false"]

    assert main([*flags, f"--out_dir={tmp_path}", f"--model.checkpoint={finished}", f"--against={other}"]) == 0

    figures = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("point/iou", "point/boundary_iou", "box/iou", "background/score"):
        assert figures[name] == figures[f"baseline/{name}"]


def test_an_origin_that_is_gone_is_reported_and_another_can_be_named(scenes, finished, tmp_path, capsys):
    moved = tmp_path / "moved" / "best.pth"
    moved.parent.mkdir()
    for suffix in (".pth", ".json"):
        moved.with_suffix(suffix).write_bytes((finished / "best.pth").with_suffix(suffix).read_bytes())
    card = json.loads(moved.with_suffix(".json").read_text())
    moved.with_suffix(".json").write_text(json.dumps(card | {"started_from": "/nowhere.pth"}))

    alone = run_evaluation(scenes, tmp_path / "alone", f"--model.checkpoint={moved}")
    message = capsys.readouterr().out
    both = run_evaluation(scenes, tmp_path / "both", f"--model.checkpoint={moved}", f"--against={finished}")

    assert "/nowhere.pth" in message and "--evaluate.against" in message
    assert not any(name.startswith("baseline") for name in alone)
    assert both["difference/point/iou"] == 0


@pytest.mark.parametrize(("split", "count"), [("auto", 2), ("train", 4), ("val", 2)])
def test_a_split_can_be_named(scenes, tmp_path, split, count):
    run_evaluation(
        scenes, tmp_path, f"--evaluate.split={split}", "--dataset.val_size=0.3", "--evaluate.generator=false"
    )

    assert len((tmp_path / "per_image.csv").read_text().splitlines()) == count + 1


def test_a_split_that_is_not_there_is_reported(scenes, tmp_path, capsys):
    assert main(["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={tmp_path}", "--evaluate.split=test"]) == 2

    assert "no test split" in capsys.readouterr().err


def test_thresholds_are_searched_on_demand_and_said(scenes, tmp_path, capsys):
    figures = run_evaluation(scenes, tmp_path, "--evaluate.search=true", "--evaluate.goal=f1", "--evaluate.clicks=2")

    assert figures["generator/points_per_side"] == 4 and 0 <= figures["generator/pred_iou_thresh"] <= 1
    assert {"clicks/iou_1", "clicks/iou_2", "point/boundary_iou", "generator/calibration_error"} <= set(figures)
    assert "best for f1 on these images: --generator.points_per_side 4" in capsys.readouterr().out
