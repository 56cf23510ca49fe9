"""The task classes from training to prediction, on the smallest model and drawn images of two categories."""

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_training
from lightning.fabric import Fabric
from named_shapes import write_named_shapes
from torch.nn import functional as F

from finestsam.batch import Batch, Prompts, Sample
from finestsam.cli import main
from finestsam.config import DatasetConfig, build_config
from finestsam.data.categories import number_categories
from finestsam.data.cells import label_cells
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.read import read_training_set
from finestsam.model.architectures import build_sam
from finestsam.model.heads import ClassHead, head_path
from finestsam.model.load import load_model
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder
from finestsam.records import Record
from finestsam.tasks.classes import ClassesTask, _mean_best_and_others, fit_classes, weigh_classes
from finestsam.tasks.losses import object_losses
from finestsam.training.optim import build_optimizer
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_

TASK = "--task=classes"
QUICK = ["--losses.resolution=low", "--generator.points_per_side=4", "--dataset.val_size=0.2"]
NAMES = ["ball <b> & co", "crate"]
BRIEF = [*QUICK, "--evaluate.generator=false", "--max_steps=2"]
POINTS = ["--prompts.use_boxes=false", "--dataset.background_points=0"]
ALL_TRAIN = {"model_layer.freeze.image_encoder": False, "model_layer.freeze.prompt_encoder": False}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_named_shapes(tmp_path_factory.mktemp("shapes"), 20)


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory) -> Path:
    """A run of twelve epochs, whose classes are learnt and whose masks are rough."""
    flags = ["--num_epochs=12", "--eval_interval=0", "--opt.learning_rate=2e-3", "--sched.LambdaLR.warmup_steps=10"]
    return run_training(shapes, tmp_path_factory.mktemp("sav"), TASK, *QUICK, *flags, *POINTS, "--save_top_k=1")


@pytest.fixture(scope="module")
def shape_records(shapes) -> list[Record]:
    return read_training_set(DatasetConfig(path=str(shapes), val_size=0.0, use_cache=False)).train


