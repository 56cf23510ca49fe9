"""Randomly broken versions of a file, as a faulty tool, a bad disk or an attacker could leave them."""

import copy
import io
import json
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

HOSTILE = [
    None, True, -1, 0, 1.5, 1e12, -1e300, 2**31, 2**63, 10**40, float("nan"), float("inf"), "", "x", "1",
    "../../etc/passwd", "a\x00b", "\ud800", [], [[]], [[[]]], {}, {"size": [100_000, 100_000], "counts": "0"},
    {"counts": [-1]},
    {"size": [96, 96], "counts": [9216, 1]}, {"size": [96, 96], "counts": "\x7f\x7f"}, [[1, 1]], [[float("nan")] * 6],
    [[0, 0, 1e9, 0, 1e9, 1e9]], [1, 2, 3, 4, 5, 6], "9" * 400,
]  # fmt: skip
SPLICES = [b"", b"\x00" * 16, b"\xff" * 16, b"[" * 5000, b"{" * 50, b'"', b"<html>", b"\xff\xd8\xff\xe0", b"NaN"]


def mutate_annotations(content: dict, generator: np.random.Generator) -> bytes:
    """Return the bytes of a COCO file with one to four random errors."""
    content = copy.deepcopy(content)
    for _ in range(generator.integers(1, 5)):
        _mutate_node(content, generator)
    data = json.dumps(content).encode()
    return mutate_bytes(data, generator) if generator.random() < 0.3 else data


def mutate_tree(content: dict, generator: np.random.Generator, tensors: bool = False) -> dict:
    """Return a tree of dicts and lists with one to four random errors.

    Args:
        tensors: whether an error can be an unusual tensor.
    """
    content = copy.deepcopy(content)
    for _ in range(generator.integers(1, 5)):
        if not tensors or generator.random() < 0.5:
            _mutate_node(content, generator)
        else:
            nodes = _list_nodes(content)
            parent, key = nodes[generator.integers(len(nodes))]
            odd = list_odd_tensors()
            parent[key] = odd[generator.integers(len(odd))]
    return content


def list_odd_tensors() -> list[torch.Tensor]:
    """Return tensors of unusual shapes and types. All are small in a file."""
    one = torch.ones(1)
    return [
        one.expand(10**6, 10**6), one.expand(1, 10**5, 10**5, 32), torch.ones(0, 10**9), torch.tensor(float("nan")),
        torch.ones(3).to_sparse(), torch.ones(2, dtype=torch.cfloat), torch.ones(2, dtype=torch.bool),
        torch.ones(1, 4, 5, 32), torch.ones(1, 5, 4, 32), torch.ones((), dtype=torch.int64), torch.full((3, 3), 1e38),
    ]  # fmt: skip


# Eight lines of seven aliases each: a "billion laughs" attack.
LAUGHS = ", ".join(
    f"{name}: &{name} [{', '.join([f'*{last}' if last else '1'] * 7)}]"
    for last, name in zip(["", *"abcdefg"], "abcdefgh", strict=True)
)
YAML_PIECES = [
    "!!bool maybe", "!!timestamp hello", "!!int ''", "!!float x", "!!binary é", "2024-13-45", "9" * 5000,
    "1" + ":59" * 3000, "&a [*a]", "&a {<<: *a}", "[" * 600, "{" * 99, "]", "*missing", "null", "~", "? ? ?", "- - - -",
    "!!python/object/apply:os.system ['true']", "'", '"', "%YAML 9.9", "---\n---", "\t", "\x00", "\ufeff", "1e999",
    ".nan", "-.inf", "0x" + "f" * 3000, f"{{{LAUGHS}}}", f"'{{{LAUGHS}}}'",
]  # fmt: skip


def mutate_yaml(text: str, generator: np.random.Generator) -> bytes:
    """Return the bytes of a YAML file with one to four values replaced, or its bytes broken."""
    lines = text.splitlines()
    for _ in range(generator.integers(1, 5)):
        number = generator.integers(len(lines))
        name, colon, _ = lines[number].partition(":")
        lines[number] = f"{name}{colon or '- '} {YAML_PIECES[generator.integers(len(YAML_PIECES))]}"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(data, generator) if generator.random() < 0.3 else data


