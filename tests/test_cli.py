import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finestsam.cli import main, parse_command_line
from finestsam.config import Config, flatten_config, list_settings
from finestsam.errors import UserError

ROOT = Path(__file__).parents[1]

# DESIGN's list of the settings that finestSAM has.
FINESTSAM_NAMES = {
    "device", "num_devices", "num_nodes", "seed_device", "sav_dir", "out_dir", "model.type", "model.checkpoint",
    "seed_dataloader", "batch_size", "num_workers", "num_epochs", "eval_interval", "prompts.use_boxes",
    "prompts.use_points", "prompts.use_masks", "prompts.use_logits", "multimask_output", "opt.learning_rate",
    "opt.weight_decay", "sched.type", "sched.LambdaLR.decay_factor", "sched.LambdaLR.steps",
    "sched.LambdaLR.warmup_steps", "sched.ReduceLROnPlateau.decay_factor", "sched.ReduceLROnPlateau.epoch_patience",
    "sched.ReduceLROnPlateau.threshold", "sched.ReduceLROnPlateau.cooldown", "sched.ReduceLROnPlateau.min_lr",
    "losses.focal_ratio", "losses.dice_ratio", "losses.iou_ratio", "losses.focal_alpha", "losses.focal_gamma",
    "model_layer.freeze.image_encoder", "model_layer.freeze.prompt_encoder", "model_layer.freeze.mask_decoder",
    "dataset.auto_split", "dataset.seed", "dataset.use_cache", "dataset.sav", "dataset.val_size",
    "dataset.positive_points", "dataset.negative_points", "dataset.use_center", "dataset.snap_to_grid", "opacity",
}  # fmt: skip