def read_csv(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def make_samples(records: list[Record], count: int = 3, **values: object) -> list[Sample]:
    config = build_config({"prompts.use_boxes": False} | values)
    table = number_categories({3: NAMES[0], 7: NAMES[1]})
    settings = SampleSettings(64, 16, 0, config.prompts, config.dataset, label_cells=label_cells, categories=table)
    dataset = SampleDataset(records, settings)
    clicks = config.prompts.correction_clicks
    return [replace(dataset[(0, place)], correction_clicks=clicks) for place in range(count)]


def measure_accuracy(model: FinestSam, folder: Path) -> float:
    """Return on how many objects of a dataset the mask that fits best gets the right one of the categories."""
    records = read_training_set(DatasetConfig(path=str(folder), val_size=0.0, use_cache=False)).train
    hits, count, settings = 0, 0, build_config({}).losses
    with torch.no_grad():
        for sample in make_samples(records, count=len(records)):
            predictions = model.eval()(model.encode([sample.image]), sample.prompts)
            best = object_losses(predictions, sample, 0, settings, 64).ious.argmax(dim=1)
            chosen = predictions.class_logits[torch.arange(len(sample)), best, 1:].argmax(dim=1) + 1
            hits += int((chosen == torch.tensor(sample.object_classes)).sum())
            count += len(sample)
    return hits / count


def test_a_head_learns_what_an_untrained_one_does_not_know(finished, tmp_path):
    unseen = write_named_shapes(tmp_path, 20, seed=99)
    loaded = load_model(build_config({"model.checkpoint": str(finished), "device": "cpu"}), prefer_runs=True).model

    learnt = measure_accuracy(loaded, unseen)
    guesses = []
    for seed in range(4):  # of two categories a single one can be lucky
        torch.manual_seed(seed)
        loaded.class_head = ClassHead(32, 3)
        guesses.append(measure_accuracy(loaded, unseen))

    assert learnt > 0.85 and sum(guesses) / 4 < 0.7
    rows = read_csv(finished)
    assert float(rows[-1]["class_accuracy"]) > 0.9 > float(rows[1]["class_accuracy"])
    assert float(rows[-1]["class_loss"]) < 0.5 * float(rows[1]["class_loss"])


def test_a_run_leaves_a_plain_sam_its_head_beside_it_and_the_categories_in_its_card(finished):
    card = json.loads((finished / "best.json").read_text())

    build_sam("vit_tiny_test").load_state_dict(torch.load(finished / "best.pth", weights_only=True))
    assert card["task"] == "classes"
    assert (card["categories"], card["category_ids"]) == (NAMES, [3, 7])
    assert {"val_classes_ap", "val_classes_ap50", "val_classes_ar_100"} <= set(card["metrics"])
    assert 0 <= card["generator"]["no_object_thresh"] <= 1
    assert len(list(finished.glob("*-0.*.classes.pth"))) == 1
    assert (finished / "plots" / "class_accuracy.png").is_file()
    for row in read_csv(finished)[1:]:
        parts = sum(float(row[f"{name}_loss"]) for name in ("focal", "dice", "iou", "class"))
        assert parts == pytest.approx(float(row["total_loss"]), rel=1e-4)


def test_the_saved_model_gives_what_the_trained_one_gave(shapes, tmp_path):
    run = run_training(shapes, tmp_path, TASK, *BRIEF, "--dataset.val_size=0")
    state = torch.load(run / "last.ckpt", weights_only=True)
    trained = FinestSam(build_sam("vit_tiny_test")).eval()
    trained.sam.load_state_dict(state["model"])
    trained.class_head = ClassHead(32, 3)
    trained.class_head.load_state_dict(state["class_head"])
    config = build_config({"model.checkpoint": str(run), "device": "cpu", "precision": "32-true"})
    loaded = load_model(config, prefer_runs=True).model
    image = torch.randint(0, 255, (3, 64, 48), dtype=torch.uint8)
    prompts = Prompts(points=torch.rand(4, 1, 2) * 48, labels=torch.ones(4, 1))

    with torch.no_grad():
        expected, found = (model(model.encode([image]), prompts) for model in (trained, loaded))

    assert torch.equal(found.class_logits, expected.class_logits) and torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_resumed_run_matches_an_unbroken_one(shapes, tmp_path, frozen):
    flags = [TASK, *BRIEF, f"--model_layer.freeze.image_encoder={frozen}", "--dataset.background_points=2"]
    run_training(shapes, tmp_path, "--run_name=whole", *flags, "--max_steps=5")
    run_training(shapes, tmp_path, "--run_name=broken", *flags)

    assert main(["--mode=train", f"--resume={tmp_path / 'broken'}", "--max_steps=5"]) == 0

    whole, broken = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "broken"))
    for part in ("model", "class_head"):
        assert all(torch.equal(value, broken[part][name]) for name, value in whole[part].items())
    assert whole["categories"] == broken["categories"] == NAMES


def test_a_resumed_run_keeps_the_order_of_its_head(finished, shapes, tmp_path):
    other = write_named_shapes(tmp_path / "other", 6, categories={3: "crate", 7: NAMES[0]})
    flags = [TASK, *BRIEF, f"--model.checkpoint={finished}", "--opt.learning_rate=1e-3"]
    run = run_training(other, tmp_path / "sav", *flags)

    assert main(["--mode=train", f"--resume={run}", "--max_steps=3"]) == 0

    card = json.loads((run / "best.json").read_text())
    assert (card["categories"], card["category_ids"]) == (NAMES, [7, 3])
    assert torch.load(run / "last.ckpt", weights_only=True)["categories"] == NAMES


def test_training_goes_on_from_a_head_for_the_same_categories(finished, shapes, tmp_path):
    flags = [TASK, f"--model.checkpoint={finished}", "--opt.head_learning_rate=1e-9", "--opt.learning_rate=1e-9"]

    run = run_training(shapes, tmp_path, *flags, *BRIEF)

    before, after = (
        torch.load(head_path(folder / "best.pth", ClassHead), weights_only=True) for folder in (finished, run)
    )
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["head alone", "low-rank additions", "single mask"])
def test_a_head_learns_beside_whatever_trains(shapes, tmp_path, part):
    flags = {
        "head alone": ["--model_layer.freeze.mask_decoder=true"],
        "low-rank additions": ["--model_layer.lora.rank=2", "--model_layer.lora.encoder=all"],
        "single mask": ["--multimask_output=false"],
    }[part]
    torch.manual_seed(3)
    torch.save(build_sam("vit_tiny_test").state_dict(), tmp_path / "base.pth")
    flags += ["--model_layer.freeze.image_encoder=true", "--model_layer.freeze.prompt_encoder=true"]

    run = run_training(shapes, tmp_path / "sav", TASK, *BRIEF, f"--model.checkpoint={tmp_path / 'base.pth'}", *flags)

    config = build_config({"model.checkpoint": str(run), "device": "cpu"})
    assert load_model(config, prefer_runs=True).model.class_head is not None
    same = all(
        torch.equal(value, torch.load(run / "best.pth", weights_only=True)[name])
        for name, value in torch.load(tmp_path / "base.pth", weights_only=True).items()
    )
    if part == "head alone":
        assert same
    if part == "low-rank additions":
        assert (run / "adapter" / "adapter_model.classes.pth").is_file()


