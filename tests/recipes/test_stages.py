"""finestsam's training with the steps of the recipe, on the smallest model."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FROM_SCRATCH, run_training

from finestsam.model.architectures import build_sam
from recipes.builtin_weights.train import AffinitiesAlone, MasksAndAffinities, train_stage

ROOT = Path(__file__).parents[2]
ALONE = ("--model_layer.freeze.prompt_encoder=true", "--model_layer.freeze.mask_decoder=true")
BESIDE = ("--prompts.mix=true", "--prompts.use_boxes=true", "--dataset.background_points=6")
BOTH = pytest.mark.parametrize(
    ("name", "task", "flags"),
    [("alone", AffinitiesAlone, ALONE), ("beside", MasksAndAffinities, BESIDE)],
    ids=["alone", "beside the masks"],
)


def list_arguments(scenes: Path, folder: Path, *flags: str) -> list[str]:
    arguments = [f"--dataset={scenes}", "--model.type=vit_tiny_test", f"--sav_dir={folder}", "--device=cpu"]
    return [*arguments, "--num_workers=0", "--evaluate.generator=false", *FROM_SCRATCH, *flags]


def load_last(run: Path) -> dict:
    return torch.load(run / "last.ckpt", weights_only=True)


def read_rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@BOTH
def test_a_resumed_stage_matches_an_unbroken_one(scenes, tmp_path, name, task, flags):
    flags = [*flags, "--num_epochs=2", "--dataset.val_size=0.2", "--opt.accumulate_batches=2"]
    for run, steps in (("whole", 0), ("broken", 2)):
        arguments = list_arguments(scenes, tmp_path, f"--run_name={run}", f"--max_steps={steps}", *flags)
        assert train_stage(task, arguments) == 0

    assert train_stage(task, [f"--resume={tmp_path / 'broken'}", "--max_steps=0"]) == 0

    whole, broken = (load_last(tmp_path / run) for run in ("whole", "broken"))
    for part in ("model", "training_head"):
        assert all(torch.equal(value, broken[part][key]) for key, value in whole[part].items())
    assert whole["training_head"]["weight"].abs().max() > 0


def test_an_encoder_learns_affinities_alone_and_the_decoder_stays(scenes, tmp_path):
    start = tmp_path / "start.pth"
    torch.save(build_sam("vit_tiny_test").state_dict(), start)
    flags = ["--num_epochs=30", "--eval_interval=0", f"--model.checkpoint={start}", "--opt.learning_rate=1e-2"]

    assert train_stage(AffinitiesAlone, list_arguments(scenes, tmp_path, "--run_name=run", *flags, *ALONE)) == 0

    before, after = torch.load(start), load_last(tmp_path / "run")["model"]
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"image_encoder"}
    rows = read_rows(tmp_path / "run")
    losses = [float(row["total_loss"]) for row in rows[1:]]
    assert losses[-1] < 0.8 * losses[0] < 0.8 * 0.75  # of a coin: 0.69
    assert "iou" not in rows[0]


def test_weights_that_affinities_helped_to_learn_load_anywhere(scenes, tmp_path):
    plain = run_training(scenes, tmp_path / "plain", "--num_epochs=1")
    arguments = list_arguments(scenes, tmp_path, "--run_name=helped", "--num_epochs=1")
    assert train_stage(MasksAndAffinities, arguments) == 0

    first, second = torch.load(plain / "best.pth"), torch.load(tmp_path / "helped" / "best.pth")
    assert first.keys() == second.keys()
    name = "image_encoder.patch_embed.proj.weight"
    assert not torch.equal(load_last(plain)["model"][name], load_last(tmp_path / "helped")["model"][name])


def test_a_checkpoint_whose_head_predicts_other_distances_is_refused_in_one_line(scenes, tmp_path):
    arguments = list_arguments(scenes, tmp_path, "--run_name=run", "--max_steps=1", *BESIDE)
    assert train_stage(MasksAndAffinities, arguments) == 0
    path = tmp_path / "run" / "last.ckpt"
    state = load_last(path.parent)
    state["training_head"] = {name: value[:-16] for name, value in state["training_head"].items()}
    torch.save(state, path)

    with pytest.raises(SystemExit, match="begun by a version of finestsam that divides the weights otherwise"):
        train_stage(MasksAndAffinities, [f"--resume={path.parent}", "--max_steps=2"])


@pytest.mark.slow
@BOTH
def test_two_processes_learn_what_one_learns_at_the_same_global_batch(scenes, tmp_path, name, task, flags):
    flags = ["--num_epochs=2", "--dataset.val_size=0.5", *flags]  # 3 images a side: shares are never equal
    for run, size, processes in (("one", 2, 1), ("two", 1, 2)):
        shared = (f"--run_name={run}", f"--batch_size={size}", f"--num_devices={processes}")
        arguments = list_arguments(scenes, tmp_path, *flags, *shared)
        command = [sys.executable, "-m", "recipes.builtin_weights.train", name, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)

    one, two = (load_last(tmp_path / run) for run in ("one", "two"))
    for part in ("model", "training_head"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-3, atol=1e-5)


def test_an_unknown_task_is_reported_in_one_line():
    command = [sys.executable, "-m", "recipes.builtin_weights.train", "--dataset=d"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "name the task first, one of alone, beside, then the flags of finestsam --mode train"
    ]
