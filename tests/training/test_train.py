"""The real commands, on the smallest model and drawn scenes."""

import csv
import gc
import json
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FROM_SCRATCH, SMALL_STEPS, run_training, wait_for_epoch

from finestsam.cli import main
from finestsam.config import GENERATOR_DEFAULTS, build_config
from finestsam.model.architectures import build_sam
from finestsam.model.load import load_model
from finestsam.model.sam import FinestSam
from finestsam.training.hints import list_mismatches, warn_of_cpu, warn_of_schedule

ROOT = Path(__file__).parents[2]


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def load_last(run: Path) -> dict:
    return torch.load(run / "last.ckpt", weights_only=True)


def assert_same_weights(one: Path, other: Path, **tolerance: float) -> None:
    first, second = load_last(one)["model"], load_last(other)["model"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> Path:
    flags = ["--num_epochs=3", "--save_top_k=2", "--evaluate.all_prompts"]
    return run_training(scenes, tmp_path_factory.mktemp("sav"), *flags)


def test_a_run_leaves_everything_that_is_needed_to_use_repeat_and_continue_it(finished):
    names = {path.name for path in finished.iterdir()}

    assert {
        "config.yaml",
        "dataset_report.json",
        "split.json",
        "metrics.csv",
        "best.pth",
        "best.json",
        "last.ckpt",
    } <= names
    assert (finished / "plots" / "all_metrics.png").stat().st_size > 5000
    assert [path for path in finished.glob("*-0.*.pth") if path.with_suffix(".json").is_file()]
    card = json.loads((finished / "best.json").read_text())
    assert (card["model_type"], card["image_size"], card["multimask_output"]) == ("vit_tiny_test", 64, True)
    prompted = {"val_per_mask_iou", "val_per_mask_dice", "val_best_iou", "val_boundary_iou"}
    assert prompted | {"val_generator_ar_100", "val_generator_masks"} <= set(card["baseline"]) == set(card["metrics"])
    assert set(GENERATOR_DEFAULTS) - {"no_object_thresh"} | {"score_map"} == set(card["generator"])
    assert set(card["generator"]) == set(card["baseline_generator"])
    validated = json.loads((finished / "split.json").read_text())["val"]
    assert (card["goal"], card["tuned_on"]) == ("f1", len(validated))


def test_the_figures_have_a_row_for_the_unchanged_model_and_one_per_epoch(finished):
    rows = read_csv(finished)

    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert rows[0]["total_loss"] == ""
    assert float(rows[3]["total_loss"]) < float(rows[1]["total_loss"])
    assert rows[0]["seconds"] == "" and all(float(row["validation_seconds"]) > 0 for row in rows)
    assert all(float(row["seconds"]) > 0 for row in rows[1:])
    for row in rows[1:]:
        parts = sum(float(row[name]) for name in ("focal_loss", "dice_loss", "iou_loss"))
        assert parts == pytest.approx(float(row["total_loss"]), rel=1e-4)


def test_best_weights_load_anywhere_and_are_never_worse_than_the_unchanged_model(finished):
    state_dict = torch.load(finished / "best.pth", weights_only=True)
    loaded = load_model(build_config({"model.checkpoint": str(finished), "device": "cpu"}))

    assert set(state_dict) == set(loaded.model.sam.state_dict())
    assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in state_dict.values())
    card = json.loads((finished / "best.json").read_text())
    judged = ("val_generator_f1", "val_per_mask_iou")
    assert [card["metrics"][name] for name in judged] >= [card["baseline"][name] for name in judged]


def test_the_settings_of_a_run_repeat_it(finished, tmp_path):
    assert (
        main([f"--config={finished / 'config.yaml'}", "--mode=train", f"--sav_dir={tmp_path}", "--run_name=again"]) == 0
    )

    assert_same_weights(finished, tmp_path / "again")
    assert yaml.safe_load((finished / "config.yaml").read_text())["seed_device"] == 1337


@pytest.mark.parametrize(
    ("steps", "flags"),
    [
        (2, []),
        (5, ["--prompts.use_logits=true"]),
        (3, ["--sched.type=ReduceLROnPlateau"]),
        pytest.param(2, ["--dataset.prompts_per_object=2", "--prompts.correction_clicks=2"], marks=pytest.mark.slow),
        (2, ["--precision=16-mixed"]),
    ],
    ids=[
        "in the first epoch",
        "in a later epoch",
        "between two epochs",
        "with corrections",
        "in half precision",
    ],
)
def test_a_resumed_run_matches_an_unbroken_one(scenes, tmp_path, steps, flags):
    flags = [*flags, "--dataset.val_size=0.2", "--opt.accumulate_batches=2", "--batch_size=1"]
    run_training(scenes, tmp_path, "--run_name=whole", "--num_epochs=3", *flags)
    run_training(scenes, tmp_path, "--run_name=broken", "--num_epochs=3", f"--max_steps={steps}", *flags)

    assert main(["--mode=train", f"--resume={tmp_path / 'broken'}", "--max_steps=0"]) == 0

    assert_same_weights(tmp_path / "whole", tmp_path / "broken")
    drop = ("seconds", "validation_seconds")
    whole, broken = (
        [{name: value for name, value in row.items() if name not in drop} for row in read_csv(tmp_path / name)]
        for name in ("whole", "broken")
    )
    assert whole == broken
    scalers = [load_last(tmp_path / name)["scaler"] for name in ("whole", "broken")]
    assert scalers[0] == scalers[1]
    assert ("16-mixed" in str(flags)) == (scalers[0].get("_growth_tracker", 0) > 0)


