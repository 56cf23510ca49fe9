"""A task that finestsam does not have, in one class: trained, continued and predicted, and named nowhere else."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finestsam import tasks
from finestsam.batch import Sample
from finestsam.config import Config, build_config
from finestsam.data.cells import PADDING, label_cells
from finestsam.model import card
from finestsam.model import load as loading
from finestsam.model.heads import load_head
from finestsam.modes.predict import predict
from finestsam.prediction.each_image import predict_each
from finestsam.prediction.files import name_outputs
from finestsam.tasks.base import Task, Validation
from finestsam.training.train import train

SETTINGS = {
    "model.type": "vit_tiny_test", "model.checkpoint": "none", "model_layer.freeze.image_encoder": False,
    "device": "cpu", "precision": "32-true", "num_workers": 0, "num_epochs": 1, "opt.learning_rate": 1e-3,
    "dataset.val_size": 0.4, "run_name": "run", "opt.accumulate_batches": 2,
}  # fmt: skip


class CoverageHead(nn.Module):
    SUFFIX = ".coverage.pth"

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.linear(embeddings.mean(dim=(2, 3)))[:, 0].sigmoid()


def load_coverage_head(weights: Path, names: list[str], width: int) -> CoverageHead:
    return load_head(weights, CoverageHead, lambda state: CoverageHead(len(state["linear.weight"][0])), "it", width)


class CoverageTask(Task):
    """How much of an image its objects cover, 0 to 1."""

    name = "coverage"
    measures = {"total_loss": "Total loss", "error": "Error"}
    columns = ("val_closeness",)
    printed = {"val_closeness": "closeness {:.3f}"}
    metric = "val_closeness"

    def begin_training(self, loaded, data, names):
        self.model.coverage_head = CoverageHead(self.model.sam.prompt_encoder.embed_dim)

    def choose_targets(self, settings):
        return replace(settings, label_cells=label_cells, prompts_objects=False)

    choose_validation_targets = choose_targets

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        covered = torch.stack([(one.cells > 0).sum() / (one.cells != PADDING).sum() for one in samples])
        error = self.model.coverage_head(embeddings) - covered
        return torch.stack([error.square(), error.abs().detach()], dim=1)

    @torch.no_grad()
    def validate(self, given):
        def measure():
            samples = [sample for batch, _ in given.batches for sample in batch.samples]
            return [self.compute_image_losses(given.embedder.embed([one]), [one])[0, 1].item() for one in samples]

        errors = [error for share in given.ranks.gather(measure) for error in share]
        return Validation({"val_closeness": 1 - sum(errors) / len(errors)})

    @torch.no_grad()
    def predict(self, loaded, paths, out_dir, embedder):
        def write(pixels: np.ndarray, embedding: Tensor, outputs: tuple[Path, ...]) -> float:
            coverage = self.model.coverage_head(embedding).item()
            outputs[0].write_text(json.dumps(coverage))
            return coverage

        outputs = name_outputs(paths, out_dir, (".json",))
        found = predict_each(paths, outputs, embedder, self.config.dataset.images, write)
        print(f"mean coverage {sum(found.results) / len(found.results):.3f}")
        return 0


@pytest.fixture
def coverage(scenes, tmp_path, monkeypatch) -> Config:
    """Settings that train the task, which is registered."""
    monkeypatch.setitem(tasks.TASKS, "coverage", CoverageTask)
    monkeypatch.setitem(loading.HEADS, "coverage", loading.HeadFile("coverage_head", "categories", load_coverage_head))
    monkeypatch.setattr(card, "TASKS", [*card.TASKS, "coverage"])
    config = build_config(SETTINGS | {"dataset.path": str(scenes), "sav_dir": str(tmp_path)})
    return replace(config, task="coverage")


def read_rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if "seconds" not in name} for row in csv.DictReader(file)]


def test_a_fourth_task_is_trained_and_predicts_what_it_learned(coverage, scenes, tmp_path, capsys):
    assert train(coverage) == 0

    run, out = tmp_path / "run", capsys.readouterr().out
    assert "validation (baseline): closeness" in out and "val_closeness 0." in out
    rows = read_rows(run)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert 0 <= float(rows[1]["val_closeness"]) <= 1 and float(rows[1]["error"]) > 0
    assert json.loads((run / "best.json").read_text())["task"] == "coverage"
    assert (run / "best.coverage.pth").is_file() and (run / "plots" / "error.png").is_file()

    images = scenes / "data" / "images"
    wanted = replace(coverage, task="auto", input=[str(images)], out_dir=str(tmp_path / "out"))
    assert predict(replace(wanted, model=replace(wanted.model, checkpoint=str(run)))) == 0

    assert "mean coverage" in capsys.readouterr().out
    for path in images.iterdir():
        assert 0 < json.loads((tmp_path / "out" / f"{path.stem}.json").read_text()) < 1


def test_a_fourth_task_is_continued_exactly(coverage, tmp_path):
    whole, broken = (replace(coverage, run_name=name, num_epochs=2) for name in ("whole", "broken"))
    assert train(whole) == 0
    assert train(replace(broken, max_steps=1)) == 0

    assert train(replace(broken, resume=str(tmp_path / "broken"))) == 0

    first, second = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "broken"))
    for part in ("model", "coverage_head"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "broken")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_has_a_choice_of_the_setting_and_a_description(name):
    task = tasks.TASKS[name](build_config({"task": name}), None)

    assert name in card.TASKS and task.name == name
    assert next(iter(task.measures)) == "total_loss"
    assert {task.metric, *task.default_metrics.values(), *task.printed} <= set(task.columns)
