"""Broken versions of a file, drawn at random: what a faulty tool, a bad disk or an attacker would leave."""

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
    """Return the bytes of a COCO file with one to four things wrong with it."""
    content = copy.deepcopy(content)
    for _ in range(generator.integers(1, 5)):
        _mutate_node(content, generator)
    data = json.dumps(content).encode()
    return mutate_bytes(data, generator) if generator.random() < 0.3 else data


def mutate_tree(content: dict, generator: np.random.Generator, tensors: bool = False) -> dict:
    """Return a tree of dicts and lists with one to four things wrong with it.

    Args:
        tensors: whether some of them may be tensors that nobody saves.
    """
    content = copy.deepcopy(content)
    for _ in range(generator.integers(1, 5)):
        if not tensors or generator.random() < 0.5:
            _mutate_node(content, generator)
        else:
            places = list(_list_places(content))
            parent, key = places[generator.integers(len(places))]
            odd = sample_odd_tensors()
            parent[key] = odd[generator.integers(len(odd))]
    return content


def sample_odd_tensors() -> list[torch.Tensor]:
    """Return tensors of odd shapes and kinds, all of which are small in a file."""
    one = torch.ones(1)
    return [
        one.expand(10**6, 10**6), one.expand(1, 10**5, 10**5, 32), torch.ones(0, 10**9), torch.tensor(float("nan")),
        torch.ones(3).to_sparse(), torch.ones(2, dtype=torch.cfloat), torch.ones(2, dtype=torch.bool),
        torch.ones(1, 4, 5, 32), torch.ones(1, 5, 4, 32), torch.ones((), dtype=torch.int64), torch.full((3, 3), 1e38),
    ]  # fmt: skip


# Eight lines of seven aliases each.
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
        place = generator.integers(len(lines))
        name, colon, _ = lines[place].partition(":")
        lines[place] = f"{name}{colon or '- '} {YAML_PIECES[generator.integers(len(YAML_PIECES))]}"
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(data, generator) if generator.random() < 0.3 else data


def render_outline(size: tuple[int, int], generator: np.random.Generator) -> list[float]:
    """Return a polygon [x0, y0, x1, y1, ...] that runs to and fro between two lines, of any length.

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
    places = list(_list_places(content))
    if not places:
        return
    parent, key = places[generator.integers(len(places))]
    change = generator.integers(4)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif change == 2:
        other, other_key = places[generator.integers(len(places))]
        parent[key] = copy.deepcopy(other[other_key])
    else:
        parent[key] = copy.deepcopy(HOSTILE[generator.integers(len(HOSTILE))])


def _list_places(node: Any) -> list[tuple[Any, Any]]:
    """Return every place of a JSON tree as what holds it and its key, few of long lists of numbers."""
    keys = list(node) if isinstance(node, dict) else range(min(len(node), 8)) if isinstance(node, list) else []
    return [place for key in keys for place in [(node, key), *_list_places(node[key])]]


def mutate_image(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes of a broken image; in most the first ones are left, by which its kind is recognised."""
    kept = 16 if generator.random() < 0.8 else 0
    return data[:kept] + mutate_bytes(data[kept:], generator)


def mutate_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes with a few of them changed, cut out, repeated or put in, the first ones most often."""
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


# Pillow's name of a kind, the mode of its pixels, and how it is written: every way of storing pixels that is read.
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
ORIENTATION = 0x0112  # of EXIF


def encode_images(image: np.ndarray) -> dict[str, bytes]:
    """Return the bytes of an image's file by a name for each of `IMAGE_KINDS` that this Pillow writes, and one more.

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
    deep = cv2.imencode(".png", image.astype(np.uint16) * 257)[1]  # which Pillow reads and does not write
    return encoded | {"PNG RGB;16": deep.tobytes()}


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)
