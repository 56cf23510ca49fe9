import json
import os

import pytest
import torch

from finestsam.config import build_config
from finestsam.errors import UserError
from finestsam.model import load
from finestsam.model.architectures import build_sam
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


def test_another_type_or_size_than_requested_is_named(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)

    with pytest.raises(UserError, match="vit_tiny_test.*vit_b"):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path), "model.type": "vit_b"}))
    with pytest.raises(UserError, match="must be a multiple of 16, got 100"):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path), "model.image_size": 100}))
    with pytest.raises(UserError, match="multiple of 16, got 100"):
        load_model(make_config(tmp_path, **{"model.checkpoint": "none", "model.image_size": 100}))


def test_a_damaged_card_is_named(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)
    path.with_suffix(".json").write_text("{")

    with pytest.raises(UserError, match="not a description of weights"):
        read_card(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10**9}, "image_size is 1000000000, expected a multiple of 16 from 32 to 4096"),
        ({"image_size": 100}, "image_size is 100, expected a multiple of 16"),
        ({"image_size": "64"}, "image_size is '64', expected int"),
        ({"image_size": True}, "image_size is True, expected int"),
        ({"model_type": 7}, "model_type is 7, expected str"),
        ({"categories": "thing"}, "categories is 'thing', expected list"),
        ({"categories": [1]}, r"categories is \[1\], expected list\[str\]"),
        ({"metrics": {"a": None}}, "metrics is"),
        ({"metrics": {"a": float("nan")}}, "metrics is"),
        ({"step": 10**400}, "step is 1000"),
        ({"task": "dance"}, "task is 'dance', expected one of masks, classes, semantic"),
        ({"task": "classes", "category_ids": [1, 2]}, "2 category_ids, expected one for each of 1 categories"),
        ({"task": "semantic"}, "task is semantic, and classes is empty"),
        ({"generator": []}, r"generator is \[\], expected dict"),
        ({"generator": {"points_per_side": 10**7}}, r"points_per_side is 10000000, expected a number in \[1, 512\]"),
        ({"generator": {"points_per_side": 0}}, "points_per_side is 0"),
        ({"generator": {"points_per_side": None}}, "points_per_side is None"),
        ({"generator": {"crop_n_layers": 30}}, r"crop_n_layers is 30, expected a number in \[0, 4\]"),
        ({"generator": {"pred_iou_thresh": "0.5"}}, "pred_iou_thresh is '0.5'"),
        ({"generator": {"score_map": [[1, 2, 3]]}}, "score_map is no list of pairs of numbers"),
        ({"generator": {"score_map": 5}}, "score_map is no list of pairs of numbers"),
    ],
)
def test_a_card_holds_what_a_setting_may_hold(tmp_path, changes, message):
    path = save_run(tmp_path, "run", age_seconds=0)
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(card | changes))

    with pytest.raises(UserError, match=f"best.json: not a description of weights .*{message}") as caught:
        read_card(path)
    assert len(str(caught.value)) < 500


def test_a_card_of_the_first_runs_has_the_baseline_under_another_name(tmp_path):
    path = save_run(tmp_path, "run", age_seconds=0)
    card = json.loads(path.with_suffix(".json").read_text())
    card |= {"floor": {"val_per_mask_iou": 0.25}}
    del card["baseline"]
    path.with_suffix(".json").write_text(json.dumps(card))

    assert read_card(path).baseline == {"val_per_mask_iou": 0.25}


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", "7", '"x"', "{}", "\x00", "9" * 5000])
def test_what_is_no_card_is_named(tmp_path, text):
    path = save_run(tmp_path, "run", age_seconds=0)
    path.with_suffix(".json").write_text(text)

    with pytest.raises(UserError, match="best.json: not a description of weights"):
        read_card(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_encoder.pos_embed": torch.zeros(1).expand(1, 10**6, 10**6, 32)}, "its weights stand for"),
        ({"image_encoder.pos_embed": torch.zeros(1, 0, 10**6, 32)}, "images of 0 x 1000000 patches"),
        ({"image_encoder.pos_embed": torch.zeros(1, 4, 5, 32)}, "images of 4 x 5 patches"),
        ({"image_encoder.pos_embed": torch.zeros(1, 300, 300, 32)}, "images of 300 x 300 patches"),
        ({"image_encoder.patch_embed.proj.weight": torch.zeros(32)}, "is not a SAM checkpoint"),
        ({"image_encoder.patch_embed.proj.weight": torch.zeros(32, 3, 8, 8)}, "patches of 8 pixels"),
        ({"image_encoder.blocks.x.attn.fft_gain": torch.zeros(1)}, "SAM of unknown size"),
        ({"image_encoder.blocks.1.attn.fft_gain": torch.zeros(1, device="meta")}, "is not a plain tensor"),
        ({"mask_decoder.iou_token.weight": torch.zeros(1, 32).to_sparse()}, "is not a plain tensor"),
        ({"mask_decoder.iou_token.weight": torch.zeros(1, 32, dtype=torch.cfloat)}, "is not a plain tensor"),
        ({"mask_decoder.iou_token.weight": torch.zeros(3, 3, 3)}, "not the weights of a vit_tiny_test"),
    ],
)
@pytest.mark.parametrize("size", [None, 128])
def test_tensors_of_odd_shapes_are_reported_before_memory_is_taken_for_them(tmp_path, changes, message, size):
    path = save_run(tmp_path, "run", age_seconds=0)
    torch.save(torch.load(path, weights_only=True) | changes, path)

    with pytest.raises(UserError, match=message):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path), "model.image_size": size}))


@pytest.mark.parametrize(
    ("name", "size"), [("mask_decoder.iou_token.weight", 64), ("image_encoder.blocks.1.attn.rel_pos_h", 128)]
)
def test_weights_that_lack_a_part_are_reported_also_where_another_size_is_made_of_it(tmp_path, name, size):
    path = save_run(tmp_path, "run", age_seconds=0)
    state_dict = torch.load(path, weights_only=True)
    del state_dict[name]
    torch.save(state_dict, path)

    with pytest.raises(UserError, match=f"not the weights of a vit_tiny_test: .*{name}"):
        load_model(make_config(tmp_path, **{"model.checkpoint": str(path), "model.image_size": size}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_not_replaced_in_silence():
    with pytest.raises(UserError, match="device gpu: none found; --device cpu"):
        choose_device("gpu")
    assert choose_device("cpu").type == "cpu"


def test_precision_is_what_was_requested_and_else_what_the_processor_computes_in(monkeypatch):
    cpu = torch.device("cpu")

    wanted = [choose_encoder_dtype(name, cpu) for name in ("32-true", "bf16-mixed", "16-mixed")]
    assert wanted == [None, torch.bfloat16, torch.float16]
    for features, expected in (({"avx2"}, None), ({"avx2", "avx512_bf16"}, torch.bfloat16)):
        monkeypatch.setattr(load, "has_feature", features.__contains__)
        assert choose_encoder_dtype("auto", cpu) == expected
