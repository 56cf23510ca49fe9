"""One optimizer step: batches in, gradients of the whole step's mean loss, weights changed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from finestsam.batch import Batch, Predictions, Prompts, Sample
from finestsam.config import CHUNK_OBJECTS, Config
from finestsam.data.previous_logits import PreviousLogits
from finestsam.masks import decode_rle
from finestsam.model.sam import FinestSam
from finestsam.prediction.correction import add_clicks, show_preferred
from finestsam.prediction.precompute import Embedder
from finestsam.training.affinity import affinity_loss
from finestsam.training.log import COLUMNS, TRAINING_COLUMNS
from finestsam.training.losses import ObjectLosses, object_losses
from finestsam.training.trainable import trains_encoder


@dataclass
class Stepper:
    """Everything that a step needs and keeps.

    Args:
        wrapped: the model as Fabric's strategy wraps it; `model` is the same one bare.
        previous_logits: where prompts.use_logits finds an epoch's answers; None: not used.
        chunk_objects: prompts decoded at a time, at most.

    Attributes:
        measures: what is summed over objects, in this order; the losses with their weights, so that they add up to the
            total.
        columns: of metrics.csv.
        default_metric: what judges weights where the settings leave it open.
        metric: what judges them where that is not measured.
    """

    measures: ClassVar[tuple[str, ...]] = TRAINING_COLUMNS
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    default_metric: ClassVar[str] = "val_generator_ar_100"
    metric: ClassVar[str] = "val_per_mask_iou"

    fabric: Fabric
    config: Config
    model: FinestSam
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    embedder: Embedder
    previous_logits: PreviousLogits | None = None
    chunk_objects: int = CHUNK_OBJECTS

    def step(self, batches: list[Batch], epoch: int, wants_stop: bool) -> tuple[dict[str, float], int, bool, bool]:
        """Learn from the batches as one.

        Every rank calls this with the same number of batches. The loss is the mean over the objects of all of them, on
        all ranks, so that neither accumulation nor the number of ranks changes the gradient.

        Returns:
            Sums of `measures` over the objects, their number, whether the weights were changed (not where the gradient
            is not finite), and whether any rank wants to stop.
        """
        count, stops = self._sum_over_ranks([sum(map(self.count, batches)), float(wants_stop)]).tolist()
        sums = torch.zeros(len(self.measures), dtype=torch.float64)
        if count == 0:
            return dict(zip(self.measures, sums.tolist(), strict=True)), 0, True, stops > 0
        self.optimizer.zero_grad()
        # The strategy averages gradients over ranks; the mean wanted is over objects.
        weight = self.fabric.world_size / count
        for place, batch in enumerate(batches):
            sums += self._add_gradients(batch, epoch, weight, is_last=place == len(batches) - 1)
        is_finite = self._change_weights()
        sums = self._sum_over_ranks(sums.tolist())
        return dict(zip(self.measures, sums.tolist(), strict=True)), int(count), is_finite, stops > 0

    def count(self, batch: Batch) -> int:
        """Return how many objects a batch has, over which losses are averaged."""
        return batch.object_count

    def _add_gradients(self, batch: Batch, epoch: int, weight: float, is_last: bool) -> Tensor:
        """Add the gradient of `weight` times the batch's summed loss, in chunks of prompts.

        The decoder's gradients are taken chunk by chunk, and answer by answer where a chunk is corrected, against a
        copy of the embeddings. The last answer is decoded from the embeddings themselves and carries what the others
        left on the copy, so that the encoder is gone through once, and the strategy synchronises once.
        """
        sums = torch.zeros(len(self.measures), dtype=torch.float64)
        samples = [sample for sample in batch.samples if len(sample)]
        if not samples:
            self._join_without_objects(is_last)
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
                with self.fabric.no_backward_sync(self.wrapped, enabled=not (is_last and is_final)):
                    source = embeddings if is_final else copies
                    predictions = self.wrapped(source[place : place + 1], prompts)
                    losses = self.take_losses(predictions, sample, first)
                    loss = (losses.total * shares).sum() * weight
                    if is_final:
                        loss = loss + self._carry(embeddings, copies.grad) + self._connect_all(is_last)
                        loss = loss + self._affinity_loss(embeddings, samples) * weight
                        loss = loss + self._background_loss(embeddings, samples) * weight
                    self.fabric.backward(self.scaler.scale(loss))
                if corrections == 0:
                    self._remember(epoch, sample.rows[first:end], predictions, losses)
                sums += self._sum_measures(losses, shares)
                if corrections < sample.correction_clicks:
                    prompts = self.correct(prompts, predictions, sample, first)
        return sums

    def take_losses(self, predictions: Predictions, sample: Sample, first: int) -> ObjectLosses:
        """Return the losses of what was answered for the objects `first`, `first` + 1, ... of a sample."""
        return object_losses(predictions, sample, first, self.config.losses, self.model.image_size)

    def _remember(self, epoch: int, rows: list[int], predictions: Predictions, losses: ObjectLosses) -> None:
        """Keep the first answers for the next epoch; of several on one object the last."""
        if self.previous_logits is not None:
            places = torch.arange(len(rows), device=losses.best.device)
            self.previous_logits.write(epoch, rows, predictions.logits[places, losses.best])

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

    def _affinity_loss(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        """Return the sum over objects, each with the loss of its picture."""
        if self.model.affinity_head is None:
            return 0.0
        labels = torch.stack([sample.cells for sample in samples])
        counts = torch.tensor([sample.object_count for sample in samples], device=labels.device)
        losses = affinity_loss(self.model.affinity_head(embeddings), labels)
        return self.config.losses.affinity_ratio * (losses * counts).sum()

    def _background_loss(self, embeddings: Tensor, samples: list[Sample]) -> Tensor | float:
        """Return the losses of masks where no object is, a picture's mean counted once for each of its objects.

        So that they weigh as much beside the losses of objects however many objects a picture has.
        """
        total = 0.0
        for place, sample in enumerate(samples):
            if len(sample.background):
                total = total + self.judge_background(embeddings[place : place + 1], sample) * sample.object_count
        return total

    def judge_background(self, embedding: Tensor, sample: Sample) -> Tensor:
        """Return the loss of the masks that a picture's background points are answered with: their squared scores."""
        return self.config.losses.iou_ratio * self.model.score(embedding, sample.background).square().mean()

    def _connect_all(self, is_last: bool) -> Tensor | float:
        """Return zero, by way of every weight that trains: several ranks wait for a gradient from each of them."""
        if not is_last or self.fabric.world_size == 1:
            return 0.0
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return sum((weight.flatten()[:1].sum() * 0 for weight in trained), torch.zeros((), device=self.model.device))

    def _join_without_objects(self, is_last: bool) -> None:
        if is_last and self.fabric.world_size > 1:
            self.wrapped(None, Prompts())
            self.fabric.backward(self._connect_all(is_last))

    def _change_weights(self) -> bool:
        """Clip and step; leave the weights alone where the gradient is not finite, on every rank together."""
        raw_optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        trained = [weight for group in raw_optimizer.param_groups for weight in group["params"]]
        for weight in trained:
            if weight.grad is None:  # out of reach in this step; several ranks would have given it a zero
                weight.grad = torch.zeros_like(weight)
        self.scaler.unscale_(raw_optimizer)
        limit = self.config.opt.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(trained, limit)
        is_finite = bool(torch.isfinite(norm))
        if is_finite or self.scaler.is_enabled():  # the scaler skips by itself, and lowers its scale
            self.scaler.step(raw_optimizer)
            self.scaler.update()
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
            losses.score,
        )

    def _sum_over_ranks(self, values: list[float]) -> Tensor:
        # float64 on the CPU and float32 where the device has no other (mps).
        dtype = torch.float32 if self.fabric.device.type == "mps" else torch.float64
        local = torch.tensor(values, dtype=dtype, device=self.fabric.device)
        return self.fabric.all_reduce(local, reduce_op="sum").cpu().double()
