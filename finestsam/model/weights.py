"""Weights on disk: where published ones are, how a file becomes a state dict, and which SAM a state dict belongs to."""

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finestsam.config import IMAGE_SIZE_RANGE, IMAGE_SIZES, PATCH_SIZE
from finestsam.errors import VALUE_ERRORS, UserError
from finestsam.model.adapter import is_adapter, merge_adapter, read_config
from finestsam.model.architectures import ARCHITECTURES
from finestsam.model.card import Card, read_card
from finestsam.model.saving import is_damaged, list_packed
from finestsam.runtime.download import download
from finestsam.runtime.folders import cache_folder


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that training can start from: Meta's, published with Segment Anything, and MobileSAM's."""

    url: str
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        return self.url.rpartition("/")[2]


PUBLISHED_WEIGHTS = {
    "vit_b": PublishedFile(
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        375_042_383,
    ),
    "vit_l": PublishedFile(
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        1_249_524_607,
    ),
    "vit_h": PublishedFile(
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        2_564_550_879,
    ),
    "vit_t": PublishedFile(
        "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/"
        "mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        40_728_226,
    ),
}
# Come with the package, with their card beside them; recipes/builtin_weights/make.py makes them.
BUILTIN_WEIGHTS = {"vit_tiny": Path(__file__).parents[1] / "builtin" / "vit_tiny.pth"}
WITHOUT_DOWNLOAD = "--model.type vit_tiny takes the small weights that come with finestsam instead"

WRAPPERS = ("model", "state_dict")  # keys of a training checkpoint that hold the weights
PREFIXES = ("module.", "model.", "sam.", "base_model.model.")  # from DDP, Lightning modules, FinestSam, peft
FAMILIES = {  # part of a key: the software that writes it
    "mask_decoder.hf_": "HQ-SAM",
    "image_encoder.trunk.": "SAM 2",
    "sam_mask_decoder.": "SAM 2",
    "vision_encoder.": "a Hugging Face SamModel",
}
MAX_UNPACKED = 4  # most bytes of tensors per byte of the file; weights may be listed under two names
MAX_ADAPTERS = 20  # stacked on each other
TINY_VIT_PARTS = ("image_encoder.layers.", "image_encoder.patch_embed.seq.")
TINY_VIT_NECK = "image_encoder.neck.0.weight"


def find_published_weights(model_type: str, download: bool = True) -> Path:
    """Return the published file of a type: from the cache folder, the current folder or its sav/, else downloaded."""
    if model_type not in PUBLISHED_WEIGHTS:
        raise UserError(
            f"nobody has published weights for {model_type}; --model.checkpoint none starts from random ones"
        )
    published = PUBLISHED_WEIGHTS[model_type]
    folders = (cache_folder(), Path(), Path("sav"))
    for folder in folders:
        if (folder / published.file_name).is_file():
            return folder / published.file_name
    if download:
        return _download_published(published)
    raise UserError(
        f"{published.file_name} is not in {', '.join(map(str, folders))}; to fetch it by hand, save {published.url} as "
        f"{folders[0] / published.file_name} (sha256 {published.sha256}); {WITHOUT_DOWNLOAD}"
    )


def _download_published(published: PublishedFile) -> Path:
    try:
        return download(published.url, cache_folder() / published.file_name, published.sha256, published.size_bytes)
    except UserError as error:
        raise UserError(f"{error}; {WITHOUT_DOWNLOAD}") from None


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint as names and CPU tensors in SAM's own naming, without running any code that it contains.

    The tensors of a .pth are mapped from the file: copy them into a model before the file is replaced. An adapter is
    merged into the weights that it names.
    """
    return _load_layers(path, ())


def _load_layers(path: Path, above: tuple[Path, ...]) -> dict[str, Tensor]:
    """Read a checkpoint, or an adapter merged into its base weights.

    Args:
        above: the adapters that are based on this file.
    """
    if not is_adapter(path):
        return _load_file(path)
    above += (path.resolve(),)
    config = read_config(path)
    base = Path(config["base_model_name_or_path"] or "")
    if not os.path.isfile(base):
        raise UserError(
            f"{path} is an adapter for {base}, which is not there; put that file back, or use best.pth, which needs it "
            "no more"
        )
    if os.path.realpath(base) in map(str, above):
        raise UserError(f"{path} is an adapter that lies beneath itself, by {base}; use best.pth, which needs neither")
    if len(above) > MAX_ADAPTERS:
        raise UserError(f"{path} is an adapter beneath {MAX_ADAPTERS} others; use best.pth, which needs none of them")
    below, card = _load_layers(base, above), read_card(path)
    if card and card.image_size != image_size_of(below, card):
        below = resize_positions(below, card.image_size)
    return merge_adapter(below, _load_file(path), config["lora_alpha"] / config["r"], path)


