import copy
import json

import pytest
import torch
from torch import nn

from finestsam.batch import Prompts
from finestsam.config import LoraConfig, ModelLayerConfig, ThawConfig, build_config
from finestsam.errors import UserError
from finestsam.model.adapter import adapt_, list_trained_modules, merge_adapter, read_config, write_adapter
from finestsam.model.architectures import build_sam
from finestsam.model.lora import LoraLinear, list_lora, load_plain_, mount_lora_, plain_state_dict
from finestsam.model.sam import FinestSam
from finestsam.model.weights import load_state_dict
from finestsam.training.trainable import freeze_

EVERYWHERE = LoraConfig(rank=3, alpha=6.0, encoder="all", decoder="all")


def make_sam(lora: LoraConfig = EVERYWHERE, learnt: bool = False):
    torch.manual_seed(0)
    sam = build_sam("vit_tiny_test")
    for block in sam.image_encoder.blocks:  # which pass on what they get where they are new
        for layer in (block.attn.proj, block.mlp.lin2):
            nn.init.normal_(layer.weight, std=0.2)
    mount_lora_(sam, lora)
    if learnt:
        for _, layer in list_lora(sam):
            nn.init.normal_(layer.lora_B.weight, std=0.2)
    return sam


def output(sam):
    torch.manual_seed(1)
    image = torch.randint(0, 255, (3, 64, 48), dtype=torch.uint8)
    model = FinestSam(sam)
    prompts = Prompts(points=torch.tensor([[[9.0, 20.0]], [[30.0, 5.0]]]), labels=torch.ones(2, 1))
    with torch.no_grad():
        return model(model.encode([image]), prompts)


def test_it_starts_as_the_identity_bit_for_bit():
    plain, adapted = output(make_sam(LoraConfig())), output(make_sam())

    assert torch.equal(adapted.logits, plain.logits)
    assert torch.equal(adapted.scores, plain.scores)


def test_merged_is_unmerged():
    sam, plain = make_sam(learnt=True), build_sam("vit_tiny_test")
    plain.load_state_dict(plain_state_dict(sam))

    adapted, merged, unchanged = output(sam), output(plain), output(make_sam(LoraConfig()))

    torch.testing.assert_close(merged.logits, adapted.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.scores, adapted.scores, rtol=1e-5, atol=1e-5)
    assert (adapted.logits - unchanged.logits).abs().max() > 0.01


def test_the_decoder_sees_its_additions_by_every_way():
    """Its algebra takes weights apart instead of calling the layers."""
    sam = make_sam(LoraConfig(rank=2, encoder="none", decoder="all"), learnt=True)
    fast, model = output(sam), FinestSam(sam)
    torch.manual_seed(1)
    image = torch.randint(0, 255, (3, 64, 48), dtype=torch.uint8)
    points = (torch.tensor([[[9.0, 20.0]], [[30.0, 5.0]]]), torch.ones(2, 1))
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points, None, None)
        logits, scores = sam.mask_decoder(
            model.encode([image]), sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
        )

    torch.testing.assert_close(fast.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.scores, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (LoraConfig(rank=2), {f"image_encoder.blocks.{n}.attn.{layer}" for n in (0, 1) for layer in ("qkv", "proj")}),
        (LoraConfig(rank=2, encoder="none"), set()),
        (LoraConfig(), set()),
    ],
)
def test_the_settings_choose_the_layers(lora, expected):
    assert {name for name, _ in list_lora(make_sam(lora))} == expected


def test_blocks_that_train_whole_have_no_additions():
    sam = build_sam("vit_tiny_test")
    mount_lora_(sam, LoraConfig(rank=2), whole_blocks=1)

    assert {name for name, _ in list_lora(sam)} == {
        "image_encoder.blocks.0.attn.qkv", "image_encoder.blocks.0.attn.proj",
    }  # fmt: skip


def test_the_decoder_has_additions_in_every_attention():
    sam = make_sam(LoraConfig(rank=2, encoder="none", decoder="attention"))

    assert len(dict(list_lora(sam))) == 4 * (2 * 3 + 1)  # projections of two layers with three attentions, and the last
    assert not any("mlp" in name for name, _ in list_lora(sam))


def test_dropout_is_of_training_alone():
    layer = LoraLinear(nn.Linear(50, 4), 2, 2.0, dropout=0.5)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.ones(1, 50)

    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"model_layer.thaw.blocks: this image encoder has 2 blocks, got 3"):
        adapt_(build_sam("vit_tiny_test"), ModelLayerConfig(thaw=ThawConfig(blocks=3)))


