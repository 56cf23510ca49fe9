"""`--mode predict` for weights with a semantic head: each image's classes as colours over it and as a label map."""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from finestsam.config import Config
from finestsam.errors import Defect, UserError, printable
from finestsam.images.files import read_hashed_image, write_image
from finestsam.images.frames import compute_input_size
from finestsam.model.embeddings import image_key
from finestsam.model.resample import build_axis
from finestsam.model.sam import FinestSam
from finestsam.prediction.embedder import Embedder
from finestsam.prediction.overlay import colour_classes, render_classes
from finestsam.runtime.whole_files import write_json

LABELS_SUFFIX = ".classes.png"
LEGEND_NAME = "classes.json"


@torch.no_grad()
def classify(
    model: FinestSam, embedding: torch.Tensor, input_size: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return the class of each pixel of an image, H x W, uint8, or uint16 where there are more than 256.

    Logits are brought to the image a band of rows at a time: all of them would be K times the image in float32.

    Args:
        embedding: 1 x C x g x g.
        input_size: of the image in the input frame, as `size` is in its own.
    """
    logits = model(embedding, None)[0]
    rows, columns = (
        build_axis(logits.shape[-1], model.image_size, length, own)
        for length, own in zip(input_size, size, strict=True)
    )
    dtype = np.uint8 if len(logits) <= 256 else np.uint16
    classes = np.empty(size, dtype=dtype)
    matrix = rows.matrix.to(logits)
    for pixels, used in rows.blocks:
        wide = columns.spread(logits[:, used].transpose(1, 2)).transpose(1, 2)
        classes[pixels] = (matrix[pixels, used] @ wide).argmax(dim=0).cpu().numpy().astype(dtype)
    return classes


def predict_classes(
    paths: list[Path], outputs: list[tuple[Path, Path]], embedder: Embedder, names: list[str], config: Config
) -> int:
    """Write an overlay and a label map of each image, and the legend of both, beside the overlays.

    Args:
        outputs: where the overlay and the label map of each image go.

    Returns:
        The exit code: 2 where `strict` is set and an image cannot be predicted, else 0.

    Raises:
        UserError: none of the images can be read, the results cannot be written, or `resume` is set.
    """
    if config.resume:
        raise UserError("--resume: weights with classes for pixels predict every image anew; leave it out")
    start, written = time.perf_counter(), 0
    shares = np.zeros(len(names), dtype=np.int64)
    progress = tqdm(paths, unit="image", disable=len(paths) == 1 or None)
    for path, (overlay, labels) in zip(progress, outputs, strict=True):
        try:
            classes = _predict_one(path, overlay, labels, embedder, config)
        except Defect as defect:
            if len(paths) == 1:
                raise UserError(f"{printable(path)}: {defect.message}") from None
            tqdm.write(f"finestsam: skipped {printable(path)}: {defect.message}", file=sys.stderr)
            continue
        except OSError as error:
            raise UserError(f"{printable(overlay)}: cannot be written: {error.strerror or error}") from None
        shares += np.bincount(classes.ravel(), minlength=len(names))
        written += 1
    if not written:
        raise UserError(f"none of the {len(paths)} images can be predicted")
    folder = outputs[0][0].parent
    _write_legend(folder / LEGEND_NAME, names)
    seconds = (time.perf_counter() - start) / written
    print(f"overlays and label maps (*{LABELS_SUFFIX}): {printable(folder)}, their classes: {folder / LEGEND_NAME}")
    print(f"{written} images, {seconds:.2f} s an image; {_describe_shares(names, shares)}")
    return 2 if config.strict and written < len(paths) else 0


def _predict_one(path: Path, overlay: Path, labels: Path, embedder: Embedder, config: Config) -> np.ndarray:
    pixels, digest = read_hashed_image(path, config.dataset.images)
    size = pixels.shape[:2]
    embedding = embedder.embed_image(image_key(digest, size), pixels)
    model = embedder.model
    classes = classify(model, embedding, compute_input_size(size, model.image_size), size)
    write_image(overlay, render_classes(pixels, classes, config.opacity))
    write_image(labels, classes)
    return classes


def _write_legend(path: Path, names: list[str]) -> None:
    """Write the class that each number of a label map stands for, and its colour in the overlays."""
    colours = colour_classes(len(names)).tolist()
    legend = [
        {"id": number, "name": name, "color": "#{:02x}{:02x}{:02x}".format(*colour) if number else None}
        for number, (name, colour) in enumerate(zip(names, colours, strict=True))
    ]
    try:
        write_json(path, legend, indent=1)
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be written: {error.strerror or error}") from None


def _describe_shares(names: list[str], counts: np.ndarray) -> str:
    """Return the classes that were found and their share of all pixels, the largest first, five at most."""
    order = [number for number in np.argsort(-counts, kind="stable")[:5] if counts[number]]
    return ", ".join(f"{names[number]} {100 * counts[number] / counts.sum():.1f} %" for number in order)
