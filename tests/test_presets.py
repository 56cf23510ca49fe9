import re
from pathlib import Path

import pytest

import finestsam.presets
from finestsam.cli import main, parse_command_line
from finestsam.config import PRESETS, Config, build_config, flatten_config, list_choices, list_settings
from finestsam.presets import choose_preset, describe_preset, list_preset_defaults, list_presets
from finestsam.runtime.hardware import Hardware

FOLDER = Path(finestsam.presets.__file__).parent
TRAIN = ["--mode=train", "--dataset=d", "--device=cpu"]


def read(*flags: str) -> Config:
    return parse_command_line([*TRAIN, *flags])[1]


def find_changed(config: Config) -> dict:
    plain = flatten_config(read("--preset=none"))
    return {name: value for name, value in flatten_config(config).items() if value != plain[name]}


def test_every_file_is_a_choice_of_the_setting():
    choices = list_choices(dict(list_settings())["preset"].type)

    assert choices == ["auto", "none", *PRESETS]
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_is_a_setting_with_a_reason(name):
    (preset,) = [preset for preset in list_presets() if preset.name == name]
    changed = find_changed(read(f"--preset={name}"))

    assert changed == preset.settings | {"preset": name}
    lines = (FOLDER / f"{name}.yaml").read_text().split("settings:\n")[1].splitlines()
    bare = [line for before, line in zip(["", *lines], lines, strict=False) if re.search(r"^ .*: \S", line)
            and not line.strip().startswith("#") and not before.strip().startswith("#")]  # fmt: skip
    assert [line.strip() for line in bare] in ([], ["steps: [0.6, 0.85]", "decay_factor: 4.0"], ["decay_factor: 4.0"])


def test_the_wheel_has_the_presets():
    toml = pytest.importorskip("tomllib")
    settings = toml.loads((FOLDER.parents[1] / "pyproject.toml").read_text())

    assert "presets/*.yaml" in settings["tool"]["setuptools"]["package-data"]["finestsam"]


@pytest.mark.parametrize(
    ("model_type", "hardware", "name"),
    [
        ("vit_tiny", Hardware("cuda", 8), "laptop"),
        ("vit_b", Hardware("cpu"), "none"),
        ("auto", Hardware("mps"), "none"),
        ("vit_tiny_test", Hardware("cuda", 1, 85 * 10**9), "none"),
        ("auto", Hardware("cuda", 1, 16 * 10**9), "colab"),  # T4
        ("vit_t", Hardware("cuda", 1, 6 * 10**9), "colab"),
        ("vit_b", Hardware("cuda", 1, 23_600_000_000), "gpu_24gb"),  # L4
        ("vit_h", Hardware("cuda", 1, 51 * 10**9), "gpu_24gb"),
        ("vit_h", Hardware("cuda", 1, 85 * 10**9), "gpu_80gb"),
        ("vit_b", Hardware("cuda", 2), "multi_gpu"),
    ],
)
def test_model_and_device_choose_the_preset(model_type, hardware, name):
    assert choose_preset(model_type, lambda: hardware) == name


def test_everything_given_overrides_a_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: laptop\nnum_epochs: 5\nlosses: {resolution: input}\n")
    config = read(f"--config={tmp_path / 'c.yaml'}", "--opt.learning_rate=3e-4", "--losses.resolution=original")

    assert (config.preset, config.num_epochs, config.opt.learning_rate) == ("laptop", 5, 3e-4)
    assert (config.losses.resolution, config.dataset.max_objects) == ("original", 16)
    # The general default is a value like any other where it is given.
    assert read("--preset=laptop", "--eval_interval=1").eval_interval == 1


def test_none_leaves_all_defaults_as_they_are():
    assert find_changed(read("--preset=none", "--model.type=vit_tiny")) == {"model.type": "vit_tiny"}
    assert find_changed(read("--model.type=vit_tiny")).keys() == {"model.type", "preset", *list_preset_defaults(
        "laptop", flatten_config(Config()))}  # fmt: skip


@pytest.mark.parametrize("given", ["freeze.image_encoder=false", "lora.encoder=none", "lora.rank=0"])
def test_a_preset_adapts_no_encoder_that_is_to_train_otherwise(given):
    assert read("--preset=gpu_24gb").model_layer.lora.rank == 8
    assert read("--preset=gpu_24gb", f"--model_layer.{given}").model_layer.lora.rank == 0


def test_other_modes_than_training_have_no_preset():
    _, config = parse_command_line(["--mode=evaluate", "--dataset=d", "--model.type=vit_tiny", "--preset=laptop"])

    assert config.preset == "none" and config.num_epochs == Config().num_epochs


def test_a_run_that_is_continued_keeps_its_own_settings(tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.yaml"
    path.write_text("model: {type: vit_tiny}\ndataset: {path: d}\nnum_epochs: 7\n")

    config = parse_command_line(["--mode=train", f"--resume={path.parent}"])[1]
    assert (config.preset, config.num_epochs) == ("none", 7)
    assert config.opt.learning_rate == Config().opt.learning_rate  # a whole file names every setting


def test_a_model_that_decides_waits_for_no_device():
    def refuse() -> Hardware:
        raise AssertionError("torch is imported here")

    assert choose_preset("vit_tiny", refuse) == "laptop"


def test_help_lists_the_presets_with_what_they_set(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])

    text = " ".join(capsys.readouterr().out.split())
    for preset in list_presets():
        assert f"{preset.name}: {preset.about}; {preset.list_settings()}" in text


def test_what_is_printed_of_a_preset_is_what_holds():
    values = flatten_config(build_config({"model_layer.lora.rank": 8, "batch_size": 2, "num_workers": 4}))

    assert describe_preset("gpu_80gb", values) == [
        "preset gpu_80gb: Meta's weights on a GPU of at least 70 GB; --preset none trains without",
        "  it sets model_layer.lora.rank 8, num_workers 4",
    ]
    assert describe_preset("none", values) == []


def test_a_run_names_its_preset_at_the_start_and_in_its_settings(scenes, tmp_path, capsys):
    flags = [
        "--preset=laptop", "--model.type=vit_tiny_test", "--model.checkpoint=none", "--max_steps=1",
        "--evaluate.generator=false", "--num_workers=0", f"--sav_dir={tmp_path}", "--run_name=run",
    ]  # fmt: skip

    assert main(["--mode=train", f"--dataset={scenes}", *flags]) == 0

    out = capsys.readouterr().out
    assert "preset laptop: vit_tiny, which trains on two cores of a CPU; --preset none trains without" in out
    assert "  it sets model_layer.freeze.image_encoder false, opt.learning_rate 0.0002, num_epochs 12" in out
    assert "\npreset: laptop\n" in (tmp_path / "run" / "config.yaml").read_text()

    assert main(["--mode=train", f"--resume={tmp_path / 'run'}", "--max_steps=2"]) == 0
    assert "preset laptop" not in capsys.readouterr().out
