"""Images with their objects and prompts, and the order in which training sees them.

A sample is a pure function of (seed, epoch, image): worker processes, their number and a restart change nothing.
"""

import math
from collections.abc import Iterator
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
from finestsam.data.cells import CELL_PIXELS, label_cells, sort_by_area
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
from finestsam.data.semantic import ClassTable, render_label_cells
from finestsam.errors import Defect
from finestsam.images.files import read_image
from finestsam.images.frames import compute_input_size, resize_image, scale_boxes, scale_points
from finestsam.masks import decode_rle, join_rles
from finestsam.model.embeddings import EmbeddingStore, image_key
from finestsam.records import Annotation, Record

# What a random stream is for, the end of its seed: drawing one never changes another. None is 0, which at the end of a
# seed counts for nothing in numpy.
CHOICE, VARIANT, POINTS, BOX, MASK, KIND, BACKGROUND, CORRECTION = range(1, 9)
PROMPT_KINDS = ("use_points", "use_boxes", "use_masks")


@dataclass(frozen=True)
class SampleSettings:
    """What a sample depends on besides its image."""

    image_size: int  # pixels of the longest side
    points_per_side: int  # of the generator's grid
    seed: int
    prompts: PromptsConfig
    dataset: DatasetConfig
    max_objects: int = 0  # a random choice where an image has more; 0: all
    augment: AugmentConfig = AugmentConfig()
    wants_cells: bool = False  # which object each cell of the decoder's grid belongs to
    classes: ClassTable | None = None  # a class for each of those cells is all that is needed; None: objects are
    categories: ClassTable | None = None  # of objects, which come with their classes; None: they do not


