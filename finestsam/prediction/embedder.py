"""Encode each image once: read its embedding from the store, or compute and store it."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from finestsam.batch import Sample
from finestsam.config import StoreConfig
from finestsam.data.dataset import SampleDataset
from finestsam.data.loaders import Loader
from finestsam.errors import Defect
from finestsam.images.frames import compute_input_size, resize_image
from finestsam.model.embeddings import GIGABYTE, EmbeddingStore
from finestsam.model.sam import FinestSam
from finestsam.runtime.folders import cache_folder
from finestsam.runtime.processes import use_one_thread

# Increase it when the same weights give another embedding of the same file: reading, resizing or normalising changed.
VERSION = 2


@dataclass
class Embedder:
    """An image encoder and the store of its embeddings.

    Args:
        store: None: every image is encoded each time.
        rounds: round embeddings to float16 without a store as well, so that training without a store measures the same
            as evaluation with one.
    """

    model: FinestSam
    store: EmbeddingStore | None = None
    rounds: bool = False

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of images (each 3 x h x w, uint8), B x C x g x g, float32.

        With a store they are rounded to float16, so that computed and stored embeddings are equal.
        """
        size = _batch_size(self.model.device)
        parts = [self.model.encode(list(images[start : start + size])) for start in range(0, len(images), size)]
        embeddings = torch.cat(parts)
        return embeddings.half().float() if self.store or self.rounds else embeddings

    def embed(self, samples: Sequence[Sample]) -> Tensor:
        """Return the embeddings of samples, B x C x g x g, float32; those without one are encoded."""
        missing = [sample.image for sample in samples if sample.embedding is None]
        fresh = iter(self.encode(missing)) if missing else iter(())
        device = self.model.device
        return torch.stack([next(fresh) if s.embedding is None else s.embedding.to(device).float() for s in samples])

    def embed_image(self, key: str, image: np.ndarray) -> Tensor:
        """Return the embedding of an image as it was read (H x W x 3, uint8), 1 x C x g x g, and store it."""
        input_size = compute_input_size(image.shape[:2], self.model.image_size)
        return self.embed_by_key(key, lambda: torch.from_numpy(resize_image(image, input_size).copy()).permute(2, 0, 1))

    def embed_by_key(self, key: str, read_pixels: Callable[[], Tensor]) -> Tensor:
        """Return the embedding of one image, 1 x C x g x g, and store it.

        Args:
            key: of the store, from `image_key`.
            read_pixels: returns the image, 3 x h x w, uint8, input frame; called where the store lacks it.
        """
        stored = self.store.read(key) if self.store else None
        if stored is not None:
            return torch.from_numpy(np.array(stored)).to(self.model.device).float()[None]
        embedding = self.encode([read_pixels().to(self.model.device)])
        if self.store and self.store.make_room([key]):
            self.store.write(key, embedding[0].cpu().numpy())
        return embedding


def open_store(settings: StoreConfig, model: FinestSam) -> EmbeddingStore | None:
    """Return the store of this model's encoder, or None where the settings want none."""
    if settings.max_gigabytes == 0:
        return None
    folder = Path(settings.folder) if settings.folder else cache_folder() / "embeddings"
    side = model.image_size // 16
    shape = (model.sam.prompt_encoder.embed_dim, side, side)
    return EmbeddingStore(folder, hash_encoder(model), shape, int(settings.max_gigabytes * GIGABYTE))


def open_embedder(settings: StoreConfig, model: FinestSam) -> Embedder:
    """Return the model's encoder with its store."""
    return Embedder(model, open_store(settings, model))


def hash_encoder(model: FinestSam) -> str:
    """Return a hash of everything that an embedding depends on besides the image."""
    digest = hashlib.blake2b(f"{VERSION} {model.image_size} {model.encoder_dtype}".encode(), digest_size=16)
    for values in (model.sam.pixel_mean, model.sam.pixel_std):
        digest.update(str(values.flatten().tolist()).encode())
    for name, values in sorted(model.sam.image_encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_weights(embedder: Embedder) -> str:
    """Return a hash of everything that masks depend on besides the image and the generator's settings."""
    model = embedder.model
    key = embedder.store.encoder_key if embedder.store else hash_encoder(model)
    digest = hashlib.blake2b(f"{key} {model.multimask_output}".encode(), digest_size=16)
    weights = model.sam.state_dict()
    for name, head in model.heads.items():
        weights |= head.state_dict(prefix=f"{name}.")
    for name, values in sorted(weights.items()):
        if not name.startswith("image_encoder."):
            digest.update(name.encode())
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fill_store(embedder: Embedder, datasets: Sequence[SampleDataset], num_workers: int) -> tuple[int, int]:
    """Encode the images that the store lacks.

    Returns:
        How many of the datasets' images are in the store now, and how many there are.
    """
    encode_missing(embedder, datasets, find_missing(embedder.store, datasets), num_workers)
    wanted = _list_wanted(datasets)
    return sum(embedder.store.holds(key) for key in wanted), len(wanted)


def _list_wanted(datasets: Sequence[SampleDataset]) -> dict[str, tuple[SampleDataset, tuple[int, int]]]:
    """Return the dataset and the position in it of each image that can be stored, by key."""
    return {key: (dataset, position) for dataset in datasets for key, position in dataset.list_embedding_keys()}


def find_missing(store: EmbeddingStore, datasets: Sequence[SampleDataset]) -> list[str]:
    """Make room in the store, and return the keys of the missing images that fit."""
    wanted = _list_wanted(datasets)
    room = store.make_room(wanted)
    missing = [key for key in wanted if not store.holds(key)]
    if len(missing) > room and store.is_writable:
        left_out = len(missing) - room
        print(f"embeddings: no room for {left_out} of {len(wanted)} images (store.max_gigabytes, or the disk)")
    return missing[:room]


def encode_missing(
    embedder: Embedder, datasets: Sequence[SampleDataset], keys: Sequence[str], num_workers: int, is_quiet: bool = False
) -> None:
    """Encode images of the datasets, given by their keys, and store their embeddings.

    Args:
        is_quiet: without a progress bar.
    """
    wanted = _list_wanted(datasets)
    images = _Images([(key, *wanted[key]) for key in keys])
    _encode_all(embedder, images, num_workers, is_quiet=is_quiet or not sys.stderr.isatty())


def _encode_all(embedder: Embedder, images: "_Images", num_workers: int, is_quiet: bool) -> None:
    if len(images) == 0:
        return
    device = embedder.model.device
    use_one_thread()
    loader = Loader(images, list, min(num_workers, len(images)), batch_size=_batch_size(device))
    with tqdm(desc="encoding images once", total=len(images), disable=is_quiet, leave=False) as progress:
        for batch in loader:
            progress.update(len(batch))
            readable = [(key, pixels.to(device)) for key, pixels in batch if pixels is not None]
            if not readable:
                continue
            embeddings = embedder.encode([pixels for _, pixels in readable]).cpu().numpy()
            for (key, _), embedding in zip(readable, embeddings, strict=True):
                embedder.store.write(key, embedding)


def _batch_size(device: torch.device) -> int:
    """Return how many images are encoded together: a GPU is faster with several, a CPU is not."""
    return 8 if device.type == "cuda" else 1


class _Images(Dataset):
    """The images to encode: key and pixels; None for an image that broke since it was checked."""

    def __init__(self, entries: list[tuple[str, SampleDataset, tuple[int, int]]]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None]:
        key, dataset, position = self.entries[index]
        try:
            return key, dataset.read_pixels(*position)
        except Defect:
            return key, None
