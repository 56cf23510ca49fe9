"""One optimizer step: batches in, gradients of the whole step's mean loss, weights changed."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from finestsam.batch import Batch, Predictions, Prompts, Sample
from finestsam.config import CHUNK_OBJECTS, Config
from finestsam.data.previous_logits import PreviousLogits
from finestsam.masks import decode_rle
from finestsam.model.sam import FinestSam
from finestsam.prediction.clicks import add_clicks, show_preferred
from finestsam.prediction.embedder import Embedder
from finestsam.runtime.memory import is_out_of_memory
from finestsam.tasks.base import Task
from finestsam.tasks.losses import ObjectLosses
from finestsam.training.memory import OutOfMemory, describe_samples
from finestsam.training.random_state import random_state, restore_random_state
from finestsam.training.trainable import trains_encoder

# Numbers that ranks send each other in one message: few messages, and little memory beside the gradients.
BUCKET_SIZE = 25_000_000


@dataclass(frozen=True)
class StepResult:
    """What a step has done.

    Attributes:
        sums: of the task's measures over the objects, or the images where no masks are decoded, of all ranks.
        count: how many of them there were.
        is_finite: whether loss and gradient were; otherwise the weights are as before.
        wants_stop: whether any rank wants to.
        broken_images: names of the images that made loss or gradient other than finite, as far as this rank knows.
    """

    sums: dict[str, float]
    count: int
    is_finite: bool
    wants_stop: bool
    broken_images: list[str]


@dataclass
class Stepper:
    """Takes optimizer steps.

    Args:
        previous_logits: where prompts.use_logits finds the masks of the last epoch; None: not used.
        chunk_objects: prompts decoded at a time, at most; halved where the memory does not suffice.
    """

    fabric: Fabric
    task: Task
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    embedder: Embedder
    previous_logits: PreviousLogits | None = None
    chunk_objects: int = CHUNK_OBJECTS
    clip_norm: ClassVar[float] = 1.0  # largest norm of the gradient

    @property
    def config(self) -> Config:
        return self.task.config

    @property
    def model(self) -> FinestSam:
        return self.task.model

    def step(self, batches: list[Batch], epoch: int, wants_stop: bool) -> StepResult:
        """Learn from the batches as one.

        Every rank calls this with the same number of batches. The loss is the mean over the objects of all of them, on
        all ranks, so that neither accumulation nor the number of ranks changes the gradient.

        Raises:
            OutOfMemory: on every rank, where the memory of any is too small.
        """
        count, stops = self._sum_over_ranks([sum(map(self._count, batches)), float(wants_stop)]).tolist()
        if count == 0:
            return StepResult(dict.fromkeys(self.task.measures, 0.0), 0, True, stops > 0, [])
        found = self._find_gradients(batches, epoch, weight=1 / count)
        self._sum_gradients_over_ranks()
        sums = self._sum_over_ranks(found.sums.tolist())
        is_loss_finite = bool(sums.isfinite().all())
        is_finite = self._change_weights(is_loss_finite)
        broken_images = found.broken_images
        if is_loss_finite and not is_finite:  # else the rank that has the image knows it
            broken_images = [sample.file_name for batch in batches for sample in batch.samples]
        named = dict(zip(self.task.measures, sums.tolist(), strict=True))
        return StepResult(named, int(count), is_finite, stops > 0, broken_images)

    def _count(self, batch: Batch) -> int:
        """Return how many there are of what losses are averaged over: objects, or images where no masks are decoded."""
        return batch.object_count if self.task.decodes_masks else len(batch.samples)

    def _find_gradients(self, batches: list[Batch], epoch: int, weight: float) -> "_Measured":
        """Leave the gradient of this rank's share in the weights, and return what was measured.

        Where the memory of any rank does not suffice, all begin again with half as many objects at a time.
        """
        before = random_state()
        while True:
            self.optimizer.zero_grad()
            found = _Measured(torch.zeros(len(self.task.measures), dtype=torch.float64))
            problem = self._try_gradients(batches, epoch, weight, found)
            if self._sum_over_ranks([float(bool(problem))]).item() == 0:
                return found
            if self.fabric.device.type == "cuda":
                torch.cuda.empty_cache()  # what is left of the larger chunks is of no size that smaller ones ask for
            if self.chunk_objects == 1:
                raise OutOfMemory(problem)
            self.chunk_objects = (self.chunk_objects + 1) // 2
            if problem:
                print(f"warning: {problem}; from here on {self.chunk_objects} objects at a time", file=sys.stderr)
            restore_random_state(before)  # dropout leaves out the same again

    def _try_gradients(self, batches: list[Batch], epoch: int, weight: float, found: "_Measured") -> str:
        """Add gradients and measures, and return what was too large for the memory; empty: nothing was."""
        add_gradients = self._add_object_gradients if self.task.decodes_masks else self._add_image_gradients
        for batch in batches:
            try:
                add_gradients(batch, epoch, weight, found)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return f"{describe_samples(batch.samples)}: the memory of {self.fabric.device} is too small"
        return ""

    def _add_image_gradients(self, batch: Batch, epoch: int, weight: float, found: "_Measured") -> None:
        """Add the gradient of `weight` times the summed loss of a batch's images."""
        if not batch.samples:
            return
        measures = self.task.compute_image_losses(self.encode(batch.samples), batch.samples)
        self.fabric.backward(self.scaler.scale(measures[:, 0].sum() * weight))
        for sums, sample in zip(measures.detach().cpu().double(), batch.samples, strict=True):
            found.add(sums, sample)

    def _add_object_gradients(self, batch: Batch, epoch: int, weight: float, found: "_Measured") -> None:
        """Add the gradient of `weight` times the summed loss of a batch's objects, in chunks of prompts.

        The decoder's gradients are taken chunk by chunk, and after each correction of a chunk, against a copy of the
        embeddings. The last prediction is decoded from the embeddings themselves and carries what the others left on
        the copy, so that the encoder is gone through once.
        """
        samples = [sample for sample in batch.samples if len(sample)]
        if not samples:
            return
        embeddings = self.encode(samples)
        copies = embeddings.detach().requires_grad_(embeddings.requires_grad)
        chunks = list(self._list_chunks(samples))
        for chunk in chunks:
            sample, prompts = samples[chunk.number], samples[chunk.number].prompts[chunk.first : chunk.end]
            weights = torch.tensor(sample.weights[chunk.first : chunk.end], device=embeddings.device)
            shares = weights / (1 + sample.correction_clicks)
            for corrections in range(1 + sample.correction_clicks):
                is_last = chunk is chunks[-1] and corrections == sample.correction_clicks
                source = embeddings if is_last else copies
                predictions = self.model(source[chunk.number : chunk.number + 1], prompts)
                losses = self.task.compute_losses(predictions, sample, chunk.first)
                loss = (losses.total * shares).sum() * weight
                if is_last:
                    loss = loss + self._carry(embeddings, copies.grad)
                    loss = loss + self.task.sum_image_losses(embeddings, samples) * weight
                self.fabric.backward(self.scaler.scale(loss))
                if corrections == 0:
                    self._remember(epoch, sample.rows[chunk.first : chunk.end], predictions, losses)
                found.add(self._sum_measures(losses, shares), sample)
                if corrections < sample.correction_clicks:
                    prompts = self.correct(prompts, predictions, sample, chunk.first)

    def _remember(self, epoch: int, rows: list[int], predictions: Predictions, losses: ObjectLosses) -> None:
        """Keep the first predictions for the next epoch; of several of one object the last."""
        if self.previous_logits is not None:
            numbers = torch.arange(len(rows), device=losses.best.device)
            self.previous_logits.write(epoch, rows, predictions.logits[numbers, losses.best])

    def correct(self, prompts: Prompts, predictions: Predictions, sample: Sample, first: int) -> Prompts:
        """Return the prompts of the same objects with one corrective click more on each mask."""
        truth = [decode_rle(rle) for rle in sample.rles[first : first + len(prompts)]]
        return add_clicks(prompts, show_preferred(predictions, sample, self.model.image_size), truth, sample)

    def encode(self, samples: list[Sample]) -> Tensor:
        """Return the embeddings of samples, B x C x g x g, with a gradient where the encoder trains."""
        if trains_encoder(self.model):
            return self.model.encode([sample.image for sample in samples])
        return self.embedder.embed(samples)

    def _list_chunks(self, samples: list[Sample]) -> Iterator["_Chunk"]:
        for number, sample in enumerate(samples):
            for first in range(0, len(sample), self.chunk_objects):
                yield _Chunk(number, first, min(first + self.chunk_objects, len(sample)))

    def _carry(self, embeddings: Tensor, gradient: Tensor | None) -> Tensor | float:
        if gradient is None:
            return 0.0
        # The gradient on the copies is scaled already, and the sum below will be scaled once more.
        return (embeddings * (gradient / self.scaler.get_scale())).sum()

    def _sum_gradients_over_ranks(self) -> None:
        """Make every rank's gradient that of all, with zeros for weights that no rank's objects have reached.

        Only here, not while gradients are taken: a rank may have no objects, or begin again for want of memory.
        """
        trained = self._trained
        for weight in trained:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        if self.fabric.world_size == 1:
            return
        for bucket in _fill_buckets(trained):
            together = torch.cat([weight.grad.flatten() for weight in bucket])
            together = self.fabric.all_reduce(together, reduce_op="sum")
            for weight, gradient in zip(bucket, together.split([weight.numel() for weight in bucket]), strict=True):
                weight.grad.copy_(gradient.view_as(weight))

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [weight for group in self._bare_optimizer.param_groups for weight in group["params"]]

    def _change_weights(self, is_loss_finite: bool) -> bool:
        """Clip and step; leave the weights alone where loss or gradient is not finite, on every rank together."""
        self.scaler.unscale_(self._bare_optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained, self.clip_norm)
        is_finite = is_loss_finite and bool(torch.isfinite(norm))
        if is_finite:
            self.scaler.step(self._bare_optimizer)
        self.scaler.update()  # which lowers its scale after a gradient that was not finite
        return is_finite

    def _sum_measures(self, losses: ObjectLosses, shares: Tensor) -> Tensor:
        """Return the sums over objects; shares: N, of each prompt's prediction in its object."""
        columns = self.task.list_measures(losses)
        return torch.stack([(column.cpu().double() * shares.cpu().double()).sum() for column in columns])

    def _sum_over_ranks(self, values: list[float]) -> Tensor:
        # float64 on the CPU and float32 where the device has no other (mps).
        dtype = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        local = torch.tensor(values, dtype=dtype, device=self.fabric.device)
        return self.fabric.all_reduce(local, reduce_op="sum").cpu().double()


@dataclass(frozen=True)
class _Chunk:
    """Prompts of one sample that are decoded together."""

    number: int  # of the sample
    first: int
    end: int


@dataclass
class _Measured:
    """What this rank has measured in a step.

    Attributes:
        sums: of the task's measures.
    """

    sums: Tensor
    broken_images: list[str] = field(default_factory=list)

    def add(self, sums: Tensor, sample: Sample) -> None:
        """Add the sums of a sample's measures, and note the sample where they are not finite."""
        self.sums += sums
        if not sums.isfinite().all() and sample.file_name not in self.broken_images:
            self.broken_images.append(sample.file_name)


def _fill_buckets(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield weights in their order, together until they are enough for one message between the ranks."""
    bucket, size = [], 0
    for weight in weights:
        bucket.append(weight)
        size += weight.numel()
        if size >= BUCKET_SIZE:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
