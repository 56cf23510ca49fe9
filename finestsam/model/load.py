"""Load the model that the settings name: its weights, image size and device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from finestsam.config import PATCH_SIZE, Config
from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.adapter import find_adapter
from finestsam.model.architectures import ARCHITECTURES, build_sam
from finestsam.model.card import Card, read_card
from finestsam.model.fft_attention import list_blocks, mount_fft_attention_
from finestsam.model.heads import load_class_head, load_semantic_head
from finestsam.model.sam import FinestSam
from finestsam.model.weights import (
    BUILTIN_WEIGHTS,
    PUBLISHED_WEIGHTS,
    check_matches,
    find_published_weights,
    identify,
    image_size_of,
    load_state_dict,
    resize_positions,
)
from finestsam.runtime.cpu import has_feature

RANDOM_WEIGHTS = "random weights"


@dataclass(frozen=True)
class HeadFile:
    """How the head of a task is loaded from the file beside SAM's weights."""

    name: str  # of its attribute of FinestSam
    outputs: str  # the field of the card with the names of its classes
    load: Callable[[Path, Sequence[str], int], nn.Module]  # takes the weights, those names and the embedding's channels


# By task; the others have no head.
HEADS = {
    "classes": HeadFile("class_head", "categories", load_class_head),
    "semantic": HeadFile("semantic_head", "classes", load_semantic_head),
}


@dataclass
class LoadedModel:
    """A model in evaluation mode, and what is known about it."""

    model: FinestSam
    model_type: str
    card: Card | None  # None: the weights have no best.json beside them
    source: str  # to print: the weights' path, or "random weights"
    path: Path | None  # None: random weights
    # Attention modules that FFT attention replaced before training, by block: their teachers in distillation.
    replaced: dict[int, nn.Module] = field(default_factory=dict)


def load_model(config: Config, prefer_runs: bool = False, device: torch.device | None = None) -> LoadedModel:
    """Build the model that the settings name.

    Args:
        prefer_runs: where no checkpoint is named, take the best weights of the newest run in sav_dir; and take
            multimask_output from best.json, not from the settings.
        device: of the model; None: as the settings say.

    Raises:
        UserError: the weights are missing, broken, or of another type or size than the settings want.
    """
    device = device or choose_device(config.device)
    path = find_weights(config, prefer_runs)
    card = read_card(path) if path else None
    sam, model_type = _build_with_weights(config, path, card)
    multimask_output = card.multimask_output if card and prefer_runs else config.multimask_output
    model = FinestSam(sam, multimask_output, choose_encoder_dtype(config.precision, device))
    if prefer_runs and config.task != "masks":
        _load_head_(model, config, path, card)
    return LoadedModel(model.to(device).eval(), model_type, card, str(path or RANDOM_WEIGHTS), path)


def _build_with_weights(config: Config, path: Path | None, card: Card | None) -> tuple[Sam, str]:
    wanted_type, wanted_size = config.model.type, config.model.image_size
    if path is None:
        model_type = "vit_b" if wanted_type == "auto" else wanted_type
        _check_size(wanted_size)
        return build_sam(model_type, wanted_size), model_type
    state_dict = load_state_dict(path)
    model_type = identify(state_dict, path)
    if wanted_type != "auto":
        check_matches(state_dict, wanted_type, path)
    own_size = image_size_of(state_dict, card)
    size = wanted_size or own_size
    if size != own_size:
        _check_size(size)
    sam = build_sam(model_type, size)
    try:
        load_weights_(sam, state_dict if size == own_size else resize_positions(state_dict, size))
    except (RuntimeError, *VALUE_ERRORS) as error:
        reason = (str(error).splitlines()[1:] or [repr(error)])[0].strip()
        raise UserError(f"{path}: not the weights of a {model_type}: {reason:.300}") from None
    return sam, model_type


def load_weights_(sam: Sam, state_dict: dict[str, Tensor]) -> None:
    """Load weights, in place, with the attention that they were trained with."""
    mount_fft_attention_(sam, list_blocks(state_dict))
    sam.load_state_dict(state_dict)


def _load_head_(model: FinestSam, config: Config, path: Path | None, card: Card | None) -> None:
    """Give a model the head that its weights were trained with."""
    trained = "masks" if card is None else card.task
    if config.task not in ("auto", trained):
        raise UserError(
            f"task {config.task}: {path or RANDOM_WEIGHTS} were not trained for it; --mode train --task {config.task}"
        )
    if head := HEADS.get(trained):
        outputs = getattr(card, head.outputs)
        setattr(model, head.name, head.load(path, outputs, model.sam.prompt_encoder.embed_dim))


def _check_size(size: int | None) -> None:
    if size is not None and size % PATCH_SIZE:
        raise UserError(f"model.image_size must be a multiple of {PATCH_SIZE}, got {size}")


def find_weights(config: Config, prefer_runs: bool = False) -> Path | None:
    """Return the weights file that the settings name, downloaded where needed; None for random weights."""
    name = config.model.checkpoint
    if name == "none":
        return None
    if name != "auto":
        candidates = [Path(name), Path(config.sav_dir) / name]
        path = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
        return (find_adapter(path) or path / "best.pth") if path.is_dir() else path
    newest = _find_newest_run(config) if prefer_runs else None
    if newest:
        return newest
    model_type = "vit_b" if config.model.type == "auto" else config.model.type
    return find_published_weights(model_type) if model_type in PUBLISHED_WEIGHTS else BUILTIN_WEIGHTS.get(model_type)


def find_run_weights(config: Config) -> Path | None:
    """Return the weights file that the settings name if it may be a run's; None for random and published weights."""
    if config.model.checkpoint == "auto":
        return _find_newest_run(config)
    return find_weights(config, prefer_runs=True)


def _find_newest_run(config: Config) -> Path | None:
    paths = sorted(Path(config.sav_dir).glob("*/best.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in paths:
        card = read_card(path)
        if card and card.model_type in ARCHITECTURES and config.model.type in ("auto", card.model_type):
            return path
    return None


def choose_device(name: str) -> torch.device:
    """Return the device for one process.

    Raises:
        UserError: the device is not there. A silent fallback to the CPU would cost the user hours.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, is_there in available.items() if is_there))
    if name == "tpu":
        raise UserError("device tpu: only training passes it on; predict and evaluate on another device")
    kind = ("mps" if available["mps"] else "cuda") if name == "gpu" else name
    if not available[kind]:
        raise UserError(f"device {name}: none found; --device cpu runs without, --device auto takes what is there")
    return torch.device(kind)


def choose_encoder_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of the image encoder; None: float32."""
    if precision == "auto":
        return torch.bfloat16 if _computes_in_bfloat16(device) else None
    return {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16; elsewhere it is emulated, slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and has_feature("avx512_bf16")
