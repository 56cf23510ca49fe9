"""`--mode evaluate` as it is called, and the figures of prompted masks against numpy's."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from finestsam.batch import Batch
from finestsam.cli import main
from finestsam.config import GENERATOR_DEFAULTS, GeneratorConfig, ImagesConfig, build_config
from finestsam.data.dataset import SampleDataset, SampleSettings, collate
from finestsam.evaluation.generator_scores import find_all, score_generator
from finestsam.evaluation.prompt_scores import score_batches, summarize_scores
from finestsam.masks import decode_rle
from finestsam.model.sam import upscale_logits
from finestsam.prediction.precompute import Embedder

SETTINGS = GeneratorConfig(
    **GENERATOR_DEFAULTS | {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}
)


def run_evaluation(scenes, folder, *flags):
    arguments = ["--mode=evaluate", f"--dataset={scenes}", f"--out_dir={folder}", "--model.type=vit_tiny_test"]
    arguments += ["--model.checkpoint=none", "--device=cpu", "--num_workers=0", "--generator.points_per_side=4"]
    assert main([*arguments, "--seed_device=0", *flags]) == 0
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture
def dataset(records):
    config = build_config({})
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


def test_the_generator_is_scored_on_every_picture_that_can_be_read(tiny_sam, records, capsys, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    shown = [*records[:2], dataclasses.replace(records[2], path=broken)]

    found = find_all(Embedder(tiny_sam), shown, SETTINGS, ImagesConfig())
    scores = score_generator(shown, found)

    assert found[2] is None
    assert "skipped" in capsys.readouterr().err
    assert scores["images"] == 2
    assert scores["masks_per_image"] == np.mean([len(one.rles) for one in found[:2]])
    assert 0 <= scores["ap"] <= scores["ar_1000"] <= 1


def test_nothing_that_can_be_read_gives_no_figures(records):
    assert score_generator(records[:1], [None]) == {}
