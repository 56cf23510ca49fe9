"""Samples (images with objects and prompts), and the order in which training sees them.

A sample is a pure function of (seed, epoch, image). Worker processes and restarts do not change it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from finestsam.batch import Batch, Prompts, Sample
from finestsam.config import AugmentConfig, DatasetConfig, PromptsConfig
from finestsam.data.augment import (
    ShownObject,
    View,
    choose_variant,
    choose_view,
    recolour,
    show,
    show_all,
    show_image,
    show_object,
)
from finestsam.data.cells import CELL_PIXELS, sort_by_area
from finestsam.data.previous_logits import PreviousLogits
from finestsam.data.prompts import (
    MASK_LOGIT,
    PointCounts,
    build_image_grid,
    coarsen_mask,
    cut_out,
    find_grid_points_inside,
    jitter_box,
    sample_point_sets,
)
from finestsam.data.semantic import ClassTable
from finestsam.errors import Defect
from finestsam.images.files import read_image
from finestsam.images.frames import compute_input_size, resize_image, scale_boxes, scale_points
from finestsam.masks import decode_rle, join_rles
from finestsam.model.embeddings import EmbeddingStore, image_key
from finestsam.records import Annotation, Record

# Purposes of the random streams. The purpose is the last number of a stream's seed, so the streams are independent.
# No purpose is 0, because numpy ignores zeros at the end of a seed.
CHOICE, VARIANT, POINTS, BOX, MASK, KIND, BACKGROUND, CORRECTION = range(1, 9)
# Share of the training images that are corrected, chosen anew in each epoch.
CORRECTED_SHARE = 0.5
# Takes a record and `view`, `input_size` and `side`, as `data.cells.label_cells` does; returns side x side.
CellLabels = Callable[..., Tensor]
PROMPT_KINDS = ("use_points", "use_boxes", "use_masks")


@dataclass(frozen=True)
class SampleSettings:
    """Settings that determine a sample, besides its image."""

    image_size: int  # pixels of the longest side
    points_per_side: int  # of the generator's grid
    seed: int
    prompts: PromptsConfig
    dataset: DatasetConfig
    max_objects: int = 0  # of an image with more objects, a random subset is used; 0: all
    augment: AugmentConfig = AugmentConfig()
    label_cells: CellLabels | None = None  # target of each cell of the decoder's grid; None: samples have none
    jitters_boxes: bool = True
    categories: ClassTable | None = None  # classes of the objects; None: samples have no classes
    prompts_objects: bool = True  # False: a sample has cells, but neither prompts nor masks of objects


class SampleDataset(Dataset):
    """Samples by (epoch, position of the image).

    Args:
        records: images, each with at least one object.
        previous_logits: predictions of the previous epoch, used as mask prompts; None: not used.
        store: stored embeddings. Pixels are not read for an image in the store. None: not used.
    """

    def __init__(
        self,
        records: list[Record],
        settings: SampleSettings,
        previous_logits: PreviousLogits | None = None,
        store: EmbeddingStore | None = None,
    ):
        self.records = records
        self.settings = settings
        self.previous_logits = previous_logits
        self.store = store
        counts = [len(record.annotations) for record in records]
        self.first_rows = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample | Defect:
        """Return the sample, or the defect of an image that was damaged after the dataset was checked."""
        epoch, position = key
        record = self.records[position]
        variant = choose_variant(self.settings.augment, epoch)
        view, indices = self._choose_view(record, variant)
        try:
            input_size = self._compute_input_size(view)
            embedding = self._read_embedding(record, view)
            pixels = self.read_pixels(position, variant) if embedding is None else None
        except Defect as defect:
            return Defect(defect.code, f"{record.file_name}: {defect.message}")
        label_cells, side = self.settings.label_cells, self.settings.image_size // CELL_PIXELS
        cells = label_cells(record, view=view, input_size=input_size, side=side) if label_cells else None
        sample = Sample(
            record.image_id, record.file_name, view.size, input_size, pixels, Prompts(),
            variant=variant, embedding=embedding, cells=cells,
        )  # fmt: skip
        return self._add_objects(sample, position, view, indices, epoch) if self.settings.prompts_objects else sample

    def _add_objects(self, sample: Sample, position: int, view: View, indices: np.ndarray, epoch: int) -> Sample:
        """Return the sample with prompts for the objects at `indices`, at most max_objects of them, and their masks."""
        record, input_size = self.records[position], sample.input_size
        background = self._sample_background(record, view, input_size, epoch)
        indices = self._choose_objects(record, indices, epoch)
        kinds = self._choose_kinds(record, epoch)
        frames = _Frames(view.size, input_size, build_image_grid(self.settings.points_per_side, view.size))
        rles, prompts, counts = [], [], []
        for index in indices:
            shown = show_object(record, record.annotations[index], view)
            prompts.append(self._sample_prompts(kinds, shown, frames, epoch))
            counts.append(len(prompts[-1]))
            rles += [shown.rle] * counts[-1]
        indices = np.repeat(indices, counts)
        rows = (self.first_rows[position] + indices).tolist()
        return replace(
            sample,
            prompts=self._insert_previous_logits(_stack_prompts(prompts), rows, epoch),
            rles=rles,
            annotation_ids=[record.annotations[index].id for index in indices],
            rows=rows,
            correction_clicks=self._count_corrections(record, epoch),
            background=background,
            object_classes=self._list_classes([record.annotations[index] for index in indices]),
            cell_classes=self._list_classes(sort_by_area(record.annotations)),
        )

    def _list_classes(self, annotations: list[Annotation]) -> list[int]:
        table = self.settings.categories
        return [table.by_category[annotation.category_id] for annotation in annotations] if table else []

    def read_pixels(self, position: int, variant: int) -> Tensor:
        """Return a variant of an image in the input frame before padding, 3 x h x w, uint8.

        Raises:
            Defect: the image was damaged after it was checked.
        """
        record = self.records[position]
        view, _ = self._choose_view(record, variant)
        image = show_image(read_image(record.path, record.size, self.settings.dataset.images), view)
        pixels = torch.from_numpy(resize_image(image, self._compute_input_size(view)).copy()).permute(2, 0, 1)
        return recolour(pixels.contiguous(), view)

    def list_embedding_keys(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the store's key and (position, variant) for every variant of every image."""
        augment = self.settings.augment
        variants = range(1, augment.variants + 1) if augment.is_active else (0,)
        for position, record in enumerate(self.records):
            for variant in variants:
                view, _ = self._choose_view(record, variant)
                yield _make_embedding_key(record, view), (position, variant)

    def _read_embedding(self, record: Record, view: View) -> Tensor | None:
        stored = self.store.read(_make_embedding_key(record, view)) if self.store else None
        return None if stored is None else torch.from_numpy(np.array(stored))

    def _compute_input_size(self, view: View) -> tuple[int, int]:
        return compute_input_size(view.size, self.settings.image_size)

    def _choose_view(self, record: Record, variant: int) -> tuple[View, np.ndarray]:
        """Return the view of a variant and the indices of the visible objects; the same in each epoch."""
        if variant == 0:
            return show_all(record)
        settings = self.settings
        generator = self._open_stream(variant, record.image_id, VARIANT)
        return choose_view(record, settings.augment, settings.image_size, generator)

    def _choose_objects(self, record: Record, indices: np.ndarray, epoch: int) -> np.ndarray:
        limit = self.settings.max_objects
        if limit == 0 or len(indices) <= limit:
            return indices
        generator = self._open_stream(epoch, record.image_id, CHOICE)
        return np.sort(generator.choice(indices, size=limit, replace=False))

    def _sample_background(self, record: Record, view: View, input_size: tuple[int, int], epoch: int) -> Prompts:
        """Return random grid points outside all objects and crowd regions, at most `background_points`."""
        count = self.settings.dataset.background_points
        if count == 0:
            return Prompts()
        # All objects, also those that are too small in this view to be prompted for: they are not background.
        rles = [record.rle(annotation) for annotation in record.annotations]
        rles += [{"size": list(record.size), "counts": counts} for counts in record.crowds]
        is_taken = decode_rle(join_rles(rles)) if rles else np.zeros(record.size, dtype=bool)
        is_free = show(torch.from_numpy(~is_taken), view).numpy()
        grid = build_image_grid(self.settings.points_per_side, view.size)
        free = find_grid_points_inside(
            cut_out(is_free, [0, 0, view.size[1], view.size[0]]), grid, _compute_scale(view.size, input_size)
        )
        if len(free) == 0:
            return Prompts()
        generator = self._open_stream(epoch, record.image_id, BACKGROUND)
        chosen = free[generator.permutation(len(free))[:count]]
        points = torch.from_numpy(scale_points(chosen, view.size, input_size).astype(np.float32))
        return Prompts(points[:, None], torch.ones(len(points), 1, dtype=torch.int64))

    def _choose_kinds(self, record: Record, epoch: int) -> PromptsConfig:
        """Return the kinds of prompts for an image's objects: all enabled kinds, or with `mix` a random one of them."""
        settings = self.settings.prompts
        enabled = [name for name in PROMPT_KINDS if getattr(settings, name)]
        if not settings.mix or len(enabled) < 2:
            return settings
        chosen = enabled[self._open_stream(epoch, record.image_id, KIND).integers(len(enabled))]
        return replace(settings, **{name: name == chosen for name in PROMPT_KINDS})

    def _count_corrections(self, record: Record, epoch: int) -> int:
        """Return how often the first masks of an image's objects are corrected."""
        settings = self.settings.prompts
        if settings.correction_clicks == 0:
            return 0
        is_corrected = self._open_stream(epoch, record.image_id, CORRECTION).random() < CORRECTED_SHARE
        return settings.correction_clicks if is_corrected else 0

    def _sample_prompts(self, kinds: PromptsConfig, shown: ShownObject, frames: "_Frames", epoch: int) -> Prompts:
        """Return S prompts for one object. Each has different points; all share one box and one mask."""
        prompts, count = Prompts(), 1
        if kinds.use_points:
            generator = self._open_stream(epoch, shown.annotation_id, POINTS)
            points, labels = self._sample_points(shown, frames, generator)
            prompts.points, prompts.labels, count = torch.from_numpy(points), torch.from_numpy(labels), len(points)
        if kinds.use_boxes:
            generator = self._open_stream(epoch, shown.annotation_id, BOX)
            prompts.boxes = torch.from_numpy(self._sample_box(shown, frames, generator)).expand(count, -1)
        if kinds.use_masks or kinds.use_logits:
            generator = self._open_stream(epoch, shown.annotation_id, MASK)
            prompts.mask_logits = torch.from_numpy(self._sample_mask(shown, frames, generator)).expand(count, 1, -1, -1)
            prompts.has_mask = torch.full((count,), kinds.use_masks)
        return prompts

    def _sample_points(
        self, shown: ShownObject, frames: "_Frames", generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return S x P x 2 points, XY, input frame, and S x P labels."""
        dataset = self.settings.dataset
        cutout = cut_out(shown.mask, shown.box)
        inside = None
        if dataset.snap_to_grid:
            scale = _compute_scale(frames.original_size, frames.input_size)
            inside = find_grid_points_inside(cutout, frames.grid, scale)
        counts = PointCounts(dataset.positive_points, dataset.negative_points, dataset.use_center, inside)
        points, labels = sample_point_sets(cutout, counts, dataset.prompts_per_object, generator)
        return scale_points(points, frames.original_size, frames.input_size).astype(np.float32), labels

    def _sample_box(self, shown: ShownObject, frames: "_Frames", generator: np.random.Generator) -> np.ndarray:
        """Return the box, XYXY, input frame; with noise where `jitters_boxes`."""
        x, y, width, height = shown.box
        corners = np.array([[x, y, x + width, y + height]], dtype=float)
        box = scale_boxes(corners, frames.original_size, frames.input_size)[0]
        box = jitter_box(box, frames.input_size, generator) if self.settings.jitters_boxes else box
        return box.astype(np.float32)

    def _sample_mask(self, shown: ShownObject, frames: "_Frames", generator: np.random.Generator) -> np.ndarray:
        """Return a coarse mask as logits of the padded square, 4g x 4g; zeros if `use_masks` is off."""
        side = self.settings.image_size // 4
        square = np.zeros((side, side), dtype=np.float32)
        if self.settings.prompts.use_masks:
            height, width = (max(1, math.ceil(length / 4)) for length in frames.input_size)
            square[:] = -MASK_LOGIT
            square[:height, :width] = coarsen_mask(shown.mask, (height, width), generator)
        return square

    def _open_stream(self, number: int, identity: int, purpose: int) -> np.random.Generator:
        """Return a random generator for an epoch's or variant's number, an image's or object's id, and a purpose."""
        # Only the low 32 bits, because ids can exceed 2^32 or be negative.
        return np.random.default_rng([self.settings.seed, number, identity & 0xFFFFFFFF, purpose])

    def _insert_previous_logits(self, prompts: Prompts, rows: list[int], epoch: int) -> Prompts:
        if not self.settings.prompts.use_logits or self.previous_logits is None:
            return prompts
        logits, is_known = self.previous_logits.read(epoch, rows)
        mask_logits = torch.where(is_known[:, None, None, None], logits, prompts.mask_logits)
        return replace(prompts, mask_logits=mask_logits, has_mask=prompts.has_mask | is_known)


@dataclass(frozen=True)
class _Frames:
    """The frames of one image in a view, for all its objects."""

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    grid: np.ndarray  # K x 2, XY, original frame: the generator's points


def _compute_scale(original_size: tuple[int, int], input_size: tuple[int, int]) -> float:
    """Return the input pixels per original pixel."""
    return max(input_size) / max(original_size)


def _make_embedding_key(record: Record, view: View) -> str:
    is_plain = view == show_all(record)[0]
    return image_key(record.digest, record.size, "" if is_plain else repr(view))


def _stack_prompts(prompts: list[Prompts]) -> Prompts:
    """Concatenate the prompts of an image's objects."""
    columns = {entry.name: [getattr(part, entry.name) for part in prompts] for entry in fields(Prompts)}
    return Prompts(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})


def collate(samples: list[Sample | Defect]) -> tuple[Batch, list[str]]:
    """Return the batch, and a message for each image that could not be read."""
    batch = Batch([sample for sample in samples if isinstance(sample, Sample)])
    return batch, [sample.message for sample in samples if isinstance(sample, Defect)]


class StepSampler:
    """The order of an epoch: batches of (epoch, position). All ranks have equally many; the last can be empty.

    The order is a pure function of (seed, epoch). If batch_size x world_size is the same, each image goes to the same
    optimizer step for any number of ranks.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.first_batch = 0  # above 0 if a run continues in the middle of this epoch

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.length / (self.batch_size * self.world_size))

    def __len__(self) -> int:
        return self.batches_per_epoch - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch, 0]).permutation(self.length)
        global_size = self.batch_size * self.world_size
        for start in range(self.first_batch * global_size, self.length, global_size):
            mine = order[start : start + global_size][self.rank :: self.world_size]
            yield [(self.epoch, int(position)) for position in mine]