def test_neither_a_second_time_nor_worker_processes_change_anything(scenes, tmp_path):
    flags = ["--dataset.val_size=0.4", "--num_epochs=2", "--generator.points_per_side=4", "--prompts.use_boxes=true"]
    image = next((scenes / "data" / "images").iterdir())
    kept = []
    for name, workers in (("first", 0), ("again", 0), ("workers", 2)):
        run = run_training(scenes, tmp_path / name, f"--num_workers={workers}", "--run_name=run", *flags)
        arguments = ["--mode=predict", f"--input={image}", f"--model.checkpoint={run}", "--device=cpu"]
        loose = ["--generator.pred_iou_thresh=0", "--generator.stability_score_thresh=0"]
        assert main([*arguments, *loose, f"--out_dir={tmp_path / name / 'out'}"]) == 0
        written = [path.read_bytes() for path in sorted((tmp_path / name / "out").glob("[!.]*")) if path.is_file()]
        rows = [{name: value for name, value in row.items() if "seconds" not in name} for row in read_csv(run)]
        kept.append((load_last(run), torch.load(run / "best.pth"), rows, written))

    for last, best, rows, written in kept[1:]:
        for name, value in kept[0][0]["model"].items():
            torch.testing.assert_close(last["model"][name], value, rtol=0, atol=0)
        assert all(torch.equal(best[name], value) for name, value in kept[0][1].items())
        assert rows == kept[0][2]
        assert len(written) == 2 and written == kept[0][3]


def test_a_finished_run_says_so_and_goes_on_with_more_epochs(finished, capsys):
    assert main(["--mode=train", f"--resume={finished}"]) == 0
    assert "already complete: 3 epochs" in capsys.readouterr().out

    assert main(["--mode=train", f"--resume={finished}", "--num_epochs=4"]) == 0
    assert [int(row["epoch"]) for row in read_csv(finished)] == [0, 1, 2, 3, 4]


def test_another_dataset_is_not_resumed(finished, coco_folder, capsys):
    square = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
    folder = coco_folder([square])

    assert main(["--mode=train", f"--resume={finished}", f"--dataset={folder}", "--dataset.val_size=0"]) == 2
    error = capsys.readouterr().err
    assert "the dataset is not the one that the run was trained on (new: " in error
    assert "; gone: " in error and "; categories " in error and error.endswith("; start a new run with it\n")


@pytest.mark.parametrize(
    "flags",
    [
        ["--multimask_output=false"],
        ["--prompts.use_points=false", "--prompts.use_boxes=true"],
        ["--prompts.use_masks=true", "--dataset.negative_points=2", "--dataset.positive_points=3"],
        ["--losses.resolution=low", "--precision=bf16-mixed"],
        ["--dataset.val_size=0"],
        ["--dataset.use_center=true", "--dataset.snap_to_grid=false", "--dataset.max_objects=4"],
        ["--early_stop_evaluations=1", "--opt.learning_rate=1e-9"],
        ["--dataset.prompts_per_object=3", "--prompts.use_logits=true", "--prompts.correction_clicks=1"],
    ],
)
def test_every_way_to_train_runs(scenes, tmp_path, flags):
    run = run_training(scenes, tmp_path, "--num_epochs=1", *flags)

    assert (run / "best.pth").is_file()


def test_a_strict_run_refuses_a_dataset_with_a_defect(coco_folder, tmp_path_factory, capsys):
    square = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
    folder = coco_folder([square, {"id": 2, "image_id": 1, "category_id": 1, "segmentation": []}])

    flags = ["--mode=train", f"--dataset={folder}", "--dataset.val_size=0", "--model.type=vit_tiny_test", "--strict"]
    assert main([*flags, "--device=cpu", f"--sav_dir={tmp_path_factory.mktemp('sav')}", *FROM_SCRATCH]) == 2
    assert "1 skipped (1 empty segmentation)" in capsys.readouterr().err


