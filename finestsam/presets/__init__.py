"""Settings for a machine or a model: a YAML file each. They are defaults, which everything that is given overrides."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from finestsam.config import PRESETS, flatten_config
from finestsam.runtime.hardware import Hardware
from finestsam.runtime.plain_yaml import read_yaml

# Least memory of the GPU, in GB, from the largest on. A GPU that is sold with 24 GB has 23.6 to 25.8.
LEAST_GIGABYTES = {"gpu_80gb": 70, "gpu_24gb": 22, "colab": 0}
WITHOUT_PRESET = ("vit_tiny_test",)  # types of models


@dataclass(frozen=True)
class Preset:
    """What one file says."""

    name: str
    about: str  # the model and the machine that it is for
    settings: dict[str, Any]  # by dotted name

    def list_settings(self, values: dict[str, Any] | None = None) -> str:
        """Return names and values in one line: all, or those that are among `values`, by dotted name."""
        values = self.settings if values is None else values
        return ", ".join(f"{name} {_show(value)}" for name, value in self.settings.items() if values[name] == value)


@cache
def read_preset(name: str) -> Preset:
    """Return a preset by its name."""
    content = read_yaml(Path(__file__).parent / f"{name}.yaml")
    return Preset(name, content["about"], flatten_config(content["settings"]))


def list_presets() -> list[Preset]:
    return [read_preset(name) for name in PRESETS]


def choose_preset(model_type: str, find_hardware: Callable[[], Hardware]) -> str:
    """Return the name of the preset for a model and a machine, "none" where there is none.

    Args:
        find_hardware: called only where the model alone does not decide, as it may import torch.
    """
    if model_type == "vit_tiny":
        return "laptop"
    if model_type in WITHOUT_PRESET:
        return "none"
    hardware = find_hardware()
    if hardware.kind != "cuda":
        return "none"
    if hardware.count > 1:
        return "multi_gpu"
    return next(name for name, least in LEAST_GIGABYTES.items() if hardware.memory_bytes >= least * 1e9)


def list_preset_defaults(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted name: value} of a preset, without what the settings given leave no place for.

    Args:
        values: every setting's, as given or the general default.
    """
    if name == "none":
        return {}
    adapts = values["model_layer.lora.rank"] > 0 or values["model_layer.thaw.blocks"] > 0
    can_adapt = values["model_layer.freeze.image_encoder"] and values["model_layer.lora.encoder"] != "none"
    left_out = {"model_layer.freeze.image_encoder": adapts, "model_layer.lora.rank": not can_adapt}
    return {setting: value for setting, value in read_preset(name).settings.items() if not left_out.get(setting)}


def describe_preset(name: str, values: dict[str, Any]) -> list[str]:
    """Return what to print of the preset of a run: what it is for, and those of its settings that the run has.

    Args:
        values: every setting's of the run.
    """
    if name in ("none", "auto"):  # settings that no command line has resolved still have `auto`: they have no preset
        return []
    preset = read_preset(name)
    listed = preset.list_settings(values) or "nothing, every setting is given"
    return [f"preset {name}: {preset.about}; --preset none trains without", f"  it sets {listed}"]


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