def list_problems(*flags: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_command_line(list(flags))
    return str(caught.value).splitlines()


def test_every_setting_of_finestsam_keeps_its_name():
    assert {name for name, _ in list_settings()} >= FINESTSAM_NAMES


def test_the_owners_two_commands_need_nothing_more():
    mode, config = parse_command_line(["--mode", "train", "--dataset", "path"])
    assert (mode, config.dataset.path) == ("train", "path")

    mode, config = parse_command_line(["--mode", "predict", "--input", "a.png", "b.png", "--opacity", "0.4"])
    assert (mode, config.input, config.opacity) == ("predict", ["a.png", "b.png"], 0.4)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size: 3\nsched:\n  LambdaLR:\n    steps: [100, 200]\nnum_epochs: 7\n")

    _, config = parse_command_line(
        ["--mode=train", "--dataset=d", f"--config={tmp_path / 'c.yaml'}", "--num_epochs", "9"]
    )

    assert (config.batch_size, config.num_epochs, config.sched.LambdaLR.steps) == (3, 9, [100, 200])
    assert config.opt.learning_rate == Config().opt.learning_rate


def test_the_small_model_has_defaults_of_its_own(tmp_path, capsys):
    train = ["--mode=train", "--dataset=d", "--model.type=vit_tiny"]
    _, config = parse_command_line(train)
    assert (config.model_layer.freeze.image_encoder, config.opt.learning_rate) == (False, 2e-4)
    assert parse_command_line(train[:2])[1].model_layer.freeze.image_encoder

    _, config = parse_command_line([*train, "--opt.learning_rate=1e-3"])
    assert (config.model_layer.freeze.image_encoder, config.opt.learning_rate) == (False, 1e-3)

    (tmp_path / "c.yaml").write_text("model: {type: vit_tiny}\nmodel_layer: {freeze: {image_encoder: true}}\n")
    _, config = parse_command_line([*train[:2], f"--config={tmp_path / 'c.yaml'}"])
    assert (config.model_layer.freeze.image_encoder, config.opt.learning_rate) == (True, 2e-4)

    with pytest.raises(SystemExit):
        parse_command_line([*train, "--print_config"])
    assert "learning_rate: 0.0002" in capsys.readouterr().out


@pytest.mark.parametrize("adapted", ["lora.rank=4", "thaw.blocks=2"])
def test_the_small_models_encoder_is_frozen_where_parts_of_it_adapt(adapted):
    _, config = parse_command_line(["--mode=train", "--dataset=d", "--model.type=vit_tiny", f"--model_layer.{adapted}"])

    assert config.model_layer.freeze.image_encoder
    assert config.opt.learning_rate == 2e-4


def test_partial_labels_change_what_follows_from_them_and_nothing_that_is_given(tmp_path):
    def read(*flags: str) -> tuple[int, str]:
        _, config = parse_command_line(["--mode=train", "--dataset=d", *flags])
        return config.dataset.background_points, config.evaluate.goal

    assert read() == read("--dataset.labels=complete") == (32, "f1")
    assert read("--dataset.labels=partial") == (0, "recall")
    assert read("--dataset.labels=partial", "--dataset.background_points=8") == (8, "recall")
    (tmp_path / "c.yaml").write_text("dataset: {labels: partial}\nevaluate: {goal: f1}\n")
    assert read(f"--config={tmp_path / 'c.yaml'}") == (0, "f1")


def test_defaults_are_those_of_the_type_that_the_named_weights_have(tmp_path):
    (tmp_path / "best.json").write_text(
        json.dumps({"model_type": "vit_tiny", "image_size": 512, "multimask_output": True, "categories": []})
    )
    for weights in (tmp_path, tmp_path / "best.pth"):
        _, config = parse_command_line(["--mode=train", "--dataset=d", f"--model.checkpoint={weights}"])
        assert (config.model.type, config.opt.learning_rate, config.losses.resolution) == ("auto", 2e-4, "low")


def test_a_file_may_say_what_flags_say(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("dataset: plans\nrun_name: 7\nresume: null\nnum_devices: [0, 1]\nopt: {learning_rate: 1e-3}\n")
    _, config = parse_command_line(["--mode=train", f"--config={path}"])
    assert (config.dataset.path, config.run_name, config.resume, config.num_devices) == ("plans", "7", None, [0, 1])
    assert config.opt.learning_rate == 1e-3

    path.write_text("mode: predict\ninput: an image.png\n")
    mode, config = parse_command_line(["--config", str(path)])
    assert (mode, config.input) == ("predict", ["an image.png"])


@pytest.mark.parametrize("source", ["flag", "file"])
def test_a_run_is_resumed_with_a_file_of_settings_too(tmp_path, source):
    run = tmp_path / "sav" / "r1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("batch_size: 3\n")
    path = tmp_path / "c.yaml"
    path.write_text(f"sav_dir: {tmp_path / 'sav'}\nbatch_size: 5\n" + ("resume: auto\n" if source == "file" else ""))
    flags = ["--resume", "r1"] if source == "flag" else []

    _, config = parse_command_line(["--mode=train", "--dataset=d", "--config", str(path), *flags])

    assert (Path(config.resume), config.batch_size) == (run, 5)
    if source == "flag":
        assert list_problems("--mode=train", "--dataset=d", "--config", str(path), "--resume", "r2") == [
            f"--resume r2: no such folder, here or in {tmp_path / 'sav'}"
        ]


def test_every_problem_of_a_command_line_is_reported_at_once():
    problems = list_problems(
        "--mode", "train", "--datset", "x", "--batch_size", "0", "--opt.learning_rate", "abc", "--learning_rate", "3"
    )  # fmt: skip

    assert problems == [
        "unknown flag --datset; did you mean --dataset?",
        "opt.learning_rate must be a number, got abc",
        "unknown flag --learning_rate; did you mean --opt.learning_rate?",
        "batch_size must lie in [1, inf), got 0",
        "--mode train needs --dataset FOLDER",
    ]


def test_every_problem_of_a_file_is_reported_with_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("batchsize: 3\nopt:\n  learning_rate: fast\ndataset:\n  val_size: 2\n")

    assert list_problems("--mode=train", "--dataset=d", "--config", str(path)) == [
        f"{path}: unknown setting batchsize; did you mean batch_size?",
        f"{path}: opt.learning_rate must be a number, got fast",
        "dataset.val_size must lie in [0, 1), got 2.0",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "not YAML"), ("- 1\n- 2", "expected names and values"), ("a: !!python/object:os.system {}", "not YAML")],
)
def test_a_file_that_is_no_settings_file_is_refused(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_text(content)

    assert any(message in problem for problem in list_problems("--mode=train", "--dataset=d", f"--config={path}"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "fly"], "mode must be one of train, predict, evaluate, check, convert, export, got fly"),
        ([], "--mode is missing"),
        (["--mode", "predict"], "--mode predict needs --input"),
        (["--mode", "evaluate"], "--mode evaluate needs --dataset"),
        (["--mode=predict", "--input=a", "--opacity=1.5"], "opacity must lie in [0, 1], got 1.5"),
        (
            ["--mode=train", "--dataset=d", "--prompts.use_points=false", "--prompts.use_boxes=false"],
            "no prompts: turn on",
        ),
        (
            [
                "--mode=train",
                "--dataset=d",
                "--prompts.use_points=false",
                "--prompts.use_boxes=true",
                "--dataset.prompts_per_object=2",
            ],
            "dataset.prompts_per_object above 1 needs prompts.use_points",
        ),
        (["--mode=train", "--dataset=d", "--model_layer.freeze.mask_decoder=true"], "nothing trains"),
        (["--mode=train", "--dataset=d", "--sched.LambdaLR.steps=[200,100]"], "must rise"),
        (["--mode=train", "--dataset=d", "--sched.LambdaLR.steps=[0.5,100]"], "or be shares below 1"),
        (["--mode=train", "--dataset=d", "--sched.LambdaLR.steps=[0,100]"], "must lie in (0, inf)"),
        (["--mode=train", "--dataset=d", "--model.type=vit_x"], "model.type must be one of auto, vit_h"),
        (
            ["--mode=train", "--dataset=d", "--losses.focal_ratio=0", "--losses.dice_ratio=0", "--losses.iou_ratio=0"],
            "nothing is learnt",
        ),
        (["--mode=train", "--resume=nowhere"], "--resume nowhere: no such folder"),
    ],
)
def test_settings_that_cannot_work_are_named(flags, message):
    assert any(message in problem for problem in list_problems(*flags))


