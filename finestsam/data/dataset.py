"""Pictures with their objects and prompts, and the order in which training sees them.

A sample is a pure function of (seed, epoch, picture): worker processes, their number and a restart change nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from finestsam.batch import Batch, Prompts, Sample
from finestsam.config import DatasetConfig, PromptsConfig
from finestsam.data.coco import Annotation, Record
from finestsam.data.previous_logits import PreviousLogits
from finestsam.data.prompts import (
    MASK_LOGIT,
    PointCounts,
    build_image_grid,
    coarsen_mask,
    cut_out,
    find_grid_points_inside,
    jitter_box,
    sample_points,
)
from finestsam.errors import Defect
from finestsam.images import compute_input_size, read_image, resize_image, scale_boxes, scale_points
from finestsam.masks import decode_rle


@dataclass(frozen=True)
class SampleSettings:
    """What a sample depends on besides its picture."""

    image_size: int  # pixels of the longest side
    points_per_side: int  # of the generator's grid
    seed: int
    prompts: PromptsConfig
    dataset: DatasetConfig
    max_objects: int = 0  # a random choice where a picture has more; 0: all


class SampleDataset(Dataset):
    """Samples by (epoch, position of the picture).

    Args:
        records: pictures, each with at least one object.
        previous_logits: what the model answered an epoch ago, as mask prompts; None: not used.
    """

    def __init__(self, records: list[Record], settings: SampleSettings, previous_logits: PreviousLogits | None = None):
        self.records = records
        self.settings = settings
        self.previous_logits = previous_logits
        counts = [len(record.annotations) for record in records]
        self.first_rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample | Defect:
        """Return the sample, or the defect of a picture that broke since the dataset was checked."""
        epoch, position = key
        record = self.records[position]
        try:
            image = read_image(record.path, record.size)
            input_size = compute_input_size(record.size, self.settings.image_size)
        except Defect as defect:
            return Defect(defect.code, f"{record.file_name}: {defect.message}")
        chosen = self._choose_objects(record, epoch)
        annotations = [record.annotations[place] for place in chosen]
        rows = (self.first_rows[position] + chosen).tolist()
        pixels = torch.from_numpy(resize_image(image, input_size).copy()).permute(2, 0, 1)  # 3 x h x w
        return Sample(
            image_id=record.image_id,
            file_name=record.file_name,
            original_size=record.size,
            input_size=input_size,
            image=pixels.contiguous(),
            prompts=self._draw_prompts(record, annotations, rows, epoch),
            rles=[record.rle(annotation) for annotation in annotations],
            annotation_ids=[annotation.id for annotation in annotations],
            rows=rows,
        )

    def _choose_objects(self, record: Record, epoch: int) -> np.ndarray:
        count, limit = len(record.annotations), self.settings.max_objects
        if limit == 0 or count <= limit:
            return np.arange(count)
        generator = np.random.default_rng([self.settings.seed, epoch, record.image_id & 0xFFFFFFFF, 1])
        return np.sort(generator.choice(count, size=limit, replace=False))

    def _draw_prompts(self, record: Record, annotations: list[Annotation], rows: list[int], epoch: int) -> Prompts:
        asked = self.settings.prompts
        grid = build_image_grid(self.settings.points_per_side, record.size)
        drawn = [self._draw_for_object(record, annotation, grid, epoch) for annotation in annotations]
        prompts = Prompts()
        if asked.use_points:
            prompts.points = torch.from_numpy(np.stack([points for points, _, _, _ in drawn])).float()
            prompts.labels = torch.from_numpy(np.stack([labels for _, labels, _, _ in drawn]))
        if asked.use_boxes:
            prompts.boxes = torch.from_numpy(np.stack([box for _, _, box, _ in drawn])).float()
        if asked.use_masks or asked.use_logits:
            prompts.mask_logits = torch.from_numpy(np.stack([logits for _, _, _, logits in drawn]))[:, None]
            prompts.has_mask = torch.full((len(drawn),), asked.use_masks)
        if asked.use_logits and self.previous_logits is not None:
            self._insert_previous_logits(prompts, rows, epoch)
        return prompts

    def _draw_for_object(self, record: Record, annotation: Annotation, grid: np.ndarray, epoch: int) -> tuple:
        """Return points, labels, box and mask logits of one object, the first three in the input frame."""
        settings, asked = self.settings, self.settings.prompts
        input_size = compute_input_size(record.size, settings.image_size)
        # The low 32 bits: ids can pass 2^32, and can be negative.
        generator = np.random.default_rng([settings.seed, epoch, annotation.id & 0xFFFFFFFF])
        mask = decode_rle(record.rle(annotation))
        found = cut_out(mask, annotation.box)
        inside = None
        if settings.dataset.snap_to_grid:
            inside = find_grid_points_inside(found, grid, settings.image_size / max(record.size))
        counts = PointCounts(
            settings.dataset.positive_points, settings.dataset.negative_points, settings.dataset.use_center, inside
        )
        points, labels = sample_points(found, counts, generator)
        x, y, width, height = annotation.box
        box = scale_boxes(np.array([[x, y, x + width, y + height]], dtype=float), record.size, input_size)[0]
        box = jitter_box(box, input_size, asked.box_jitter_ratio, asked.box_jitter_max_pixels, generator)
        return (
            scale_points(points, record.size, input_size).astype(np.float32),
            labels,
            box.astype(np.float32),
            self._draw_mask_prompt(mask, input_size, generator),
        )

    def _draw_mask_prompt(
        self, mask: np.ndarray, input_size: tuple[int, int], generator: np.random.Generator
    ) -> np.ndarray | None:
        """Return a coarse mask as logits of the padded square, 4g x 4g; zeros where only its place is needed."""
        if not (self.settings.prompts.use_masks or self.settings.prompts.use_logits):
            return None
        side = self.settings.image_size // 4
        square = np.zeros((side, side), dtype=np.float32)
        if self.settings.prompts.use_masks:
            height, width = (max(1, math.ceil(length / 4)) for length in input_size)
            square[:] = -MASK_LOGIT
            square[:height, :width] = coarsen_mask(mask, (height, width), generator)
        return square

    def _insert_previous_logits(self, prompts: Prompts, rows: list[int], epoch: int) -> None:
        logits, is_known = self.previous_logits.read(epoch, rows)
        prompts.mask_logits = torch.where(is_known[:, None, None, None], logits, prompts.mask_logits)
        prompts.has_mask = prompts.has_mask | is_known


def collate(samples: list[Sample | Defect]) -> tuple[Batch, list[str]]:
    """Return the batch, and what is to be said about pictures that could not be read."""
    batch = Batch([sample for sample in samples if isinstance(sample, Sample)])
    return batch, [sample.message for sample in samples if isinstance(sample, Defect)]


class StepSampler:
    """The order of an epoch: batches of (epoch, position), the same number on every rank, the last ones maybe empty.

    A pure function of (seed, epoch): the picture at place p of the shuffled epoch goes to the same optimizer step
    whatever the number of ranks, as long as batch_size x world_size is the same.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.first_batch = 0  # of this epoch, when a run continues in its middle

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.length / (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(self.length)
        together = self.batch_size * self.world_size
        for start in range(self.first_batch * together, self.length, together):
            mine = order[start : start + together][self.rank :: self.world_size]
            yield [(self.epoch, int(position)) for position in mine]


def drop_vanishing_objects(
    records: list[Record], image_size: int, min_area_pixels: float
) -> tuple[list[Record], list[tuple[str, int]]]:
    """Leave out objects that are smaller than `min_area_pixels` in the input frame.

    Returns:
        The pictures that still have objects, and (file name, annotation id) of the objects that vanish.
    """
    kept, vanished = [], []
    for record in records:
        scale = image_size / max(record.size)
        remaining = []
        for annotation in record.annotations:
            if annotation.area * scale**2 >= min_area_pixels:
                remaining.append(annotation)
            else:
                vanished.append((record.file_name, annotation.id))
        if remaining:
            kept.append(replace(record, annotations=remaining))
    return kept, vanished
