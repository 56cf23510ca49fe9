"""Compare a training run with a plain loop over segment_anything's modules: same images, prompts, order and losses.

    python -m benchmarks.training

vit_b with random weights and a frozen encoder; images of 640 x 480 with ten objects; losses at the images' own size.
The plain loop encodes every image in every epoch, decodes all its objects together and upscales all their masks at
once, as finestSAM and similar projects do. It runs twice: as it is, and with glibc's allocator set to keep memory.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, Sam
from torch import Tensor
from torch.nn import functional as F

from benchmarks.generator import TUNED
from benchmarks.measure import describe_machine, print_table, run_process
from benchmarks.synthetic import stir_
from finestsam.batch import Sample
from finestsam.config import GENERATOR_DEFAULTS, Config, LossesConfig, build_config, flatten_config
from finestsam.data.dataset import SampleDataset, SampleSettings, StepSampler
from finestsam.data.read import read_training_set
from finestsam.images.files import write_image
from finestsam.masks import decode_rle, describe_mask
from finestsam.model.architectures import build_sam
from finestsam.model.sam import FinestSam
from finestsam.training.optim import build_optimizer, build_scheduler
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_

HEIGHT, WIDTH, OBJECTS = 480, 640, 10
PLAIN_EPOCHS, OUR_EPOCHS = 3, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="vit_b")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--precision", default="auto", help="of finestsam's side")
    parser.add_argument("--plain", help=argparse.SUPPRESS)  # settings for the process of the plain loop
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        _train_plainly(build_config(json.loads(given.plain)), Path(given.result))
        return
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        _compare(given, Path(folder))


def _compare(given: argparse.Namespace, folder: Path) -> None:
    _render_dataset(folder / "dataset", given.images)
    weights = folder / "random.pth"
    torch.manual_seed(0)
    sam = build_sam(given.type)
    stir_(sam.image_encoder)
    torch.save(sam.state_dict(), weights)
    flags = {
        "dataset.path": str(folder / "dataset"), "dataset.val_size": 0.0, "model.checkpoint": str(weights),
        "model.type": given.type, "precision": given.precision,
        "sav_dir": str(folder), "run_name": "run", "eval_interval": 0, "num_epochs": OUR_EPOCHS,
        "store.folder": str(folder / "store"),
    }  # fmt: skip
    settings = json.dumps(flatten_config(build_config(flags)))
    plain = {}
    for name, environment in {"plain loop": {}, "the same, tuned malloc": TUNED}.items():
        result = folder / "plain.json"
        arguments = ["-m", "benchmarks.training", "--plain", settings, "--result", str(result)]
        cost = run_process(arguments, environment)
        plain[name] = json.loads(result.read_text()) | {"peak": cost.peak_megabytes}
        print(f"{name}: {plain[name]['seconds']} s an epoch, loss {plain[name]['losses']}", flush=True)
    words = [f"--{name}={json.dumps(value) if isinstance(value, float) else value}" for name, value in flags.items()]
    cost = run_process(["-m", "finestsam", "--mode", "train", *words])
    with open(folder / "run" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["total_loss"]]
    epochs, losses = [float(row["seconds"]) for row in rows], [float(row["total_loss"]) for row in rows]
    print(f"finestsam: {epochs} s an epoch, loss {losses[:PLAIN_EPOCHS]}, {cost.seconds:.1f} s in all")
    own = median(epochs[1:])
    table = [
        [
            name,
            f"{median(found['seconds']):.1f}",
            f"{median(found['seconds']) / own:.1f} x",
            f"{median(found['seconds']) * OUR_EPOCHS / cost.seconds:.1f} x",
            f"{found['peak']:.0f}",
        ]
        for name, found in plain.items()
    ]
    header = [
        "training",
        "s an epoch",
        "ratio from the second on",
        f"{OUR_EPOCHS} epochs, start and encoding",
        "peak MB",
    ]
    print_table(header, [*table, ["finestsam", f"{own:.2f}", "", "", f"{cost.peak_megabytes:.0f}"]])
    for name, found in plain.items():
        difference = np.abs(np.array(found["losses"]) / losses[:PLAIN_EPOCHS] - 1).max()
        print(f"{name}: losses differ by {difference:.1e} at most over {PLAIN_EPOCHS} epochs")


def _render_dataset(folder: Path, count: int) -> None:
    """Write images with exactly ten discs."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    images, annotations = [], []
    for number in range(count):
        image = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for _ in range(OBJECTS):
            y, x, radius = generator.integers(60, 420), generator.integers(60, 580), generator.integers(20, 60)
            mask = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            image[mask] = image[mask] // 4 + generator.integers(0, 190, 3, dtype=np.uint8)
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
            annotations.append(ids | describe_mask(mask))
        write_image(folder / "images" / f"{number}.png", image)
        images.append({"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
    (folder / "annotations.json").write_text(json.dumps(content))


def _train_plainly(config: Config, result: Path) -> None:
    data = read_training_set(config.dataset)
    sam = build_sam(config.model.type)
    sam.load_state_dict(torch.load(config.model.checkpoint, weights_only=True))
    sam.image_encoder.__class__, sam.mask_decoder.__class__ = ImageEncoderViT, MaskDecoder
    freeze_(FinestSam(sam), config)
    trained = [weight for weight in sam.parameters() if weight.requires_grad]
    optimizer = build_optimizer(sam, config.opt)
    scheduler = build_scheduler(optimizer, config.sched, config.eval_interval, total_steps=0)
    settings = SampleSettings(
        sam.image_encoder.img_size, GENERATOR_DEFAULTS["points_per_side"], config.seed_device, config.prompts,
        config.dataset,
    )  # fmt: skip
    dataset = SampleDataset(data.train, settings)
    sampler = StepSampler(len(dataset), config.batch_size, settings.seed)
    seconds, losses = [], []
    for sampler.epoch in range(PLAIN_EPOCHS):
        start, total = time.perf_counter(), 0.0
        for keys in sampler:
            (sample,) = (dataset[key] for key in keys)
            loss = compute_losses(sam, embed(sam, sample), sample, config.losses, multimask_output=True)
            optimizer.zero_grad()
            loss.mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, Stepper.clip_norm)
            optimizer.step()
            scheduler.step()
            total += float(loss.detach().sum())
        seconds.append(time.perf_counter() - start)
        losses.append(total / (OBJECTS * len(dataset)))
    result.write_text(json.dumps({"seconds": seconds, "losses": losses}))


@torch.no_grad()
def embed(sam: Sam, sample: Sample) -> Tensor:
    return sam.image_encoder(sam.preprocess(sample.image.float())[None])


def compute_losses(
    sam: Sam, embedding: Tensor, sample: Sample, settings: LossesConfig, multimask_output: bool
) -> Tensor:
    """Return the loss of each object, computed in one batch at the image's own size."""
    prompts = sample.prompts
    sparse, dense = sam.prompt_encoder((prompts.points, prompts.labels), None, None)
    logits, scores = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output)
    masks = sam.postprocess_masks(logits, sample.input_size, sample.original_size)
    truth = torch.stack([torch.from_numpy(decode_rle(rle)) for rle in sample.rles]).float()[:, None].expand_as(masks)
    inside = masks.sigmoid()
    missed = 1 - torch.where(truth > 0, inside, 1 - inside)
    entropy = F.binary_cross_entropy_with_logits(masks, truth, reduction="none")
    weights = torch.where(truth > 0, settings.focal_alpha, 1 - settings.focal_alpha)
    focal = (entropy * missed**settings.focal_gamma * weights).mean(dim=(2, 3))
    shared = (inside * truth).sum(dim=(2, 3))
    dice = 1 - (2 * shared + 1) / (inside.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)
    intersection = ((masks > 0) & (truth > 0)).sum(dim=(2, 3))
    iou = intersection / ((masks > 0) | (truth > 0)).sum(dim=(2, 3)).clamp(min=1)
    best = (settings.focal_ratio * focal + settings.dice_ratio * dice).min(dim=1).values
    return best + settings.iou_ratio * (scores - iou).square().mean(dim=1)


if __name__ == "__main__":
    main()
