"""Predict images one by one, for tasks that write a few files for each and need no result of all together."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from finestsam.config import ImagesConfig
from finestsam.errors import Defect, UserError, printable
from finestsam.images.files import read_hashed_image
from finestsam.model.embeddings import image_key
from finestsam.prediction.embedder import Embedder

Result = TypeVar("Result")


@dataclass(frozen=True)
class PredictedImages(Generic[Result]):
    """What was predicted.

    Attributes:
        results: of the images that could be read, in their order.
        seconds: for each of them, on average.
    """

    results: list[Result]
    seconds: float


def predict_each(
    paths: list[Path],
    outputs: list[tuple[Path, ...]],
    embedder: Embedder,
    settings: ImagesConfig,
    predict_one: Callable[[np.ndarray, Tensor, tuple[Path, ...]], Result],
) -> PredictedImages[Result]:
    """Read, embed and predict each image, and skip with a message those that cannot be read.

    Args:
        outputs: where the files of each image go.
        predict_one: takes the image (H x W x 3, uint8), its embedding (1 x C x g x g) and its outputs, which it writes.

    Raises:
        UserError: none of the images can be read, or the results cannot be written.
    """
    start, results = time.perf_counter(), []
    progress = tqdm(paths, unit="image", disable=len(paths) == 1 or None)
    for path, files in zip(progress, outputs, strict=True):
        try:
            pixels, digest = read_hashed_image(path, settings)
            embedding = embedder.embed_image(image_key(digest, pixels.shape[:2]), pixels)
            results.append(predict_one(pixels, embedding, files))
        except Defect as defect:
            if len(paths) == 1:
                raise UserError(f"{printable(path)}: {defect.message}") from None
            tqdm.write(f"finestsam: skipped {printable(path)}: {defect.message}", file=sys.stderr)
        except OSError as error:
            raise UserError(f"{printable(files[0])}: cannot be written: {error.strerror or error}") from None
    if not results:
        raise UserError(f"none of the {len(paths)} images can be predicted")
    return PredictedImages(results, (time.perf_counter() - start) / len(results))
