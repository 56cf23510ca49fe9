"""`--mode predict`: find the objects of pictures, and write an overlay of each and one COCO json of all."""

import glob
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from finestsam.config import Config, GeneratorConfig
from finestsam.errors import Defect, UserError
from finestsam.images import IMAGE_SUFFIXES, read_image, write_image
from finestsam.model.card import Card
from finestsam.model.load import load_model
from finestsam.model.sam import FinestSam
from finestsam.prediction.generator import generate_masks, resolve_generator
from finestsam.prediction.overlay import draw_overlay
from finestsam.prediction.results import GeneratedMasks, Results

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".flv", ".mpg", ".mpeg"}
RESULTS_NAME = "predictions.json"
# Overlays beside their pictures carry it, so that they overwrite none and are not taken for pictures the next time.
OWN_SUFFIX = ".finestsam.png"
MAX_STEM_BYTES = 200  # file systems allow 255 a name, of which a suffix and a number need some


def predict(config: Config) -> int:
    """Run the mode and return the exit code.

    Raises:
        UserError: nothing could be predicted, or an output cannot be written.
    """
    paths = find_pictures(config.input)
    out_dir = _make_folder(Path(config.out_dir))
    loaded = load_model(config, prefer_runs=True)
    settings = resolve_generator(config.generator, loaded.card)
    print(f"model: {loaded.model_type}, {loaded.source}")
    results = Results(_name_category(loaded.card), settings)
    start = time.perf_counter()
    overlays = _predict_all(paths, out_dir, loaded.model, config.opacity, results)
    seconds = (time.perf_counter() - start) / len(overlays)
    with _writing(out_dir / RESULTS_NAME):
        results.write(out_dir / RESULTS_NAME)
    shown = overlays[0] if len(overlays) == 1 else f"{out_dir}{os.sep} ({len(overlays)} overlays)"
    print(f"pictures: {_printable(shown)}\nCOCO json: {_printable(out_dir / RESULTS_NAME)}")
    print(f"{_count(len(results.annotations), 'mask')} in {_count(len(overlays), 'picture')}, {seconds:.2f} s a picture")
    return 0