def test_original_weights_come_back_with_the_best_head(shapes, tmp_path):
    flags = ["--opt.keep_original=0.5", "--num_epochs=1", "--best_metric=val_per_mask_iou", "--max_steps=0"]
    run = run_training(shapes, tmp_path, TASK, *BRIEF, *flags)

    card = json.loads((run / "best.json").read_text())
    head = torch.load(head_path(run / "best.pth", ClassHead), weights_only=True)
    assert card["kept_original"] in (0.0, 0.5)
    assert head["classify.2.weight"].shape == (3, 32)


def make_stepper(tiny_sam: FinestSam, **values: object) -> Stepper:
    config = build_config(ALL_TRAIN | values)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = copy.deepcopy(tiny_sam).train()
    torch.manual_seed(2)
    model.class_head = ClassHead(32, 3)
    freeze_(model, config)
    _, optimizer = fabric.setup(model, build_optimizer(model, config.opt))
    task, scaler = ClassesTask(config, model), torch.amp.GradScaler("cpu", enabled=False)
    task.class_weights = torch.tensor([1.0, 0.7, 1.6])
    stepper = Stepper(fabric, task, optimizer, scaler, Embedder(model), chunk_objects=config.chunk_objects or 16)
    stepper.clip_norm = float("inf")  # so that a gradient can be compared with another one
    return stepper


def compute_gradients(stepper: Stepper, samples: list[Sample]) -> dict[str, torch.Tensor]:
    stepper.step([Batch(samples[:2]), Batch(samples[2:])], epoch=0, wants_stop=False)
    return {name: weight.grad for name, weight in stepper.model.named_parameters() if weight.requires_grad}


def test_the_gradient_is_that_of_the_mean_loss_of_masks_and_classes(tiny_sam, shape_records):
    samples = make_samples(shape_records, **{"dataset.background_points": 3})
    stepper = make_stepper(tiny_sam, chunk_objects=2)
    plain, weights, total = copy.deepcopy(stepper.model), torch.tensor([1.0, 0.7, 1.6]), 0.0
    for sample in samples:
        embedding = plain.encode([sample.image])
        predictions = plain(embedding, sample.prompts)
        losses = object_losses(predictions, sample, 0, stepper.config.losses, 64)
        fitting = fit_classes(predictions.logits, sample)
        for row, own in enumerate(sample.object_classes):
            others = []
            for mask in range(3):
                probabilities = predictions.class_logits[row, mask].log_softmax(0)
                iou = losses.ious[row, mask]
                if mask == losses.best[row]:
                    best = -weights[own] * probabilities[own]
                elif iou >= 0.5:
                    others.append(-weights[own] * probabilities[own])
                elif fitting[row, mask] > 0:
                    others.append(-weights[fitting[row, mask]] * probabilities[fitting[row, mask]])
                elif fitting[row, mask] == 0 and iou < 0.3:
                    others.append(-probabilities[0])
            total = total + losses.total[row] + ((best + sum(others) / len(others)) / 2 if others else best)
        background = plain(embedding, sample.background)
        targets = fit_classes(background.logits, sample)
        assert (targets == 0).any()
        errors = F.cross_entropy(background.class_logits[targets == 0], targets[targets == 0], reduction="none")
        assert (targets <= 0).all()
        total = total + (background.scores.square().mean() + errors.mean()) * len(sample)
    (total / sum(map(len, samples))).backward()

    found = compute_gradients(stepper, samples)

    for name, weight in plain.named_parameters():
        if weight.requires_grad and weight.grad is not None:
            torch.testing.assert_close(found[name], weight.grad, rtol=2e-3, atol=2e-6)
    assert found["class_head.classify.2.weight"].abs().max() > 0


