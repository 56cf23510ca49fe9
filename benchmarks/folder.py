"""Measure the time that `--mode predict` takes for a folder of images, and the share of encoder and decoder.

    python -m benchmarks.folder

20 synthetic JPEGs of different shapes; vit_tiny with random weights and synthetic objects (synthetic.py). Measured are
all steps of `--mode predict`: reading, encoding, decoding, filtering, run lengths, overlays and the json.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.generator import list_points
from benchmarks.measure import describe_machine, print_table
from benchmarks.synthetic import FoldedWithObjects, SyntheticObjects
from finestsam.config import GENERATOR_DEFAULTS, Config, GeneratorConfig, build_config
from finestsam.data.synthetic import render_scene
from finestsam.images.files import write_image
from finestsam.model.load import LoadedModel, load_model
from finestsam.model.sam import FinestSam
from finestsam.modes import predict as predict_module
from finestsam.prediction import predict_masks as masks_module

SIZES = ((800, 1200), (1200, 800), (768, 1024), (1000, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="vit_tiny")
    parser.add_argument("--images", type=int, default=20)
    given = parser.parse_args()
    print(describe_machine())
    seconds = {"encoder": 0.0, "decoder": 0.0, "all": 0.0}
    _time(FinestSam, "encode", seconds, "encoder")
    _time(FinestSam, "compute_image_features", seconds, "decoder")
    _time(FinestSam, "predict_above", seconds, "decoder")
    _time(masks_module, "_predict_all", seconds, "all")
    predict_module.load_model = _load_with_objects
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(given.images):
            write_image(images / f"{number:02}.jpg", render_scene(0, number, SIZES[number % len(SIZES)]).image)
        flags = {"input": [str(images)], "out_dir": f"{folder}/out", "store.folder": f"{folder}/store"}
        flags |= {"model.type": given.type, "model.checkpoint": "none"}
        predict_module.predict(build_config(flags))
    seconds["rest"] = seconds["all"] - seconds["encoder"] - seconds["decoder"]
    rows = [[name, f"{value:.2f}", f"{value / seconds['all']:.1%}"] for name, value in seconds.items()]
    print_table(["part", "s", "share"], rows)


def _time(owner: object, name: str, seconds: dict[str, float], part: str) -> None:
    """Replace the function `name` by one that adds its seconds to `seconds[part]`."""
    work = getattr(owner, name)

    def timed(*arguments, **named):
        start = time.perf_counter()
        try:
            return work(*arguments, **named)
        finally:
            seconds[part] += time.perf_counter() - start

    setattr(owner, name, timed)


def _load_with_objects(config: Config, prefer_runs: bool) -> LoadedModel:
    loaded = load_model(config, prefer_runs)
    sam = loaded.model.sam
    settings = GeneratorConfig(**GENERATOR_DEFAULTS)
    size = sam.image_encoder.img_size
    points = torch.cat([list_points(shape, settings, size) for shape in SIZES])
    sam.mask_decoder.__class__ = FoldedWithObjects
    sam.mask_decoder.objects = SyntheticObjects(sam.prompt_encoder, points, size // 4, fills=False)
    return loaded


if __name__ == "__main__":
    main()