def test_a_mistyped_folder_is_reported_before_anything_is_downloaded(tmp_path, capsys):
    assert main(["--mode=train", f"--dataset={tmp_path / 'datset'}", "--device=cpu", f"--sav_dir={tmp_path}"]) == 2

    assert "datset: no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_evaluation_gives_the_figures_of_validation(scenes, finished, tmp_path, capsys):
    flags = ["--mode=evaluate", f"--dataset={scenes}", f"--model.checkpoint={finished}", "--device=cpu"]
    flags += [f"--out_dir={tmp_path}", "--num_workers=0", "--seed_device=1337", "--precision=32-true"]
    assert main(flags) == 0

    figures = json.loads((tmp_path / "evaluation.json").read_text())
    card = json.loads((finished / "best.json").read_text())
    pairs = {"point/iou": "per_mask_iou", "point/boundary_iou": "boundary_iou", "box/iou": "box_iou"}
    pairs |= {"box/boundary_iou": "box_boundary_iou", "clicks/iou_1": "clicks_iou_1", "clicks/iou_8": "clicks_iou_8"}
    for name, validated in pairs.items():
        # Other chunks round otherwise: a pixel more or less at a border, which can move the next click.
        assert figures[name] == pytest.approx(card["metrics"][f"val_{validated}"], abs=1e-3), name
    assert 0 <= figures["box/iou"] <= figures["box/best_iou"] <= 1


def start_command(scenes: Path, folder: Path, *flags: str) -> subprocess.Popen:
    arguments = ["--mode=train", f"--dataset={scenes}", "--model.type=vit_tiny_test", f"--sav_dir={folder}"]
    arguments += ["--device=cpu", "--num_workers=2", *FROM_SCRATCH, *flags]
    command = [sys.executable, "-m", "finestsam", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops_and_the_run_can_be_continued(scenes, tmp_path, number):
    process = start_command(scenes, tmp_path, "--num_epochs=100000", "--eval_interval=0", "--run_name=run")
    wait_for_epoch(process)

    process.send_signal(number)
    out, error = process.communicate(timeout=300)

    assert process.returncode == 128 + number
    assert "to go on: --mode train --resume" in out
    assert "Traceback" not in error
    progress = load_last(tmp_path / "run")["progress"]
    assert progress["step"] > 0
    flags = ["--mode=train", f"--resume={tmp_path / 'run'}", f"--num_epochs={progress['epoch'] + 1}"]
    assert main([*flags, "--num_workers=0"]) == 0


def slow(*flags: str) -> object:
    return pytest.param(list(flags), marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        slow("--task=semantic"),
        slow("--model_layer.freeze.image_encoder=true", "--prompts.use_boxes=true"),
        slow("--model_layer.freeze.image_encoder=true", "--model_layer.lora.rank=2", "--model_layer.thaw.blocks=1"),
        slow(
            "--prompts.use_boxes=true",
            "--prompts.mix=true",
            "--dataset.background_points=6",
            "--evaluate.all_prompts",
        ),
        slow(
            "--prompts.use_points=false",
            "--prompts.use_boxes=true",
            "--prompts.correction_clicks=1",
        ),
    ],
)
def test_two_processes_learn_what_one_learns_at_the_same_global_batch(scenes, tmp_path, flags):
    # 3 images a side: shares are never equal.
    flags = ["--num_epochs=2", "--dataset.val_size=0.5", *SMALL_STEPS, *flags]
    run_training(scenes, tmp_path, "--run_name=one", "--batch_size=2", *flags)
    two = start_command(scenes, tmp_path, "--run_name=two", "--batch_size=1", "--num_devices=2", *flags)
    assert two.wait(timeout=300) == 0, two.stderr.read()

    atol = 1e-4 if "--task=semantic" in flags else 1e-5
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=atol)
    rows = [read_csv(tmp_path / name) for name in ("one", "two")]
    # The baseline is the same one, and what is measured does not depend on who measures it.
    baselines = [{name: value for name, value in row[0].items() if name != "validation_seconds"} for row in rows]
    assert baselines[0] == baselines[1]
    for first, second in zip(*rows, strict=True):
        for name in ("total_loss", "val_per_mask_iou", "val_best_iou", "val_miou"):
            if first.get(name):
                assert float(second[name]) == pytest.approx(float(first[name]), abs=1e-5 if "loss" in name else 1e-3)
    assert len(list(tmp_path.iterdir())) == 2  # only one rank makes a folder


def test_settings_that_train_what_prediction_does_not_read_are_named():
    def warn(**values: object) -> str:
        return " ".join(list_mismatches(build_config(values), starts_from_nothing=False))

    assert "without positive points" in warn(**{"prompts.use_points": False, "prompts.use_boxes": True})
    assert "more than the one point" in warn(**{"prompts.mix": False})
    assert warn() == warn(**{"prompts.use_boxes": False}) == ""
    assert "not snapped" in warn(**{"dataset.snap_to_grid": False})
    assert "never learns to see" in list_mismatches(build_config({}), starts_from_nothing=True)[0]