def _load_file(path: Path) -> dict[str, Tensor]:
    _check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping) and (wrapper := _find_wrapper(content)):
        content = content[wrapper]
    _check_content(path, content)
    return _strip_prefixes({name: tensor.detach() for name, tensor in content.items()})


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected a checkpoint file such as {path / 'best.pth'}")
        if path.exists() and not path.is_file():  # reading a pipe would hang
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give one, auto for Meta's weights, or none for random ones") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not start:
        raise UserError(f"{path}: is empty, 0 bytes{_expected_size(path)}; download it again")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(
            f"{path}: is a web page, not a checkpoint; download the file itself, not the page that shows it"
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the checkpoint itself; fetch it with git lfs pull")
    if start.startswith(b"PK"):
        _check_zip(path)


def _check_zip(path: Path) -> None:
    """Raise unless a zip file is complete, uncompressed and undamaged, as torch writes it."""
    if not _is_zip(path):
        raise UserError(_describe_truncated(path))
    _refuse_packed(path)
    try:
        with zipfile.ZipFile(path) as archive:
            packed = list_packed(archive)
    except (zipfile.BadZipFile, NotImplementedError, *VALUE_ERRORS):
        raise UserError(f"{path}: is damaged, its table of contents is broken; download or copy it again") from None
    if packed:
        raise UserError(
            f"{path}: its tensors are packed, which torch.save does not do; unpack it, and zip it again without "
            "compression (zip -0)"
        )
    if is_damaged(path):
        raise UserError(f"{path}: is damaged, its checksums are wrong{_expected_size(path)}; download or copy it again")


def _refuse_packed(path: Path) -> None:
    """Raise for a zip file that unpacks to far more than its own size; torch compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_UNPACKED * path.stat().st_size:
        raise UserError(
            f"{path}: its {path.stat().st_size:,} bytes unpack to {unpacked:,}; save it again with torch.save"
        )


def _is_zip(path: Path) -> bool:
    """Whether this is a whole zip file, as torch writes them: the table of contents stands at the end."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path):  # its table of contents is read to the end
                return True
    except (zipfile.BadZipFile, RuntimeError, EOFError, struct.error, *VALUE_ERRORS):
        pass
    return False


def _describe_truncated(path: Path) -> str:
    return f"{path}: is truncated at {path.stat().st_size:,} bytes{_expected_size(path)}; download or copy it again"


def _expected_size(path: Path) -> str:
    sizes = {published.file_name: published.size_bytes for published in PUBLISHED_WEIGHTS.values()}
    return f", expected {sizes[path.name]:,}" if path.name in sizes else ""


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and TorchScript; our message has one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except MemoryError:
        raise UserError(f"{path}: stands for more than there is memory for") from None
    except Exception as error:  # a damaged file can raise anything
        # Without torch's own text: it recommends weights_only=False, which runs the code.
        raise UserError(_describe_unreadable(path, error)) from None


def _describe_unreadable(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        is_pickle = file.read(2).startswith((b"PK", b"\x80"))
    if is_pickle and isinstance(error, pickle.UnpicklingError):
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        code = f" (it calls {needs[1]})" if needs else ""
        return f"{path}: file contains code, refused{code}; save model.state_dict() alone and give that file"
    if isinstance(error, EOFError) or "unexpected EOF" in str(error):
        return _describe_truncated(path)
    return f"{path}: is not a checkpoint that torch can read: damaged, or another kind of file"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: to read this kind of file, first run: pip install safetensors") from None
    try:
        return load_file(path, device="cpu")
    except MemoryError:
        raise UserError(f"{path}: stands for more than there is memory for") from None
    except (SafetensorError, OSError, RuntimeError, *VALUE_ERRORS) as error:
        raise UserError(f"{path}: is truncated or not a safetensors file: {' '.join(str(error).split())}") from None


def _find_wrapper(content: Mapping) -> str | None:
    return next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)


def _check_content(path: Path, content: Any) -> None:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: is not a state dict but a {type(content).__name__}; save model.state_dict()")
    if not content:
        raise UserError(f"{path}: is a state dict without any weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: is not a state dict: {name!r:.100} is a {type(value).__name__}, expected a tensor"
            )
        if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise UserError(
                f"{path}: {name!r:.100} is not a plain tensor of numbers; save model.state_dict() in float32"
            )
    refuse_inflated(path, content.values())


def refuse_inflated(path: Path, tensors: Iterable[Tensor]) -> None:
    """Raise for tensors with far more bytes than the file: they repeat the same numbers."""
    stated, held = sum(value.numel() * value.element_size() for value in tensors), path.stat().st_size
    if stated > MAX_UNPACKED * held:
        raise UserError(f"{path}: its weights stand for {stated:,} bytes, the file has {held:,}; save it again")


def _strip_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state_dict):
            return _strip_prefixes({name.removeprefix(prefix): tensor for name, tensor in state_dict.items()})
    return state_dict


