"""LoRA weights in a small file of their own, in the layout that Hugging Face's peft loads.

The folder holds two files. `adapter_config.json` names the adapted layers and the file of the base weights.
`adapter_model.safetensors` holds A and B of each layer and the other modules that trained; without safetensors it is
`adapter_model.bin`, a torch file.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn

from finestsam.config import ModelLayerConfig
from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.fft_attention import choose_blocks, mount_fft_attention_
from finestsam.model.lora import NARROW, WIDE, is_lora, list_lora, merge, mount_lora_
from finestsam.runtime.value_types import fits
from finestsam.runtime.whole_files import replacing, write_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
MAX_RANK = 10_000  # wider than any layer of SAM
PREFIX = "base_model.model."  # peft starts every name with it
# LoRA variants that `merge_adapter` does not support.
VARIANTS = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


def find_adapter(folder: Path) -> Path | None:
    """Return the weights file of an adapter folder; None where it is not one."""
    if not (folder / CONFIG_NAME).is_file():
        return None
    return next((folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()), None)


def is_adapter(path: Path) -> bool:
    return path.name in WEIGHTS_NAMES and (path.parent / CONFIG_NAME).is_file()


def write_adapter(folder: Path, sam: Sam, started_from: str) -> Path:
    """Write the LoRA weights of a SAM and the other modules that train.

    Args:
        started_from: the file of the base weights.

    Returns:
        The file with the weights.
    """
    layers = dict(list_lora(sam))
    modules = list_trained_modules(sam, layers)
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": started_from,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout.p,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(layers),
        "modules_to_save": modules or None,
    }
    state = sam.state_dict()
    kept = {
        PREFIX + name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in state.items()
        if is_lora(name) or any(name.startswith(f"{module}.") for module in modules)
    }
    folder.mkdir(exist_ok=True)
    write, name = _choose_writer()
    write_json(folder / CONFIG_NAME, config, indent=2)
    with replacing(folder / name) as partial:
        write(kept, partial)
    for other in set(WEIGHTS_NAMES) - {name}:
        (folder / other).unlink(missing_ok=True)
    return folder / name


def list_trained_modules(sam: Sam, layers: Iterable[str] = ()) -> list[str]:
    """Return the names of the fewest modules that hold all weights that train, without those of LoRA.

    A module is listed where all its weights train, or where it holds a weight that trains itself. A module with a LoRA
    layer inside is never listed.

    Args:
        layers: names of the LoRA layers.
    """
    named = dict(sam.named_modules())
    trained = {name for name, weight in sam.named_parameters() if weight.requires_grad and not is_lora(name)}
    found: list[str] = []
    for name in sorted({name.rpartition(".")[0] for name in trained}):
        if any(name == other or name.startswith(f"{other}.") for other in found):
            continue
        whole = name
        while parent := whole.rpartition(".")[0]:
            inside = [f"{parent}.{inner}" for inner, _ in named[parent].named_parameters()]
            if not all(weight in trained for weight in inside):
                break
            whole = parent
        found.append(whole)
    return [name for name in found if name not in set(layers)]


def _choose_writer() -> tuple[Callable[[dict[str, Tensor], Path], None], str]:
    try:
        from safetensors.torch import save_file
    except ImportError:
        return torch.save, "adapter_model.bin"
    return (lambda tensors, path: save_file(tensors, path, metadata={"format": "pt"})), "adapter_model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of `adapter_config.json` beside an adapter's weights.

    Raises:
        UserError: it is not an adapter, or of a kind that is not supported.
    """
    source = path.parent / CONFIG_NAME
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
        known = config["peft_type"] == "LORA" and fits(config["r"], int) and 0 < config["r"] <= MAX_RANK
        config["lora_alpha"] = float(config["lora_alpha"])
        if not fits(config["lora_alpha"], float) or not fits(config["base_model_name_or_path"], str | None):
            raise ValueError("lora_alpha or base_model_name_or_path")
    except (OSError, *VALUE_ERRORS) as error:
        raise UserError(f"{source}: not the description of an adapter ({error!r:.200})") from None
    others = [name for name in VARIANTS if config.get(name)]
    if not known or others:
        raise UserError(f"{source}: an adapter of a kind that is not known here ({', '.join(others) or 'not LORA'})")
    return config


def merge_adapter(base: Mapping[str, Tensor], additions: Mapping[str, Tensor], scale: float, path: Path) -> dict:
    """Return a plain SAM state dict: `base` with the LoRA weights of the adapter at `path` merged into it.

    Raises:
        UserError: the adapter belongs to other base weights.
    """
    merged = dict(base)
    for name, value in additions.items():
        if name.endswith(WIDE):
            weight = name.removesuffix(WIDE) + "weight"
            narrow = additions.get(name.removesuffix(WIDE) + NARROW)
            parts = (value, narrow, base.get(weight))
            if (
                any(part is None or part.ndim != 2 for part in parts)
                or value.shape[1] != narrow.shape[0]
                or base[weight].shape != (value.shape[0], narrow.shape[1])
            ):
                raise UserError(f"{path}: its layer {weight} does not fit the weights underneath")
            merged[weight] = merge(base[weight].float(), narrow.float(), value.float(), scale)
        elif not name.endswith(NARROW):
            if name not in base or base[name].shape != value.shape:
                raise UserError(f"{path}: its {name} does not fit the weights underneath")
            merged[name] = value
    return merged


def adapt_(sam: Sam, layers: ModelLayerConfig) -> dict[int, nn.Module]:
    """Mount the FFT attention and the LoRA layers that the settings name. What trains is chosen afterwards.

    Returns:
        The attention modules that were replaced, by block: the teachers of their replacements.

    Raises:
        UserError: the settings are for more blocks, or another encoder, than this SAM has.
    """
    depth = len(sam.image_encoder.blocks)
    if layers.thaw.blocks > depth:
        raise UserError(f"model_layer.thaw.blocks: this image encoder has {depth} blocks, got {layers.thaw.blocks}")
    if layers.fft_attention.blocks != "none" and not isinstance(sam.image_encoder, ImageEncoderViT):
        raise UserError(
            "model_layer.fft_attention: MobileSAM's image encoder has no attention of SAM's to replace; it looks at "
            "windows of 7 and 14 tokens, so that its cost already grows no faster than the image"
        )
    replaced = mount_fft_attention_(sam, choose_blocks(sam.image_encoder, layers.fft_attention.blocks))
    mount_lora_(sam, layers.lora, whole_blocks=layers.thaw.blocks)
    return replaced
