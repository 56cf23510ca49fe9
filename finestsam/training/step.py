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
from finestsam.training.log import COLUMNS, TRAINING_COLUMNS
from finestsam.training.losses import ObjectLosses, object_losses
from finestsam.training.memory import OutOfMemory, describe_samples
from finestsam.training.random_state import random_state, restore_random_state
from finestsam.training.trainable import trains_encoder

# Numbers that ranks send each other in one message: few messages, and little memory beside the gradients.
BUCKET_SIZE = 25_000_000


@dataclass
class Stepper:
    """Everything that a step needs and keeps.

    Args:
        previous_logits: where prompts.use_logits finds an epoch's answers; None: not used.
        chunk_objects: prompts decoded at a time, at most; halved where the memory does not suffice.

    Attributes:
        nonfinite_images: names of the images whose loss or gradient in the newest step is not finite, of this rank.
        measures: what is summed over objects, in this order; the losses with their weights, so that they add up to the
            total.
        columns: of metrics.csv.
        default_metrics: what the best weights are chosen by where the settings leave it open, by dataset.labels.
        metric: what judges them where that is not measured.
    """

    measures: ClassVar[tuple[str, ...]] = TRAINING_COLUMNS
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    default_metrics: ClassVar[dict[str, str]] = {"complete": "val_generator_f1", "partial": "val_generator_ar_100"}
    metric: ClassVar[str] = "val_per_mask_iou"
    clip_norm: ClassVar[float] = 1.0  # largest norm of the gradient

    fabric: Fabric
    config: Config
    model: FinestSam
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    embedder: Embedder
    previous_logits: PreviousLogits | None = None
    chunk_objects: int = CHUNK_OBJECTS
    nonfinite_images: list[str] = field(default_factory=list)

    @classmethod
    def build_training_head(cls, model: FinestSam) -> nn.Module | None:
        """Return a head that only training has; the samples then carry `cells`. None, as here: training has none."""
        return None

    def step(self, batches: list[Batch], epoch: int, wants_stop: bool) -> tuple[dict[str, float], int, bool, bool]:
        """Learn from the batches as one.

        Every rank calls this with the same number of batches. The loss is the mean over the objects of all of them, on
        all ranks, so that neither accumulation nor the number of ranks changes the gradient.

        Returns:
            Sums of `measures` over the objects, their number, whether the weights were changed (not where the loss or
            the gradient is not finite), and whether any rank wants to stop.

        Raises:
            OutOfMemory: on every rank, where the memory of any is too small.
        """
        count, stops = self._sum_over_ranks([sum(map(self.count, batches)), float(wants_stop)]).tolist()
        if count == 0:
            return dict.fromkeys(self.measures, 0.0), 0, True, stops > 0
        sums = self._find_gradients(batches, epoch, weight=1 / count)
        self._sum_gradients_over_ranks()
        sums = self._sum_over_ranks(sums.tolist())
        is_loss_finite = bool(sums.isfinite().all())
        is_finite = self._change_weights(is_loss_finite)
        if is_loss_finite and not is_finite:  # else the rank that has the image knows it
            self.nonfinite_images = [sample.file_name for batch in batches for sample in batch.samples]
        return dict(zip(self.measures, sums.tolist(), strict=True)), int(count), is_finite, stops > 0

    def count(self, batch: Batch) -> int:
        """Return how many objects a batch has, over which losses are averaged."""
        return batch.object_count

    def _find_gradients(self, batches: list[Batch], epoch: int, weight: float) -> Tensor:
        """Leave the gradient of this rank's share in the weights, and return its sums of `measures`.

        Where the memory of any rank does not suffice, all begin again with half as many objects at a time.
        """
        drawn = random_state()
        while True:
            self.optimizer.zero_grad()
            self.nonfinite_images = []
            sums, problem = self._try_gradients(batches, epoch, weight)
            if self._sum_over_ranks([float(bool(problem))]).item() == 0:
                return sums
            if self.fabric.device.type == "cuda":
                torch.cuda.empty_cache()  # what is left of the larger chunks is of no size that smaller ones ask for
            if self.chunk_objects == 1:
                raise OutOfMemory(problem)
            self.chunk_objects = (self.chunk_objects + 1) // 2
            if problem:
                print(f"warning: {problem}; from here on {self.chunk_objects} objects at a time", file=sys.stderr)
            restore_random_state(drawn)  # dropout leaves out the same again

    def _try_gradients(self, batches: list[Batch], epoch: int, weight: float) -> tuple[Tensor, str]:
        """Add gradients, and return sums of `measures` and what was too large for the memory, if anything was."""
        sums = torch.zeros(len(self.measures), dtype=torch.float64)
        for batch in batches:
            try:
                sums += self._add_gradients(batch, epoch, weight)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                return sums, f"{describe_samples(batch.samples)}: the memory of {self.fabric.device} is too small"
        return sums, ""

    def _add_gradients(self, batch: Batch, epoch: int, weight: float) -> Tensor:
        """Add the gradient of `weight` times the batch's summed loss, in chunks of prompts.

        The decoder's gradients are taken chunk by chunk, and answer by answer where a chunk is corrected, against a
        copy of the embeddings. The last answer is decoded from the embeddings themselves and carries what the others
        left on the copy, so that the encoder is gone through once.
        """
        sums = torch.zeros(len(self.measures), dtype=torch.float64)
        samples = [sample for sample in batch.samples if len(sample)]
        if not samples:
            return sums
        embeddings = self.encode(samples)
        copies = embeddings.detach().requires_grad_(embeddings.requires_grad)
        chunks = list(self._list_chunks([len(sample) for sample in samples]))
        for number, (place, first, end) in enumerate(chunks):
            sample = samples[place]
            prompts = sample.prompts[first:end]
            shares = torch.tensor(sample.weights[first:end], device=embeddings.device) / (1 + sample.correction_clicks)
            for corrections in range(1 + sample.correction_clicks):
                is_final = number == len(chunks) - 1 and corrections == sample.correction_clicks
                source = embeddings if is_final else copies
                predictions = self.model(source[place : place + 1], prompts)
                losses = self.take_losses(predictions, sample, first)
                loss = (losses.total * shares).sum() * weight
                if is_final:
                    loss = loss + self._carry(embeddings, copies.grad)
                    loss = loss + self.take_auxiliary_loss(embeddings, samples) * weight
                    loss = loss + self._background_loss(embeddings, samples) * weight
                self.fabric.backward(self.scaler.scale(loss))
                if corrections == 0:
                    self._remember(epoch, sample.rows[first:end], predictions, losses)
                sums += self._note(self._sum_measures(losses, shares), sample)
                if corrections < sample.correction_clicks:
                    prompts = self.correct(prompts, predictions, sample, first)
        return sums

    def take_losses(self, predictions: Predictions, sample: Sample, first: int) -> ObjectLosses:
        """Return the losses of what was answered for the objects `first`, `first` + 1, ... of a sample."""
        return object_losses(predictions, sample, first, self.config.losses, self.model.image_size)

    def _remember(self, epoch: int, rows: list[int], predictions: Predictions, losses: ObjectLosses) -> None:
        """Keep the first answers for the next epoch; of several on one object the last."""
        if self.previous_logits is not None:
            indices = torch.arange(len(rows), device=losses.best.device)
            self.previous_logits.write(epoch, rows, predictions.logits[indices, losses.best])

    def correct(self, prompts: Prompts, predictions: Predictions, sample: Sample, first: int) -> Prompts:
        """Return what the same objects are asked for with after a corrective click on each answer."""
        truth = [decode_rle(rle) for rle in sample.rles[first : first + len(prompts)]]
        return add_clicks(prompts, show_preferred(predictions, sample, self.model.image_size), truth, sample)

    def encode(self, samples: list[Sample]) -> Tensor:
        """Return the embeddings of samples, B x C x g x g, with a gradient where the encoder trains."""
        if trains_encoder(self.model):
            return self.model.encode([sample.image for sample in samples])
        return self.embedder.embed(samples)

    def _list_chunks(self, counts: list[int]) -> Iterator[tuple[int, int, int]]:
        size = self.chunk_objects
        for place, count in enumerate(counts):
            for first in range(0, count, size):
                yield place, first, min(first + size, count)

    def _carry(self, embeddings: Tensor, gradient: Tensor | None) -> Tensor | float:
        if gradient is None:
            return 0.0
        # The gradient on the copies is scaled already, and the sum below will be scaled once more.
        return (embeddings * (gradient / self.scaler.get_scale())).sum()

    def take_auxiliary_loss(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        """Return what `build_training_head` teaches beside the masks: its loss, summed over objects; here nothing."""
        return 0.0

    def _background_loss(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        """Return the losses of masks where no object is, an image's mean counted once for each of its objects.

        So that they weigh as much beside the losses of objects however many objects an image has.
        """
        total = 0.0
        for place, sample in enumerate(samples):
            if len(sample.background):
                total = (
                    total + self.compute_background_loss(embeddings[place : place + 1], sample) * sample.object_count
                )
        return total

    def compute_background_loss(self, embedding: Tensor, sample: Sample) -> Tensor:
        """Return the loss of the masks that an image's background points are answered with: their squared scores."""
        return self.config.losses.iou_ratio * self.model.score(embedding, sample.background).square().mean()

    def _note(self, sums: Tensor, sample: Sample) -> Tensor:
        """Return the sums of a sample's measures; where they are not finite the sample is suspected."""
        if not sums.isfinite().all() and sample.file_name not in self.nonfinite_images:
            self.nonfinite_images.append(sample.file_name)
        return sums

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
        """Return the sums over objects; shares: N, of each prompt's answer in its object."""
        columns = self.list_measures(losses)
        return torch.stack([(column.cpu().double() * shares.cpu().double()).sum() for column in columns])

    def list_measures(self, losses: ObjectLosses) -> tuple[Tensor, ...]:
        """Return the columns of `measures`, each N."""
        weights = self.config.losses
        return (
            losses.total.detach(),
            weights.focal_ratio * losses.focal,
            weights.dice_ratio * losses.dice,
            weights.iou_ratio * losses.iou_error,
            losses.iou,
            losses.score.clamp(max=1),  # no IoU is above 1
        )

    def _sum_over_ranks(self, values: list[float]) -> Tensor:
        # float64 on the CPU and float32 where the device has no other (mps).
        dtype = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        local = torch.tensor(values, dtype=dtype, device=self.fabric.device)
        return self.fabric.all_reduce(local, reduce_op="sum").cpu().double()


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