class SampleDataset(Dataset):
    """Samples by (epoch, position of the image).

    Args:
        records: images, each with at least one object.
        previous_logits: what the model predicted an epoch ago, as mask prompts; None: not used.
        store: where the embeddings of images may be, whose pixels are then not read; None: not used.
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
        """Return the sample, or the defect of an image that broke since the dataset was checked."""
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
        side = self.settings.image_size // CELL_PIXELS
        if self.settings.classes is not None:
            classes = render_label_cells(record, self.settings.classes, view, input_size, side)
            return Sample(
                record.image_id, record.file_name, view.size, input_size, pixels, Prompts(),
                variant=variant, embedding=embedding, classes=classes,
            )  # fmt: skip
        cells = None
        if self.settings.wants_cells or self.settings.categories:
            cells = label_cells(record, view, input_size, side)
        background = self._sample_background(record, view, input_size, epoch)
        indices = self._choose_objects(record, indices, epoch)
        wanted = self._choose_kind(record, epoch)
        frames = _Frames(view.size, input_size, build_image_grid(self.settings.points_per_side, view.size))
        rles, prompts, counts = [], [], []
        for index in indices:
            shown = show_object(record, record.annotations[index], view)
            prompts.append(self._sample_prompts(wanted, shown, frames, epoch))
            counts.append(len(prompts[-1]))
            rles += [shown.rle] * counts[-1]
        indices = np.repeat(indices, counts)
        rows = (self.first_rows[position] + indices).tolist()
        return Sample(
            image_id=record.image_id,
            file_name=record.file_name,
            original_size=view.size,
            input_size=input_size,
            image=pixels,
            prompts=self._insert_previous_logits(_stack_prompts(prompts), rows, epoch),
            rles=rles,
            annotation_ids=[record.annotations[index].id for index in indices],
            rows=rows,
            correction_clicks=self._count_corrections(record, epoch),
            variant=variant,
            embedding=embedding,
            background=background,
            cells=cells,
            object_classes=self._list_classes([record.annotations[index] for index in indices]),
            cell_classes=self._list_classes(sort_by_area(record.annotations)),
        )

    def _list_classes(self, annotations: list[Annotation]) -> list[int]:
        table = self.settings.categories
        return [table.by_category[annotation.category_id] for annotation in annotations] if table else []

    def read_pixels(self, position: int, variant: int) -> Tensor:
        """Return an image's variant as the encoder sees it before the padding, 3 x h x w, uint8.

        Raises:
            Defect: the image broke since it was checked.
        """
        record = self.records[position]
        view, _ = self._choose_view(record, variant)
        image = show_image(read_image(record.path, record.size, self.settings.dataset.images), view)
        pixels = torch.from_numpy(resize_image(image, self._compute_input_size(view)).copy()).permute(2, 0, 1)
        return recolour(pixels.contiguous(), view)

    def list_embedding_keys(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the store's key of every image's every variant, and its (position, variant)."""
        augment = self.settings.augment
        variants = range(1, augment.variants + 1) if augment.is_active else (0,)
        for position, record in enumerate(self.records):
            for variant in variants:
                view, _ = self._choose_view(record, variant)
                yield _embedding_key(record, view), (position, variant)

    def _read_embedding(self, record: Record, view: View) -> Tensor | None:
        stored = self.store.read(_embedding_key(record, view)) if self.store else None
        return None if stored is None else torch.from_numpy(np.array(stored))

    def _compute_input_size(self, view: View) -> tuple[int, int]:
        return compute_input_size(view.size, view.compute_input_side(self.settings.image_size))

    def _choose_view(self, record: Record, variant: int) -> tuple[View, np.ndarray]:
        """Return how the image is shown, and the indices of the objects that can be seen; the same in each epoch."""
        if variant == 0:
            return show_all(record)
        settings = self.settings
        generator = self._open_stream(variant, record.image_id, VARIANT)
        return choose_view(record, settings.augment, settings.image_size, settings.dataset.min_area_pixels, generator)

    def _choose_objects(self, record: Record, indices: np.ndarray, epoch: int) -> np.ndarray:
        limit = self.settings.max_objects
        if limit == 0 or len(indices) <= limit:
            return indices
        generator = self._open_stream(epoch, record.image_id, CHOICE)
        return np.sort(generator.choice(indices, size=limit, replace=False))

    def _sample_background(self, record: Record, view: View, input_size: tuple[int, int], epoch: int) -> Prompts:
        """Return points of the grid that lie in no object and no crowd region, at most as many as the settings say."""
        count = self.settings.dataset.background_points
        if count == 0:
            return Prompts()
        # All of them: of an object that the view cuts too short to be prompted for, the rest is no background.
        rles = [record.rle(annotation) for annotation in record.annotations]
        rles += [{"size": list(record.size), "counts": counts} for counts in record.crowds]
        is_taken = decode_rle(join_rles(rles)) if rles else np.zeros(record.size, dtype=bool)
        is_free = show(torch.from_numpy(~is_taken), view).numpy()
        grid = build_image_grid(self.settings.points_per_side, view.size)
        free = find_grid_points_inside(
            cut_out(is_free, [0, 0, view.size[1], view.size[0]]), grid, _scale_of(view.size, input_size)
        )
        if len(free) == 0:
            return Prompts()
        generator = self._open_stream(epoch, record.image_id, BACKGROUND)
        chosen = free[generator.permutation(len(free))[:count]]
        points = torch.from_numpy(scale_points(chosen, view.size, input_size).astype(np.float32))
        return Prompts(points[:, None], torch.ones(len(points), 1, dtype=torch.int64))

    def _choose_kind(self, record: Record, epoch: int) -> PromptsConfig:
        """Return the kinds of prompts for an image's objects: all that are turned on, or one of them."""
        wanted = self.settings.prompts
        kinds = [name for name in PROMPT_KINDS if getattr(wanted, name)]
        if not wanted.mix or len(kinds) < 2:
            return wanted
        chosen = kinds[self._open_stream(epoch, record.image_id, KIND).integers(len(kinds))]
        return replace(wanted, **{name: name == chosen for name in PROMPT_KINDS})

    def _count_corrections(self, record: Record, epoch: int) -> int:
        """Return how often the first masks of an image's objects are corrected."""
        wanted = self.settings.prompts
        if wanted.correction_clicks == 0:
            return 0
        is_corrected = self._open_stream(epoch, record.image_id, CORRECTION).random() < wanted.correction_share
        return wanted.correction_clicks if is_corrected else 0

    def _sample_prompts(self, wanted: PromptsConfig, shown: ShownObject, frames: "_Frames", epoch: int) -> Prompts:
        """Return S prompts for one object, with other points each, and one box and one mask for all."""
        prompts, count = Prompts(), 1
        if wanted.use_points:
            generator = self._open_stream(epoch, shown.annotation_id, POINTS)
            points, labels = self._sample_points(shown, frames, generator)
            prompts.points, prompts.labels, count = torch.from_numpy(points), torch.from_numpy(labels), len(points)
        if wanted.use_boxes:
            generator = self._open_stream(epoch, shown.annotation_id, BOX)
            prompts.boxes = torch.from_numpy(self._sample_box(shown, frames, generator)).expand(count, -1)
        if wanted.use_masks or wanted.use_logits:
            generator = self._open_stream(epoch, shown.annotation_id, MASK)
            prompts.mask_logits = torch.from_numpy(self._sample_mask(shown, frames, generator)).expand(count, 1, -1, -1)
            prompts.has_mask = torch.full((count,), wanted.use_masks)
        return prompts

    def _sample_points(
        self, shown: ShownObject, frames: "_Frames", generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return S x P x 2 points, XY, input frame, and S x P labels."""
        dataset = self.settings.dataset
        found = cut_out(shown.mask, shown.box)
        inside = None
        if dataset.snap_to_grid:
            inside = find_grid_points_inside(found, frames.grid, _scale_of(frames.original_size, frames.input_size))
        counts = PointCounts(dataset.positive_points, dataset.negative_points, dataset.use_center, inside)
        points, labels = sample_point_sets(found, counts, dataset.prompts_per_object, generator)
        return scale_points(points, frames.original_size, frames.input_size).astype(np.float32), labels

    def _sample_box(self, shown: ShownObject, frames: "_Frames", generator: np.random.Generator) -> np.ndarray:
        """Return the box with its noise, XYXY, input frame."""
        wanted = self.settings.prompts
        x, y, width, height = shown.box
        corners = np.array([[x, y, x + width, y + height]], dtype=float)
        box = scale_boxes(corners, frames.original_size, frames.input_size)[0]
        box = jitter_box(box, frames.input_size, wanted.box_jitter_ratio, wanted.box_jitter_max_pixels, generator)
        return box.astype(np.float32)

    def _sample_mask(self, shown: ShownObject, frames: "_Frames", generator: np.random.Generator) -> np.ndarray:
        """Return a coarse mask as logits of the padded square, 4g x 4g; zeros where only its place is needed."""
        side = self.settings.image_size // 4
        square = np.zeros((side, side), dtype=np.float32)
        if self.settings.prompts.use_masks:
            height, width = (max(1, math.ceil(length / 4)) for length in frames.input_size)
            square[:] = -MASK_LOGIT
            square[:height, :width] = coarsen_mask(shown.mask, (height, width), generator)
        return square

    def _open_stream(self, number: int, identity: int, purpose: int) -> np.random.Generator:
        """Return the generator for one purpose, an image's or object's id, and the number of an epoch or variant."""
        # The low 32 bits: ids can pass 2^32, and can be negative.
        return np.random.default_rng([self.settings.seed, number, identity & 0xFFFFFFFF, purpose])

    def _insert_previous_logits(self, prompts: Prompts, rows: list[int], epoch: int) -> Prompts:
        if not self.settings.prompts.use_logits or self.previous_logits is None:
            return prompts
        logits, is_known = self.previous_logits.read(epoch, rows)
        mask_logits = torch.where(is_known[:, None, None, None], logits, prompts.mask_logits)
        return replace(prompts, mask_logits=mask_logits, has_mask=prompts.has_mask | is_known)


@dataclass(frozen=True)
class _Frames:
    """What the objects of a shown image have in common."""

    original_size: tuple[int, int]
    input_size: tuple[int, int]
    grid: np.ndarray  # K x 2, XY, original frame: the generator's points


def _scale_of(original_size: tuple[int, int], input_size: tuple[int, int]) -> float:
    """Return the input pixels per original pixel."""
    return max(input_size) / max(original_size)


def _embedding_key(record: Record, view: View) -> str:
    is_plain = view == show_all(record)[0]
    return image_key(record.digest, record.size, "" if is_plain else repr(view))


def _stack_prompts(prompts: list[Prompts]) -> Prompts:
    """Join the prompts of objects to those of an image."""
    columns = {entry.name: [getattr(one, entry.name) for one in prompts] for entry in fields(Prompts)}
    return Prompts(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})


def collate(samples: list[Sample | Defect]) -> tuple[Batch, list[str]]:
    """Return the batch, and what is to be said about images that could not be read."""
    batch = Batch([sample for sample in samples if isinstance(sample, Sample)])
    return batch, [sample.message for sample in samples if isinstance(sample, Defect)]


class StepSampler:
    """The order of an epoch: batches of (epoch, position), the same number on every rank, the last ones maybe empty.

    A pure function of (seed, epoch): the image at place p of the shuffled epoch goes to the same optimizer step
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