def check_matches(state_dict: dict[str, Tensor], model_type: str, path: Path) -> None:
    """Raise unless the state dict, which came from `path`, is a SAM of this type."""
    actual = identify(state_dict, path)
    if actual != model_type:
        raise UserError(
            f"{path} is {actual}, the settings say {model_type}; use --model.type {actual} (or auto), or other weights"
        )


def identify(state_dict: dict[str, Tensor], path: Path | str = "the file") -> str:
    """Return the key of `ARCHITECTURES` that these weights belong to, by their shapes.

    Args:
        path: where they came from, for the message.
    """
    for part, family in FAMILIES.items():
        if any(part in name for name in state_dict):
            raise UserError(
                f"{path} is a checkpoint of {family}, expected one in the layout of Meta's segment_anything "
                "or of MobileSAM"
            )
    if any(name.startswith(TINY_VIT_PARTS) for name in state_dict):
        return _identify_tiny_vit(state_dict, path)
    position = state_dict.get("image_encoder.pos_embed")
    patches = state_dict.get("image_encoder.patch_embed.proj.weight")
    if position is None or patches is None or position.ndim != 4 or patches.ndim != 4:
        raise UserError(f"{path} is not a SAM checkpoint (first keys: {', '.join(list(state_dict)[:3]):.200})")
    _check_positions(position, patches, path)
    width = position.shape[-1]
    depth = len({name.split(".")[2] for name in state_dict if name.startswith("image_encoder.blocks.")})
    for model_type, architecture in ARCHITECTURES.items():
        if (architecture.width, architecture.depth, architecture.is_tiny_vit) == (width, depth, False):
            return model_type
    known = ", ".join(
        f"{name} {entry.width} and {entry.depth}" for name, entry in ARCHITECTURES.items() if not entry.is_tiny_vit
    )
    raise UserError(f"{path} is a SAM of unknown size: width {width} and {depth} blocks, known are {known}")


def _check_positions(position: Tensor, patches: Tensor, path: Path | str) -> None:
    """Raise unless weights are for square images of a size that a setting may have."""
    rows, columns, side = *position.shape[1:3], patches.shape[-1]
    low, high = IMAGE_SIZE_RANGE
    if side != PATCH_SIZE or rows != columns or not low <= rows * side <= high:
        raise UserError(
            f"{path} is for images of {rows} x {columns} patches of {side} pixels, expected squares of {low} to "
            f"{high} pixels in patches of {PATCH_SIZE}"
        )


def _identify_tiny_vit(state_dict: dict[str, Tensor], path: Path | str) -> str:
    shape = tuple(state_dict[TINY_VIT_NECK].shape[:2]) if TINY_VIT_NECK in state_dict else None
    for model_type, architecture in ARCHITECTURES.items():
        if architecture.is_tiny_vit and shape == (architecture.decoder_width, architecture.width):
            return model_type
    raise UserError(f"{path} has a TinyViT for its image encoder, but another one than MobileSAM's, vit_t")


def resize_positions(state_dict: dict[str, Tensor], image_size: int) -> dict[str, Tensor]:
    """Return the weights for images of another size: their position embeddings are interpolated, the rest stays.

    Absolute position embeddings are resized bicubically, as images are. The relative position tables of global
    attention, one entry for each distance across the image, are resized linearly. Windows keep their size.

    Args:
        image_size: pixels of the longest side, a multiple of the patch.
    """
    model_type = identify(state_dict)
    if ARCHITECTURES[model_type].is_tiny_vit:
        return dict(state_dict)  # it only has positions within windows
    patch_size = state_dict["image_encoder.patch_embed.proj.weight"].shape[-1]
    side = image_size // patch_size
    resized = dict(state_dict)
    positions = state_dict["image_encoder.pos_embed"].permute(0, 3, 1, 2)
    positions = F.interpolate(
        positions.float(), size=(side, side), mode="bicubic", antialias=side < positions.shape[-1]
    )
    resized["image_encoder.pos_embed"] = positions.permute(0, 2, 3, 1).to(positions.dtype)
    for block in ARCHITECTURES[model_type].global_blocks:
        for axis in ("rel_pos_h", "rel_pos_w"):
            name = f"image_encoder.blocks.{block}.attn.{axis}"
            table = state_dict[name].float().T[None]
            resized[name] = F.interpolate(table, size=2 * side - 1, mode="linear")[0].T.to(state_dict[name].dtype)
    return resized


def image_size_of(state_dict: dict[str, Tensor], card: Card | None = None) -> int:
    """Return the side of the square images that these weights are for, pixels.

    Args:
        card: of the weights. MobileSAM's weights do not show their size: without a card it is the published one.
    """
    if "image_encoder.pos_embed" not in state_dict:
        return card.image_size if card else IMAGE_SIZES[identify(state_dict)]
    patch_size = state_dict["image_encoder.patch_embed.proj.weight"].shape[-1]
    return state_dict["image_encoder.pos_embed"].shape[1] * patch_size
