import errno
import os

import numpy as np
import pytest
from conftest import files_limited_to

from finestsam.model.embeddings import CHECKSUM_BYTES, EmbeddingStore, image_key

SHAPE = (4, 3, 3)
ENTRY_BYTES = 2 * 36 + CHECKSUM_BYTES


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


def reopen(store: EmbeddingStore, encoder_key: str = "encoder") -> EmbeddingStore:
    """Return the store as another process sees it."""
    return EmbeddingStore(store.folder, encoder_key, SHAPE, store.max_bytes)


@pytest.mark.parametrize("place", [0, 71, 72, ENTRY_BYTES - 1])
@pytest.mark.parametrize("bit", [1, 0x80])
def test_an_embedding_whose_bytes_changed_is_not_used_and_made_again(store, capsys, place, bit):
    store.write("aa", make_embedding(1))
    path = next(store.folder.glob("*/*/*.f16"))
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)

    other = reopen(store)
    assert other.read("aa") is None
    assert "aa.f16 was damaged since it was written; it is made again" in capsys.readouterr().err
    assert not other.holds("aa") and other.make_room(["aa"]) == 1
    other.write("aa", make_embedding(2))
    assert (reopen(store).read("aa") == 2).all()


def test_an_embedding_of_another_image_or_encoder_under_this_name_is_not_used(store):
    store.write("aa", make_embedding(1))
    path = next(store.folder.glob("*/*/*.f16"))
    path.with_name("ab.f16").write_bytes(path.read_bytes())
    (store.folder / "other" / "aa").mkdir(parents=True)
    (store.folder / "other" / "aa" / "aa.f16").write_bytes(path.read_bytes())

    assert reopen(store).read("ab") is None
    assert reopen(store, "other").read("aa") is None
    assert (reopen(store).read("aa") == 1).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_half_precision_cannot_hold_is_not_kept(store, value):
    store.write("aa", make_embedding(value))

    assert not store.holds("aa")


def test_what_is_no_number_is_not_read_even_with_its_checksum(store):
    store.write("aa", make_embedding(1))
    content = make_embedding(np.nan).astype(np.float16).tobytes()
    next(store.folder.glob("*/*/*.f16")).write_bytes(content + store._checksum("aa", content))

    assert reopen(store).read("aa") is None


def test_a_checksum_is_verified_once_a_process(store, monkeypatch):
    store.write("aa", make_embedding(1))
    other, verified = reopen(store), []
    checksum = EmbeddingStore._checksum
    monkeypatch.setattr(EmbeddingStore, "_checksum", lambda *given: (verified.append(1), checksum(*given))[1])

    for _ in range(3):
        assert (other.read("aa") == 1).all()

    assert len(verified) == 1


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


def test_a_key_shows_images_sizes_and_variants_apart():
    keys = {
        image_key("a", (2, 3)), image_key("b", (2, 3)), image_key("a", (3, 2)), image_key("a", (2, 3), "flip"),
    }  # fmt: skip

    assert len(keys) == 4
    assert image_key("a", (2, 3)) in keys
