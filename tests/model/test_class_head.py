import json

import pytest
import torch

from finestsam.batch import Prompts
from finestsam.config import build_config
from finestsam.errors import UserError
from finestsam.model.architectures import build_sam
from finestsam.model.card import Card, write_card
from finestsam.model.heads import ClassHead, head_path, load_class_head, share_cells
from finestsam.model.load import load_model
from finestsam.model.sam import FinestSam


@pytest.fixture
def head() -> ClassHead:
    torch.manual_seed(0)
    return ClassHead(8, 4)


def make_prompts(count: int) -> Prompts:
    torch.manual_seed(1)
    return Prompts(points=torch.rand(count, 1, 2) * 60, labels=torch.ones(count, 1))


def test_a_mask_is_shared_among_the_cells_that_it_lies_in():
    logits = torch.full((2, 1, 8, 8), -3.0)
    logits[0, 0, 0:4, 0:4] = 5.0  # one cell whole
    logits[0, 0, 0:2, 4:8] = 0.1  # and half of the next
    logits.requires_grad_()

    shares = share_cells(logits, 2)

    torch.testing.assert_close(shares[0, 0], torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert (shares[1] == 0).all()  # an empty one lies in none
    assert not shares.requires_grad


def test_what_is_read_is_the_token_the_look_and_how_it_stands_out(head):
    embedding, tokens = torch.randn(1, 8, 4, 4), torch.randn(3, 2, 8)
    logits = torch.randn(3, 2, 16, 16)

    found = head(tokens, logits, embedding)

    inside = (logits[1, 0] > 0).double().view(4, 4, 4, 4).sum(dim=(1, 3))
    shares = (inside / inside.sum()).float()
    contrast = (embedding[0] - embedding[0].mean(dim=(1, 2), keepdim=True)) / (
        embedding[0].var(dim=(1, 2), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    parts = [head.token_norm(tokens[1, 0]), head.look_norm((embedding[0] * shares).sum(dim=(1, 2)))]
    expected = head.classify(torch.cat([*parts, (contrast * shares).sum(dim=(1, 2))]))
    assert found.shape == (3, 2, 4)
    torch.testing.assert_close(found[1, 0], expected, rtol=1e-4, atol=1e-5)


def test_what_classes_teach_reaches_tokens_and_embedding_and_no_mask(head):
    embedding, tokens, logits = torch.randn(1, 8, 4, 4), torch.randn(3, 8), torch.randn(3, 16, 16)
    for tensor in (embedding, tokens, logits):
        tensor.requires_grad_()

    head(tokens, logits, embedding).square().sum().backward()

    assert embedding.grad.abs().max() > 0 and tokens.grad.abs().max() > 0
    assert logits.grad is None


@pytest.mark.parametrize("multimask_output", [True, False])
def test_every_mask_of_an_output_has_its_class_and_the_generator_gets_the_same(tiny_sam, multimask_output):
    model = FinestSam(tiny_sam.sam, multimask_output).eval()
    prompts, embedding = make_prompts(5), torch.randn(1, 32, 4, 4)
    assert model(embedding, prompts).class_logits is None
    model.class_head = ClassHead(32, 3)

    with torch.no_grad():
        predictions = model(embedding, prompts)
        middle = float(predictions.scores.median())
        outputs = model.predict_above(model.compute_image_features(embedding), prompts, middle)
        found = model.classify(embedding, outputs.tokens, outputs.logits)

    assert predictions.class_logits.shape == (5, 3 if multimask_output else 1, 3)
    assert 0 < len(found) < predictions.scores.numel()
    torch.testing.assert_close(found, predictions.class_logits[predictions.scores > middle])


def test_masks_without_a_gradient_are_the_same_and_teach_the_rest_alike(tiny_sam):
    model = tiny_sam
    model.class_head = ClassHead(32, 3)
    gradients = []
    for learns_masks in (True, False):
        predictions = model(torch.ones(1, 32, 4, 4), make_prompts(4), learns_masks=learns_masks)
        assert predictions.logits.requires_grad == learns_masks
        model.zero_grad()
        (predictions.scores.sum() + predictions.class_logits.square().sum()).backward()
        gradients.append(model.sam.mask_decoder.mask_tokens.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def save_model(folder, names: list[str]) -> None:
    torch.save(build_sam("vit_tiny_test").state_dict(), folder / "best.pth")
    card = Card("vit_tiny_test", 64, True, names, task="classes", category_ids=list(range(len(names))))
    write_card(folder / "best.pth", card)


def test_a_head_is_loaded_with_its_weights_or_what_is_wrong_is_said(tmp_path):
    save_model(tmp_path, ["ball", "crate"])
    config = build_config({"model.checkpoint": str(tmp_path), "device": "cpu"})
    with pytest.raises(UserError, match=r"best.classes.pth is missing, the head that best.json speaks of"):
        load_model(config, prefer_runs=True)

    torch.save(ClassHead(32, 9).state_dict(), head_path(tmp_path / "best.pth", ClassHead))
    with pytest.raises(UserError, match=r"best.classes.pth: not a head for the 2 categories of .*best.json"):
        load_model(config, prefer_runs=True)

    head = ClassHead(32, 3)
    torch.save(head.state_dict(), head_path(tmp_path / "best.pth", ClassHead))
    loaded = load_class_head(tmp_path / "best.pth", ["ball", "crate"], width=32)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in head.state_dict().items())
    assert load_model(config, prefer_runs=True).model.class_head is not None
    masks = build_config({"model.checkpoint": str(tmp_path), "device": "cpu", "task": "masks"})
    assert load_model(masks, prefer_runs=True).model.class_head is None


@pytest.mark.parametrize(
    "changes",
    [
        {"token_norm.weight": torch.zeros(())}, {"token_norm.weight": torch.zeros(0, 9)},
        {"token_norm.weight": torch.zeros(10**7)}, {"classify.0.weight": torch.zeros(0, 10**9)}, {"a": torch.zeros(1)},
    ],
)  # fmt: skip
def test_a_head_of_odd_shapes_is_reported_before_memory_is_taken_for_it(tmp_path, changes):
    save_model(tmp_path, ["ball", "crate"])
    torch.save(ClassHead(32, 3).state_dict() | changes, head_path(tmp_path / "best.pth", ClassHead))

    with pytest.raises(UserError, match=r"best.classes.pth: not a head for the 2 categories"):
        load_model(build_config({"model.checkpoint": str(tmp_path), "device": "cpu"}), prefer_runs=True)


def test_a_head_for_another_model_is_reported(tmp_path):
    save_model(tmp_path, ["ball", "crate"])
    torch.save(ClassHead(64, 3).state_dict(), head_path(tmp_path / "best.pth", ClassHead))

    with pytest.raises(UserError, match="a head for embeddings of 64 channels, those of best.pth have 32"):
        load_model(build_config({"model.checkpoint": str(tmp_path), "device": "cpu"}), prefer_runs=True)


@pytest.mark.parametrize("task", ["classes", "semantic"])
def test_weights_that_were_not_trained_for_a_task_refuse_it(tmp_path, task):
    torch.save(build_sam("vit_tiny_test").state_dict(), tmp_path / "some.pth")
    config = build_config({"model.checkpoint": str(tmp_path / "some.pth"), "device": "cpu", "task": task})

    with pytest.raises(UserError, match=f"task {task}: .*some.pth were not trained for it; --mode train --task {task}"):
        load_model(config, prefer_runs=True)


def test_the_card_keeps_the_categories_with_their_ids(tmp_path):
    save_model(tmp_path, ["ball", "crate"])

    content = json.loads((tmp_path / "best.json").read_text())

    assert (content["task"], content["categories"], content["category_ids"]) == ("classes", ["ball", "crate"], [0, 1])