def test_a_large_model_on_a_cpu_that_nobody_requested_is_reported():
    large, small = (FinestSam(build_sam("vit_tiny_test", size)) for size in (1024, 64))

    (warning,) = warn_of_cpu(build_config({}), "cpu", large, "vit_b")
    assert "no GPU found" in warning
    for wanted, device, model in (("cpu", "cpu", large), ("auto", "cuda", large), ("auto", "cpu", small)):
        assert warn_of_cpu(build_config({"device": wanted}), device, model, "vit_b") == []


def test_a_schedule_that_the_run_is_too_short_for_is_reported(scenes, tmp_path, capsys):
    config = build_config({"sched.LambdaLR.warmup_steps": 5, "sched.LambdaLR.steps": [10, 20]})

    assert "within the 5 steps of its warm-up" in warn_of_schedule(config, 5, 100)[0]
    assert warn_of_schedule(config, 20, 100) == [
        "sched.LambdaLR.steps [20] come after the run's last step, which is 20"
    ]
    assert warn_of_schedule(config, 21, 100) == []
    config = build_config({"sched.LambdaLR.warmup_steps": 5, "sched.LambdaLR.steps": [0.5]})
    assert warn_of_schedule(config, 5, 20) == []  # a warm-up of 2 of the 20 steps of all epochs
    assert warn_of_schedule(build_config({"sched.type": "ReduceLROnPlateau"}), 1, 1) == []

    flags = ["--num_epochs=1", "--dataset.val_size=0.4", "--opt.accumulate_batches=2", "--sched.LambdaLR.steps=[60]"]
    run_training(scenes, tmp_path, *flags)
    assert "come after the run's last step, which is 2" in capsys.readouterr().out


def test_a_run_with_the_store_learns_what_a_run_without_room_in_it_learns(scenes, tmp_path, monkeypatch):
    frozen = ["--model_layer.freeze.image_encoder=true", "--eval_interval=1"]
    stored = run_training(scenes, tmp_path / "stored", *frozen)
    monkeypatch.setenv("FINESTSAM_CACHE", str(tmp_path / "empty"))
    encoded = run_training(scenes, tmp_path / "encoded", "--store.max_gigabytes=0", *frozen)

    assert not list((tmp_path / "empty").glob("embeddings/*/*/*.f16"))
    first, second = (torch.load(folder / "best.pth") for folder in (stored, encoded))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("share", ["0.4", "auto"])
def test_some_of_the_original_weights_can_be_put_back(scenes, tmp_path, capsys, share):
    flags = ["--best_metric=val_per_mask_iou", "--num_epochs=3"]
    plain = run_training(scenes, tmp_path / "plain", *flags)
    blended = run_training(scenes, tmp_path / "blended", f"--opt.keep_original={share}", *flags)

    said = [line for line in capsys.readouterr().out.splitlines() if "of the original weights" in line]
    assert len(said) == (4 if share == "auto" else 1)
    card = json.loads((blended / "best.json").read_text())
    best, original = torch.load(plain / "best.pth"), torch.load(blended / "start.pth")
    result = torch.load(blended / "best.pth")
    kept = card["kept_original"]
    assert kept == 0.4 if share == "0.4" and "no better" not in said[0] else kept in (0, 0.1, 0.2, 0.3, 0.5)
    for name, value in result.items():
        expected = torch.lerp(best[name], original[name], kept) if name in original else best[name]
        torch.testing.assert_close(value, expected)
    assert card["metrics"]["val_per_mask_iou"] >= card["baseline"]["val_per_mask_iou"]
    assert load_last(plain)["model"].keys() == load_last(blended)["model"].keys()


def test_the_processes_of_a_run_end_with_it(scenes, tmp_path):
    gc.disable()  # which may happen to end them
    before = multiprocessing.active_children()  # of a test whose error pytest keeps, say
    try:
        run_training(scenes, tmp_path, "--num_workers=2")
        assert [process for process in multiprocessing.active_children() if process not in before] == []
    finally:
        gc.enable()


def test_a_validation_that_takes_longer_than_its_epoch_says_how_to_make_it_cheaper(
    scenes, tmp_path, capsys, monkeypatch
):
    run_training(scenes, tmp_path / "cheap", "--num_epochs=1")
    assert "make it cheaper" not in capsys.readouterr().out
    monkeypatch.setattr("finestsam.training.messages.CHEAP_SECONDS", 0)
    monkeypatch.setattr("finestsam.training.state.Progress.seconds", property(lambda _: 0.0, lambda *_: None))

    run_training(scenes, tmp_path / "dear", "--num_epochs=1")

    assert "--evaluate.max_images) make it cheaper" in capsys.readouterr().out