def test_the_newest_run_is_continued_though_it_was_stopped_before_its_first_checkpoint(tmp_path):
    def make(name: str, file: str, seconds: int) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text("dataset:\n  path: d\n")
        os.utime(tmp_path / name / file, (seconds, seconds))

    def find() -> str | None:
        return parse_command_line(["--mode=train", "--resume", f"--sav_dir={tmp_path}"])[1].resume

    assert list_problems("--mode=train", "--resume=auto", f"--sav_dir={tmp_path}") == [
        f"--resume auto: no run in {tmp_path}"
    ]
    for name, seconds in (("a", 100), ("b", 200)):
        make(name, "config.yaml", seconds)
        make(name, "last.ckpt", seconds + 50)
    make("no_run", "best.pth", 900)
    assert find() == str(tmp_path / "b")
    make("a", "last.ckpt", 300)
    assert find() == str(tmp_path / "a")
    make("c", "config.yaml", 400)  # killed before its first checkpoint
    assert find() == str(tmp_path / "c")
    make("b", "last.prev.ckpt", 500)  # killed between two renames
    assert find() == str(tmp_path / "b")


def test_a_mistake_prints_lines_and_exits_with_2(capsys):
    assert main(["--mode", "train"]) == 2
    assert capsys.readouterr().err == "finestsam: --mode train needs --dataset FOLDER\n"


