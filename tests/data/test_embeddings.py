import errno
import os

import numpy as np
import pytest
from conftest import files_limited_to

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


def test_a_folder_that_cannot_be_written_is_said_once_and_nothing_is_kept(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    store = EmbeddingStore(tmp_path / "file" / "embeddings", "encoder", SHAPE, max_bytes=9 * ENTRY_BYTES)

    for key in ("aa", "bb"):
        assert store.make_room([key]) == 0
        store.write(key, make_embedding(1))

    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "embeddings are not kept" in err and "file/embeddings cannot be written: Not a directory" in err
    assert store.read("aa") is None and not store.holds("bb")


def test_a_disk_that_refuses_a_write_is_said_once_and_what_is_there_is_read(store, monkeypatch, capsys):
    store.write("aa", make_embedding(1))

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)
    for key in ("bb", "cc"):
        store.write(key, make_embedding(2))

    assert capsys.readouterr().err.count("Permission denied") == 1
    assert store.holds("aa") and not store.holds("bb")


def test_a_disk_that_is_full_all_of_a_sudden_is_said_once(store, capsys):
    with files_limited_to(ENTRY_BYTES // 2):
        for key in ("aa", "bb"):
            store.write(key, make_embedding(1))

    assert capsys.readouterr().err.count("cannot be written: File too large") == 1
    assert not store.holds("aa") and not list(store.folder.glob("*/*/*"))


def test_a_key_tells_pictures_sizes_and_variants_apart():
    keys = {
        picture_key("a", (2, 3)), picture_key("b", (2, 3)), picture_key("a", (3, 2)), picture_key("a", (2, 3), "flip"),
    }  # fmt: skip

    assert len(keys) == 4
    assert picture_key("a", (2, 3)) in keys
