import os

import pytest
import torch

from finestsam.config import build_config
from finestsam.errors import UserError
from finestsam.model import load
from finestsam.model.build import build_sam
from finestsam.model.card import Card, read_card, write_card
from finestsam.model.load import choose_device, choose_encoder_dtype, load_model


def save_run(sav_dir, name: str, age_seconds: int, multimask_output: bool = True):
    folder = sav_dir / name
    folder.mkdir(parents=True)
    torch.save(build_sam("vit_tiny_test").state_dict(), folder / "best.pth")
    write_card(folder / "best.pth", Card("vit_tiny_test", 64, multimask_output, ["thing"]))
    os.utime(folder / "best.pth", (10**9 - age_seconds, 10**9 - age_seconds))
    return folder / "best.pth"


def make_config(sav_dir, **values: object):
    return build_config({"sav_dir": str(sav_dir), "device": "cpu"} | values)


def test_prediction_takes_the_newest_run_and_what_it_was_trained_for(tmp_path):
    save_run(tmp_path, "old", age_seconds=100)
    newest = save_run(tmp_path, "new", age_seconds=1, multimask_output=False)

    loaded = load_model(make_config(tmp_path), prefer_runs=True)

    assert loaded.path == newest
    assert loaded.model.multimask_output is False
    assert loaded.card.categories == ["thing"]


def test_a_checkpoint_is_a_file_a_run_or_a_name_in_sav_dir(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)

    for name in (str(path), str(path.parent), "run", "run/best.pth"):
        assert load_model(make_config(tmp_path, **{"model.checkpoint": name})).path == path


def test_the_weights_loaded_are_the_weights_saved(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)

    loaded = load_model(make_config(tmp_path, **{"model.checkpoint": str(path)}))

    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in loaded.model.sam.state_dict().items())


def test_another_type_or_size_than_asked_for_is_named(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)

    with pytest.raises(UserError, match="vit_tiny_test.*vit_b"):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path), "model.type": "vit_b"}))
    with pytest.raises(UserError, match="must be a multiple of 16, got 100"):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path), "model.image_size": 100}))
    with pytest.raises(UserError, match="multiple of 16, got 100"):
        load_model(make_config(tmp_path, **{"model.checkpoint": "none", "model.image_size": 100}))


def test_weights_with_a_missing_part_are_refused(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)
    state_dict = torch.load(path, weights_only=True)
    del state_dict["mask_decoder.iou_token.weight"]
    torch.save(state_dict, path)

    with pytest.raises(UserError, match="iou_token"):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path)}))


def test_a_damaged_card_is_named(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)
    path.with_suffix(".json").write_text("{")

    with pytest.raises(UserError, match="not a description of weights"):
        read_card(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_not_replaced_in_silence():
    with pytest.raises(UserError, match="device gpu: none found; --device cpu"):
        choose_device("gpu")
    assert choose_device("cpu").type == "cpu"


def test_precision_is_what_was_asked_for_and_else_what_the_processor_computes_in(monkeypatch):
    cpu = torch.device("cpu")

    asked = [choose_encoder_dtype(name, cpu) for name in ("32-true", "bf16-mixed", "16-mixed")]
    assert asked == [None, torch.bfloat16, torch.float16]
    for features, expected in (({"avx2"}, None), ({"avx2", "avx512_bf16"}, torch.bfloat16)):
        monkeypatch.setattr(load, "has_feature", features.__contains__)
        assert choose_encoder_dtype("auto", cpu) == expected
