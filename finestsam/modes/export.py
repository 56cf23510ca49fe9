"""`--mode export`: write weights in a format that other programs read."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finestsam import __version__
from finestsam.config import HEADS_STAY, Config
from finestsam.errors import UserError, printable
from finestsam.export import hugging_face
from finestsam.export.onnx import DATA_SUFFIX, DECODER, ENCODER, require_packages, write_onnx
from finestsam.export.onnx_check import IMAGE_SIZES, OnnxSam, check_onnx
from finestsam.model.adapter import is_adapter, read_config
from finestsam.model.architectures import ARCHITECTURES, PIXEL_MEAN, PIXEL_STD
from finestsam.model.card import Card, write_card
from finestsam.model.fft_attention import list_blocks
from finestsam.model.load import LoadedModel, load_model
from finestsam.model.lora import plain_state_dict
from finestsam.model.saving import save_weights
from finestsam.prediction.generator import resolve_generator
from finestsam.runtime.download import hash_file
from finestsam.runtime.folders import claim_output_folder, refuse_foreign
from finestsam.runtime.signals import watch_signals
from finestsam.runtime.whole_files import replacing_set, write_json

DESCRIPTION = "export.json"
PLAIN, CARD = "sam.pth", "sam.json"


@dataclass(frozen=True)
class Format:
    """A format of exported weights."""

    names: tuple[str, ...]  # of all possible files; the last one is moved into place last
    require: Callable[[], None]  # raises where a package is missing
    write: Callable[[LoadedModel, Config, Path], str]  # into a folder; returns a message to print
    without_fft_attention: str  # why the format has no FFT attention, for the message


def export(config: Config) -> int:
    """Run the mode and return the exit code, 0.

    Raises:
        UserError: the model has no such form, a package is missing, the files do not give what the model gives, or they
            cannot be written.
    """
    form = FORMATS[config.export.format]
    form.require()
    out_dir = claim_output_folder(Path(config.out_dir), config.dataset.path)
    # Exported files are float32, so the model is checked in float32 on the CPU.
    plain = dataclasses.replace(config, device="cpu", precision="32-true")
    loaded = load_model(plain, prefer_runs=True)
    print(f"model: {loaded.model_type}, {printable(loaded.source)}")
    _refuse(loaded, form, config, out_dir)
    try:
        # A signal stops the run at once while files are written, and waits while they are moved into place.
        with watch_signals() as interruption, interruption.held(), replacing_set(out_dir, form.names) as folder:
            with interruption.released():
                done = form.write(loaded, config, folder)
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"out_dir {printable(out_dir)}: cannot be written: {error.strerror or error}") from None
    for name in form.names:
        if name in sizes:
            print(f"{printable(out_dir / name)}: {sizes[name] / 1e6:.3g} MB")
    print(done)
    return 0


def _refuse(loaded: LoadedModel, form: Format, config: Config, out_dir: Path) -> None:
    """Raise where this model cannot be exported, or not there."""
    if loaded.model.heads:
        raise UserError(f"{printable(loaded.source)} were trained for --task {loaded.card.task}: {HEADS_STAY}")
    source, setting = printable(loaded.source), f"export.format {config.export.format}"
    if blocks := list_blocks(loaded.model.sam.state_dict()):
        raise UserError(f"{setting}: {form.without_fft_attention}, which is in blocks {blocks} of {source}")
    if form is FORMATS["huggingface"] and ARCHITECTURES[loaded.model_type].is_tiny_vit:
        raise UserError(
            f"{setting}: transformers' SamModel has no TinyViT, which is {loaded.model_type}'s image encoder"
        )
    for path in _list_sources(loaded):
        for name in form.names:
            if (out_dir / name).exists() and (out_dir / name).samefile(path):
                raise UserError(
                    f"{printable(path)} is what is exported and would be overwritten; choose another --out_dir"
                )
    refuse_foreign(out_dir, form.names)


def _list_sources(loaded: LoadedModel) -> list[Path]:
    """Return the files that the weights came from: one, or an adapter and its base weights."""
    if loaded.path is None:
        return []
    paths = [loaded.path, loaded.path.with_suffix(".json")]
    if is_adapter(loaded.path):
        paths.append(Path(read_config(loaded.path)["base_model_name_or_path"]))
    return [path for path in paths if path.exists()]


def _write_onnx(loaded: LoadedModel, config: Config, folder: Path) -> str:
    print("translating and checking against torch, which takes minutes for the large models")
    write_onnx(loaded.model, folder)
    exported = OnnxSam(folder)
    found = check_onnx(exported, loaded.model)
    description = _describe(loaded, config) | {
        "largest_difference": found.difference,
        "smallest_iou": found.iou,
        "files": exported.describe(),
    }
    write_json(folder / DESCRIPTION, description, indent=2)
    return (
        f"checked on {len(IMAGE_SIZES)} aspect ratios: largest difference {found.difference:.1e}, "
        f"smallest IoU {found.iou:.5f}"
    )


def _describe(loaded: LoadedModel, config: Config) -> dict[str, Any]:
    """Return what a program needs to know to use the ONNX files."""
    card, model = loaded.card, loaded.model
    generator = dataclasses.asdict(resolve_generator(config.generator, card))
    return {
        "finestsam_version": __version__,
        "model_type": loaded.model_type,
        "weights": loaded.path.name if loaded.path else loaded.source,
        "weights_sha256": hash_file(loaded.path) if loaded.path else None,
        "image_size": model.image_size,  # pixels that the longest side is resized to
        "pixel_mean": PIXEL_MEAN,  # the encoder's file normalises and pads by itself
        "pixel_std": PIXEL_STD,
        "mask_threshold": model.sam.mask_threshold,
        "masks": [1, 2, 3] if model.multimask_output else [0],  # the trained ones of the decoder's four
        "categories": card.categories if card else [],
        "generator": generator,
    }


def _write_hugging_face(loaded: LoadedModel, config: Config, folder: Path) -> str:
    hugging_face.write_hugging_face(loaded.model.sam, loaded.model_type, folder)
    hint = "" if loaded.model.multimask_output else "; use these weights with multimask_output=False"
    return f"loads with transformers' SamModel.from_pretrained and SamProcessor.from_pretrained{hint}"


def _write_sam(loaded: LoadedModel, config: Config, folder: Path) -> str:
    model = loaded.model
    save_weights(folder / PLAIN, plain_state_dict(model.sam))
    card = loaded.card or Card(
        model_type=loaded.model_type,
        image_size=model.image_size,
        multimask_output=model.multimask_output,
        categories=[],
        started_from=loaded.source,
        started_from_sha256=hash_file(loaded.path) if loaded.path else None,
    )
    # Without the heads, their task does not belong in the card.
    card = dataclasses.replace(
        card, image_size=model.image_size, task="masks", classes=[], category_ids=[], finestsam_version=__version__
    )
    write_card(folder / PLAIN, card)
    return f"loads in {_name_reader(loaded)}"


def _name_reader(loaded: LoadedModel) -> str:
    if ARCHITECTURES[loaded.model_type].is_tiny_vit:
        return f"MobileSAM's sam_model_registry[{loaded.model_type!r}]"
    if loaded.model_type in ("vit_b", "vit_l", "vit_h") and loaded.model.image_size == 1024:
        return f"segment_anything's sam_model_registry[{loaded.model_type!r}]"
    return f"segment_anything's modules, built as a {loaded.model_type} of {loaded.model.image_size} pixels"


FORMATS = {
    "onnx": Format(
        (ENCODER + DATA_SUFFIX, DECODER + DATA_SUFFIX, ENCODER, DECODER, DESCRIPTION),
        require_packages,
        _write_onnx,
        "torch's exporter does not translate the Fourier transforms of FFT attention",
    ),
    "huggingface": Format(
        (hugging_face.WEIGHTS, hugging_face.IMAGES, hugging_face.CONFIG),
        hugging_face.require_safetensors,
        _write_hugging_face,
        "transformers' SamModel has no FFT attention",
    ),
    "sam": Format((PLAIN, CARD), lambda: None, _write_sam, "segment_anything has no FFT attention"),
}