def sample_outline(size: tuple[int, int], generator: np.random.Generator) -> list[float]:
    """Return a random polygon [x0, y0, x1, y1, ...] of any length that zigzags between two lines.

    Args:
        size: (height, width) of the image, which it may leave.
    """
    corners = int(10 ** generator.uniform(0.6, 4.5))
    reach = 10 ** generator.uniform(0, 5.5)
    across = np.arange(corners) % 2 * reach + generator.uniform(-1, 1, corners)
    along = np.linspace(0, generator.uniform(0.5, 2) * size[0], corners)
    sides = (across, along) if generator.random() < 0.5 else (along, across)
    return np.stack(sides, axis=1).ravel().round(2).tolist()


def _mutate_node(content: dict, generator: np.random.Generator) -> None:
    nodes = _list_nodes(content)
    if not nodes:
        return
    parent, key = nodes[generator.integers(len(nodes))]
    change = generator.integers(4)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif change == 2:
        other, other_key = nodes[generator.integers(len(nodes))]
        parent[key] = copy.deepcopy(other[other_key])
    else:
        parent[key] = copy.deepcopy(HOSTILE[generator.integers(len(HOSTILE))])


def _list_nodes(node: Any) -> list[tuple[Any, Any]]:
    """Return (parent, key) of the nodes below a node of a JSON tree; of a list only the first eight."""
    keys = list(node) if isinstance(node, dict) else range(min(len(node), 8)) if isinstance(node, list) else []
    return [found for key in keys for found in [(node, key), *_list_nodes(node[key])]]


def mutate_image(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes of a broken image. Most keep the first 16 bytes, by which the format is recognised."""
    kept = 16 if generator.random() < 0.8 else 0
    return data[:kept] + mutate_bytes(data[kept:], generator)


def mutate_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes with some of them changed, removed, repeated or replaced, most often at the beginning."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 9)):
        size = max(len(changed), 1)
        start = int(generator.integers(min(64, size) if generator.random() < 0.5 else size))
        length = int(generator.integers(1, 64))
        change = generator.integers(5)
        if change == 0:
            changed[start : start + 1] = bytes([generator.integers(256)])
        elif change == 1:
            del changed[start : start + length]
        elif change == 2:
            changed[start:start] = changed[start : start + length]
        elif change == 3:
            changed[start : start + length] = SPLICES[generator.integers(len(SPLICES))]
        else:
            del changed[start + int(generator.integers(size)) :]
    return bytes(changed)


# Pillow's format name, pixel mode and options for writing. They cover all kinds of pixels that finestsam reads.
IMAGE_KINDS = (
    ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "LA", {}), ("PNG", "I;16", {}),
    ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"exif": True}),
    ("MPO", "RGB", {"frames": 2}), ("GIF", "P", {}), ("GIF", "P", {"frames": 3}), ("BMP", "RGB", {}), ("BMP", "P", {}),
    ("DIB", "RGB", {}), ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}), ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "1", {"compression": "group4"}), ("TIFF", "L", {"compression": "packbits"}), ("TIFF", "I;16", {}),
    ("TIFF", "F", {}), ("TIFF", "RGB", {"frames": 3, "exif": True}), ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {"frames": 3}), ("AVIF", "RGB", {}),
    ("AVIF", "RGBA", {"frames": 2}), ("JPEG2000", "RGB", {}), ("JPEG2000", "L", {"no_jp2": True}), ("PPM", "RGB", {}),
    ("PPM", "L", {}), ("PPM", "1", {}),
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag


def encode_images(image: np.ndarray) -> dict[str, bytes]:
    """Return {name: bytes of the image file} for each of `IMAGE_KINDS` that this Pillow writes, and a 16-bit RGB PNG.

    Args:
        image: H x W x 3, uint8, RGB.
    """
    Image.init()
    encoded = {}
    for kind, mode, options in IMAGE_KINDS:
        if kind not in Image.SAVE:
            continue
        data, options = io.BytesIO(), dict(options)
        frames = [
            _convert(Image.fromarray(np.roll(image, step, axis=1)), mode) for step in range(options.pop("frames", 1))
        ]
        if options.pop("exif", False):
            options["exif"] = Image.Exif()
            options["exif"][ORIENTATION] = 6
        several = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
        frames[0].save(data, format=kind, **options, **several)
        encoded[f"{kind} {mode} {options or ''} {len(frames)}"] = data.getvalue()
    deep = cv2.imencode(".png", image.astype(np.uint16) * 257)[1]  # Pillow cannot write it
    return encoded | {"PNG RGB;16": deep.tobytes()}


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)
