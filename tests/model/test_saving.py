import os
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import list_names

from finestsam.model.architectures import build_sam
from finestsam.model.saving import CheckpointNotSaved, save_file, save_weights


def test_what_is_saved_loads_as_plain_data(tmp_path):
    state = {"weights": torch.randn(3, 4), "epoch": 2, "config": "{}", "best": None}
    save_file(tmp_path / "a.ckpt", state)

    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.pop("weights"), state.pop("weights"), rtol=0, atol=0)
    assert loaded == state
    assert list_names(tmp_path) == ["a.ckpt"]


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 200_000_000))
    message = rf"^checkpoint not saved: No space left on device \(need 1.1 GB, free 0.2 GB at {tmp_path}\)$"
    weights = torch.empty(250_000_000)  # 1 GB of address space, never touched
    with pytest.raises(CheckpointNotSaved, match=message):
        save_file(tmp_path / "a.ckpt", {"model": {"weights": weights}})
    assert list_names(tmp_path) == []


def test_a_file_that_reads_back_differently_does_not_replace_the_old_one(tmp_path, monkeypatch):
    save_file(tmp_path / "a.ckpt", {"step": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.ftruncate(descriptor, 500))
    with pytest.raises(CheckpointNotSaved, match="does not read back"):
        save_file(tmp_path / "a.ckpt", {"step": 2})
    monkeypatch.undo()
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {"step": 1}


def test_a_folder_that_is_gone_is_not_saved_into(tmp_path):
    with pytest.raises(CheckpointNotSaved, match=r"No such file or directory \(need .*, free nothing at"):
        save_file(tmp_path / "gone" / "a.ckpt", {"step": 1})


def test_an_error_of_our_own_keeps_its_traceback_and_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="pickle") as caught:
        save_file(tmp_path / "a.ckpt", {"step": lambda: 1})
    assert not isinstance(caught.value, CheckpointNotSaved)
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("prefix", ["", "sam.", "module.sam.", "_forward_module.module.", "_orig_mod.model."])
def test_weights_are_a_plain_state_dict_of_sam(tmp_path, prefix):
    sam = build_sam("vit_tiny_test")
    save_weights(tmp_path / "best.pth", {prefix + name: tensor for name, tensor in sam.state_dict().items()})

    loaded = torch.load(tmp_path / "best.pth", weights_only=True)
    assert type(loaded) is dict
    assert list(loaded) == list(sam.state_dict())
    for name, tensor in sam.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
    build_sam("vit_tiny_test").load_state_dict(loaded)


def test_weights_are_contiguous_float32_and_drag_no_memory_along(tmp_path):
    large = torch.randn(1000, 1000)
    save_weights(tmp_path / "a.pth", {"a": large[:2], "b": large[:, :2], "c": large[0].bfloat16()})

    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in loaded.values())
    torch.testing.assert_close(loaded["b"], large[:, :2], rtol=0, atol=0)
    assert (tmp_path / "a.pth").stat().st_size < 30_000


def test_weights_of_a_compiled_part_have_their_usual_names(tmp_path):
    save_weights(tmp_path / "a.pth", {"sam.image_encoder._orig_mod.pos_embed": torch.ones(1)})
    assert list(torch.load(tmp_path / "a.pth", weights_only=True)) == ["image_encoder.pos_embed"]
