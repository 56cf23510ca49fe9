import os

import numpy as np
import pytest

from finestsam.data.embeddings import EmbeddingStore, picture_key

SHAPE = (4, 3, 3)
ENTRY_BYTES = 2 * 36


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(tmp_path / "embeddings", "encoder", SHAPE, max_bytes=3 * ENTRY_BYTES)


def make_embedding(value: float) -> np.ndarray:
    return np.full(SHAPE, value, dtype=np.float32)


def test_what_was_written_is_read_back_in_half_precision(store):
    embedding = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)

    store.write("aa", embedding)

    assert store.holds("aa")
    assert (store.read("aa") == embedding.astype(np.float16)).all()


def test_what_is_not_there_or_half_there_is_not_read(store):
    assert store.read("aa") is None
    store.write("aa", make_embedding(1))
    path = next(store.folder.glob("*/*/*.f16"))
    path.write_bytes(path.read_bytes()[:-1])

    assert store.read("aa") is None
    assert not store.holds("aa")


def test_another_encoder_finds_nothing(store):
    store.write("aa", make_embedding(1))

    assert EmbeddingStore(store.folder, "other", SHAPE, store.max_bytes).read("aa") is None


def test_what_was_used_longest_ago_makes_room_and_what_is_wanted_stays(store):
    for age, key in enumerate(("newest", "middle", "oldest")):
        store.write(key, make_embedding(age))
        path = next(store.folder.glob(f"*/*/{key}.f16"))
        os.utime(path, (1e9 - age, 1e9 - age))

    room = store.make_room(["oldest", "another"])

    assert room == 1
    assert [store.holds(key) for key in ("newest", "middle", "oldest")] == [True, False, True]


def test_there_is_room_for_no_more_than_the_limit(store):
    assert store.make_room([str(number) * 2 for number in range(9)]) == 3
    assert EmbeddingStore(store.folder, "encoder", SHAPE, max_bytes=0).make_room(["aa"]) == 0


def test_a_key_tells_pictures_sizes_and_variants_apart():
    keys = {
        picture_key("a", (2, 3)), picture_key("b", (2, 3)), picture_key("a", (3, 2)), picture_key("a", (2, 3), "flip"),
    }  # fmt: skip

    assert len(keys) == 4
    assert picture_key("a", (2, 3)) in keys