def test_plain_weights_take_the_place_of_additions():
    sam = make_sam(learnt=True)
    expected, plain = output(sam), plain_state_dict(sam)

    load_plain_(sam, plain)

    assert all((layer.lora_B.weight == 0).all() for _, layer in list_lora(sam))
    torch.testing.assert_close(output(sam).logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def base(tmp_path):
    torch.save(make_sam(LoraConfig()).state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


@pytest.fixture
def adapted():
    """A SAM whose decoder and a norm train whole beside the encoder's additions."""
    sam = make_sam(LoraConfig(rank=3, encoder="all"), learnt=True)
    freeze_(FinestSam(sam), build_config({"model_layer.lora.rank": 3}))
    sam.image_encoder.blocks[0].norm1.requires_grad_(True)
    nn.init.normal_(sam.mask_decoder.iou_token.weight)
    nn.init.normal_(sam.image_encoder.blocks[0].norm1.weight)
    return sam


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_an_adapter_is_the_weights_again(tmp_path, base, adapted, monkeypatch, has_safetensors):
    if has_safetensors:
        pytest.importorskip("safetensors")
    else:
        monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)

    path = write_adapter(tmp_path / "adapter", adapted, str(base))

    assert path.suffix == (".safetensors" if has_safetensors else ".bin")
    loaded, expected = load_state_dict(path), plain_state_dict(adapted)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_peft_loads_an_adapter(tmp_path, base, adapted):
    peft = pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", adapted, str(base))
    plain = make_sam(LoraConfig())

    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()

    expected = plain_state_dict(adapted)
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_an_adapter_of_peft_loads_here(tmp_path, base):
    peft = pytest.importorskip("peft")
    whole = ["iou_prediction_head"]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["qkv", "q_proj"], modules_to_save=whole)
    theirs = peft.get_peft_model(make_sam(LoraConfig()), config)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name or "iou_prediction_head" in name:
            nn.init.normal_(weight, std=0.1)
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    theirs.save_pretrained(tmp_path / "theirs")

    found = load_state_dict(tmp_path / "theirs" / "adapter_model.safetensors")

    for name, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_no_adapter_of_these_weights_is_named(tmp_path, base, adapted):
    path = write_adapter(tmp_path / "adapter", adapted, str(base))
    other = build_sam("vit_tiny").state_dict()
    with pytest.raises(UserError, match="does not fit the weights underneath"):
        merge_adapter(other, {"image_encoder.blocks.0.attn.qkv.lora_B.weight": torch.ones(96, 1)}, 1.0, path)
    base.unlink()
    with pytest.raises(UserError, match="is an adapter for .*base.pth, which is not there"):
        load_state_dict(path)
    for text in ("{}", "[", '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": true}'):
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="adapter"):
            read_config(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**400}, {"r": True}, {"r": 0}, {"r": 10**9}, {"lora_alpha": float("nan")}, {"lora_alpha": 10**400},
        {"lora_alpha": 1e300},
        {"base_model_name_or_path": ["a"]}, {"base_model_name_or_path": {}},
    ],
)  # fmt: skip
def test_an_adapter_of_absurd_numbers_is_named(tmp_path, base, adapted, changes):
    path = write_adapter(tmp_path / "adapter", adapted, str(base))
    config = path.parent / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    with pytest.raises(UserError, match="adapter_config.json: .*adapter"):
        load_state_dict(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", "adapter_config.json"])
def test_an_adapter_for_what_cannot_be_opened_is_named(tmp_path, base, adapted, name):
    path = write_adapter(tmp_path / "adapter", adapted, name)

    with pytest.raises(UserError, match="is an adapter for"):
        load_state_dict(path)


def test_adapters_that_lie_beneath_each_other_are_named(tmp_path, base, adapted):
    one, other = (write_adapter(tmp_path / name, adapted, str(base)) for name in ("one", "other"))
    for path, below in ((one, other), (other, one)):
        config = path.parent / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(below)}))

    for path in (one, other):
        with pytest.raises(UserError, match="is an adapter that lies beneath itself"):
            load_state_dict(path)


@pytest.mark.parametrize("shapes", [((96, 5), (3, 32)), ((96, 3), (3,)), ((96,), (3, 32))])
def test_additions_whose_parts_do_not_fit_each_other_are_named(tmp_path, shapes):
    name = "image_encoder.blocks.0.attn.qkv"
    wide, narrow = (torch.ones(shape) for shape in shapes)

    with pytest.raises(UserError, match="does not fit the weights underneath"):
        merge_adapter(
            build_sam("vit_tiny_test").state_dict(),
            {f"{name}.lora_B.weight": wide, f"{name}.lora_A.weight": narrow}, 1.0, tmp_path,
        )  # fmt: skip


def test_the_smallest_set_of_modules_that_train_is_named(adapted):
    modules = list_trained_modules(adapted, dict(list_lora(adapted)))

    assert "image_encoder.blocks.0.norm1" in modules
    assert not any("qkv" in name or name == "image_encoder.blocks.0" for name in modules)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad and "lora_" not in name}
    assert all(any(name.startswith(f"{module}.") for module in modules) for name in trained)
    copied = copy.deepcopy(adapted)
    copied.mask_decoder.requires_grad_(True)
    assert "mask_decoder" in list_trained_modules(copied, dict(list_lora(copied)))
