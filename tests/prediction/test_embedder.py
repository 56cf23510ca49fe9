import numpy as np
import pytest
import torch

from finestsam.config import AugmentConfig, DatasetConfig, PromptsConfig, StoreConfig
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.prediction.embedder import Embedder, encode_missing, fill_store, find_missing, hash_encoder, open_store


@pytest.fixture
def embedder(tiny_sam, tmp_path):
    tiny_sam.eval()
    return Embedder(tiny_sam, open_store(StoreConfig(folder=str(tmp_path)), tiny_sam))


def make_dataset(records, embedder, **augment):
    settings = SampleSettings(64, 8, 0, PromptsConfig(), DatasetConfig(), augment=AugmentConfig(**augment))
    return SampleDataset(records, settings, store=embedder.store)


def test_a_filled_store_gives_what_the_encoder_gives_and_no_pixels_are_read(records, embedder):
    dataset = make_dataset(records, embedder)
    before = [dataset[(0, place)] for place in range(len(records))]
    assert all(sample.embedding is None for sample in before)

    assert fill_store(embedder, [dataset], num_workers=0) == (len(records), len(records))

    after = [dataset[(0, place)] for place in range(len(records))]
    assert all(sample.image is None for sample in after)
    assert torch.equal(embedder.embed(before), embedder.embed(after))
    live = Embedder(embedder.model).embed(before)
    assert torch.linalg.norm(live - embedder.embed(after)) < 5e-4 * torch.linalg.norm(live)


def test_worker_processes_fill_the_same_store(records, embedder, tmp_path):
    dataset = make_dataset(records, embedder)
    fill_store(embedder, [dataset], num_workers=2)
    other = Embedder(embedder.model, open_store(StoreConfig(folder=str(tmp_path / "other")), embedder.model))
    fill_store(other, [make_dataset(records, other)], num_workers=0)

    for key, _ in dataset.list_embedding_keys():
        assert (embedder.store.read(key) == other.store.read(key)).all()


def test_ranks_share_the_work_and_fill_everything(records, embedder):
    dataset = make_dataset(records, embedder)
    missing = find_missing(embedder.store, [dataset])
    for rank in (1, 0):
        encode_missing(embedder, [dataset], missing[rank::2], num_workers=0)

    assert len(missing) == len(records)
    assert find_missing(embedder.store, [dataset]) == []


def test_fixed_variants_are_kept_and_changing_ones_are_not(records, embedder):
    fixed = make_dataset(records, embedder, orientations="all", variants=2)
    changing = make_dataset(records, embedder, orientations="all")

    fill_store(embedder, [fixed], num_workers=0)

    assert list(changing.list_embedding_keys()) == []
    for epoch in (0, 1):
        for place in range(len(records)):
            sample = fixed[(epoch, place)]
            pixels = fixed.read_pixels(place, sample.variant)
            assert sample.image is None
            assert torch.equal(sample.embedding.float(), embedder.encode([pixels])[0])


def test_images_without_room_are_encoded_each_time(records, embedder, tmp_path, capsys):
    entry_gigabytes = embedder.store.entry_bytes / 1e9
    settings = StoreConfig(folder=str(tmp_path / "small"), max_gigabytes=2.5 * entry_gigabytes)
    small = Embedder(embedder.model, open_store(settings, embedder.model))
    dataset = make_dataset(records, small)

    assert fill_store(small, [dataset], num_workers=0) == (2, len(records))

    assert f"no room for {len(records) - 2} of {len(records)} images" in capsys.readouterr().out
    samples = [dataset[(0, place)] for place in range(len(records))]
    assert sum(sample.embedding is None for sample in samples) == len(records) - 2
    plain = [make_dataset(records, Embedder(embedder.model))[(0, place)] for place in range(len(records))]
    assert torch.equal(small.embed(samples), small.encode([sample.image for sample in plain]))


def test_without_a_folder_to_write_images_are_encoded_each_time(records, embedder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    blocked = Embedder(embedder.model, open_store(StoreConfig(folder=str(tmp_path / "file" / "in")), embedder.model))
    dataset = make_dataset(records, blocked)

    assert fill_store(blocked, [dataset], num_workers=0) == (0, len(records))

    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "embeddings are not kept" in err
    assert blocked.embed([dataset[(0, 0)]]).shape[0] == 1


def test_the_key_of_an_encoder_changes_with_weights_and_precision_and_not_with_the_decoder(tiny_sam):
    before = hash_encoder(tiny_sam)
    with torch.no_grad():
        tiny_sam.sam.mask_decoder.iou_token.weight += 1
        assert hash_encoder(tiny_sam) == before
        tiny_sam.sam.image_encoder.pos_embed[0, 0, 0, 0] += 1
    after = hash_encoder(tiny_sam)
    tiny_sam.encoder_dtype = torch.bfloat16

    assert len({before, after, hash_encoder(tiny_sam)}) == 3


def test_one_image_is_encoded_once(embedder):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 64, 48), dtype=np.uint8))
    first = embedder.embed_by_key("aa", lambda: pixels)

    def refuse():
        raise AssertionError("read again")

    assert torch.equal(embedder.embed_by_key("aa", refuse), first)
    assert Embedder(embedder.model).embed_by_key("aa", lambda: pixels).shape == first.shape