@pytest.mark.parametrize(
    "values",
    [
        {"dataset.background_points": 3},
        {"dataset.prompts_per_object": 3, "losses.resolution": "low"},
        {"prompts.correction_clicks": 1},
    ],
)
def test_chunks_of_any_size_give_one_gradient(tiny_sam, shape_records, values):
    samples = make_samples(shape_records, **values)

    whole = compute_gradients(make_stepper(tiny_sam, chunk_objects=500, **values), samples)
    chunked = compute_gradients(make_stepper(tiny_sam, chunk_objects=1, **values), samples)

    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=2e-6)


def make_cells() -> Sample:
    """Return 8 x 8 cells: an object of class 2 (rows 0 to 3), one of class 1 inside it, a crowd, and padding below."""
    cells = torch.zeros(8, 8, dtype=torch.int32)
    cells[:4, :4] = 1
    cells[1:3, 1:3] = 2
    cells[4:6, :4] = -2
    cells[7] = -1
    return Sample(1, "a", (8, 8), (7, 8), None, Prompts(), cells=cells, cell_classes=[2, 1])


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((0, 4), (0, 4), 2),  # the large object, and with it the small one
        ((1, 3), (1, 3), 1),  # the small one
        ((0, 4), (4, 8), 0),  # nothing
        ((0, 1), (0, 3), 0),  # a corner of the large one
        ((0, 2), (0, 4), -1),  # half of it: nobody can tell
        ((4, 6), (0, 4), -1),  # a crowd region
        ((0, 0), (0, 0), -1),  # an empty mask
        ((6, 8), (4, 8), 0),  # half in the padding, which is cut off
    ],
)
def test_a_mask_is_taught_what_it_fits(rows, columns, expected):
    logits = torch.full((1, 1, 8, 8), -1.0)
    logits[..., rows[0] : rows[1], columns[0] : columns[1]] = 1.0

    assert fit_classes(logits, make_cells()).item() == expected


def test_an_object_counts_as_much_as_what_its_other_masks_are():
    errors = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0], [5.0, 7.0, 0.0]])
    targets = torch.tensor([[1, 0, 0], [2, -1, -1], [0, 1, -1]])

    found = _mean_best_and_others(errors, targets, best=torch.tensor([0, 0, 1]))

    assert found.tolist() == [(1 + 3) / 2, 3, (7 + 5) / 2]


def test_rare_categories_count_more_and_all_together_as_before(shape_records):
    table = number_categories({3: "ball", 7: "crate", 9: "never"})
    counts = [
        sum(one.category_id == number for record in shape_records for one in record.annotations) for number in (3, 7)
    ]

    weights = weigh_classes(shape_records, table)

    assert weights[0] == 1
    assert weights[1] / weights[2] == pytest.approx((counts[1] / counts[0]) ** 0.5)
    assert (weights[1] * counts[0] + weights[2] * counts[1]).item() == pytest.approx(sum(counts))


def test_a_dataset_of_one_category_learns_whether_a_mask_is_an_object(coco_folder, tmp_path, capsys, scenes):
    content = json.loads((scenes / "data" / "annotations.json").read_text())
    folder = tmp_path / "one"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "images").symlink_to(scenes / "data" / "images")
    annotations = [{k: v for k, v in one.items() if k != "category_id"} for one in content["annotations"]]
    (folder / "data" / "annotations.json").write_text(
        json.dumps({"images": content["images"], "annotations": annotations})
    )

    run = run_training(folder, tmp_path / "sav", TASK, *BRIEF)

    assert "object (" in (said := capsys.readouterr().out)
    assert "there is only one, so what is learnt is whether a mask is an object" in said
    assert torch.load(head_path(run / "best.pth", ClassHead), weights_only=True)["classify.2.weight"].shape[0] == 2


def test_a_run_is_not_continued_with_other_categories_than_its_head_s(shapes, tmp_path, capsys):
    own = write_named_shapes(tmp_path / "own", 4)
    run = run_training(own, tmp_path / "sav", TASK, *BRIEF, "--dataset.use_cache=false")
    path = own / "data" / "annotations.json"
    path.write_text(path.read_text().replace('"crate"', '"wheel"'))

    assert main(["--mode=train", f"--resume={run}", "--max_steps=3"]) == 2

    assert "(categories ball <b> & co, wheel, were ball <b> & co, crate); start a new run" in capsys.readouterr().err