def test_a_flag_without_a_value_turns_a_switch_on():
    _, config = parse_command_line(
        ["--mode=train", "--dataset=d", "--prompts.use_boxes", "--evaluate.search", "--strict"]
    )
    assert config.evaluate.search is True

    assert config.prompts.use_boxes
    assert config.strict


def test_the_printed_settings_are_the_settings(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--mode=train", "--dataset=d", "--batch_size=5", "--print_config"])

    assert caught.value.code in (0, None)
    printed = flatten_config(yaml.safe_load(capsys.readouterr().out))
    assert printed["batch_size"] == 5
    assert {name for name, _ in list_settings()} <= set(printed)


@pytest.mark.parametrize(
    "flags",
    [
        ["--help"],
        ["--mode", "train", "--help"],
        ["--mode", "train", "--bach_size", "3"],
        ["--mode", "train", "--batch_size", "0"],
    ],
)
def test_help_and_mistakes_are_printed_without_slow_imports(flags):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finestsam", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert result.returncode == (0 if "--help" in flags else 2)
    assert "Traceback" not in result.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert "finestsam.cli" in imported
    assert not imported & {"torch", "lightning", "numpy", "cv2", "matplotlib", "PIL", "pycocotools"}


def test_a_download_alone_fetches_and_checks():
    mode, config = parse_command_line(["--dataset=coco", "--download=coco-val2017"])

    assert (mode, config.dataset.path, config.dataset.download) == ("check", "coco", "coco-val2017")
    assert parse_command_line(["--mode=train", "--dataset=coco", "--download=coco-val2017"])[0] == "train"


PAIRS = zip("abcdefgh", "bcdefghi", strict=True)
LAUGHS = "{a: &a [1,1,1,1,1,1,1,1,1]" + "".join(f", {n}: &{n} [{','.join(['*' + m] * 9)}]" for m, n in PAIRS) + "}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", LAUGHS), ("sched.LambdaLR.steps", LAUGHS), ("strict", "&a [*a]"), ("batch_size", "[" * 300),
        ("opt.learning_rate", "9" * 5000), ("strict", "!!bool maybe"), ("batch_size", "!!timestamp x"),
    ],
)  # fmt: skip
def test_a_value_that_stands_for_too_much_is_one_short_line(tmp_path, name, value):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({name: value}))

    for flag in (f"--{name}={value}", f"--config={path}"):
        with pytest.raises(UserError, match=f"{name} must be") as caught:
            parse_command_line(["--mode=check", "--dataset=d", flag])
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a: {LAUGHS}", "more than 100,000 values"),
        ("model: &a {x: *a}", "a value that contains itself"),
        ("strict: !!bool maybe", "a value does not fit its tag"),
        ("num_epochs: " + "9" * 5000, "a number of 5000 digits"),
    ],
)
def test_a_settings_file_that_stands_for_too_much_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)

    with pytest.raises(UserError, match=f"c.yaml: .*{message}"):
        parse_command_line(["--mode=check", "--dataset=d", f"--config={path}"])


def test_every_wrong_setting_of_a_whole_file_is_reported_and_no_other(tmp_path):
    path = tmp_path / "c.yaml"
    settings = flatten_config(Config()) | {
        "input": None,
        "batch_size": "many",
        "opt.rates.image_encoder": "x",
        "strict": "maybe",
    }
    path.write_text(json.dumps(settings))

    with pytest.raises(UserError) as caught:
        parse_command_line(["--mode=check", f"--config={path}", "--dataset=d"])

    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("strict", "batch_size", "opt.rates.image_encoder"), strict=True):
        assert f"c.yaml: {name} must be" in line


@pytest.mark.parametrize(
    ("flag", "interval"),
    [("--seed_device=4294967296", r"\[0, 4294967295\]"), (f"--num_epochs={10**30}", r"\[1, inf\)")],
)
def test_numbers_beyond_what_generators_and_counters_take_are_refused(flag, interval):
    with pytest.raises(UserError, match=f"must lie in {interval}"):
        parse_command_line(["--mode=train", "--dataset=d", flag])
