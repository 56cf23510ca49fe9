"""A step that learns from whole images and decodes no masks; its loss is the mean over images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from finestsam.batch import Batch, Sample
from finestsam.training.step import Stepper


@dataclass
class ImageStepper(Stepper):
    """The base of those that judge embeddings."""

    def count(self, batch: Batch) -> int:
        return len(batch.samples)

    def _add_gradients(self, batch: Batch, epoch: int, weight: float) -> Tensor:
        if not batch.samples:
            return torch.zeros(len(self.measures), dtype=torch.float64)
        measures = self.compute_image_losses(self.encode(batch.samples), batch.samples)
        self.fabric.backward(self.scaler.scale(measures[:, 0].sum() * weight))
        found = zip(measures.detach().cpu().double(), batch.samples, strict=True)
        return sum(self._note(sums, sample) for sums, sample in found)

    def compute_image_losses(self, embeddings: Tensor, samples: list[Sample]) -> Tensor:
        """Return the measures of samples, B x M, the first of them the loss with a gradient.

        Args:
            embeddings: B x C x g x g.
        """
        raise NotImplementedError
