import copy
from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric

from finestsam.batch import Batch, Prompts
from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.prediction.precompute import Embedder
from finestsam.training.losses import object_losses
from finestsam.training.schedules import build_optimizer
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_

ALL_TRAIN = {"model_layer.freeze.image_encoder": False, "model_layer.freeze.prompt_encoder": False}


def make_stepper(tiny_sam, **values: object) -> Stepper:
    config = build_config(ALL_TRAIN | {"opt.clip_norm": 0.0} | values)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = copy.deepcopy(tiny_sam).train()
    freeze_(model, config)
    optimizer = build_optimizer(model, config.opt)
    wrapped, optimizer = fabric.setup(model, optimizer)
    return Stepper(
        fabric, config, model, wrapped, optimizer, torch.amp.GradScaler("cpu", enabled=False), Embedder(model),
        chunk_objects=config.chunk_objects or 16,
    )  # fmt: skip


@pytest.fixture
def batches(records) -> list[Batch]:
    config = build_config({})
    dataset = SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))
    return [Batch([dataset[(0, 0)], dataset[(0, 1)]]), Batch([dataset[(0, 2)]])]


def compute_gradients(stepper: Stepper, batches: list[Batch]) -> dict[str, torch.Tensor]:
    stepper.step(batches, epoch=0, wants_stop=False)
    return {name: weight.grad for name, weight in stepper.model.named_parameters() if weight.requires_grad}


def test_the_gradient_is_that_of_the_mean_loss_over_all_objects(tiny_sam, batches):
    stepper = make_stepper(tiny_sam, chunk_objects=3)
    plain = copy.deepcopy(stepper.model)
    total = 0.0
    for sample in (sample for batch in batches for sample in batch.samples):
        predictions = plain(plain.encode([sample.image]), sample.prompts)
        total = total + object_losses(predictions, sample, 0, stepper.config.losses, 64).total.sum()
    (total / sum(batch.object_count for batch in batches)).backward()

    found = compute_gradients(stepper, batches)

    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(
                found[name], expected, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.parametrize("chunk_objects", [1, 4, 1000])
def test_chunks_of_any_size_give_one_gradient(tiny_sam, batches, chunk_objects):
    whole = compute_gradients(make_stepper(tiny_sam, chunk_objects=500), batches)
    chunked = compute_gradients(make_stepper(tiny_sam, chunk_objects=chunk_objects), batches)

    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-6)


def test_accumulated_batches_give_the_gradient_of_one_batch(tiny_sam, batches):
    together = Batch([sample for batch in batches for sample in batch.samples])

    accumulated = compute_gradients(make_stepper(tiny_sam), batches)
    whole = compute_gradients(make_stepper(tiny_sam), [together])

    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_frozen_encoder_is_not_gone_through_backwards(tiny_sam, batches):
    stepper = make_stepper(tiny_sam, **{"model_layer.freeze.image_encoder": True})

    compute_gradients(stepper, batches)

    assert all(weight.grad is None for weight in stepper.model.sam.image_encoder.parameters())
    assert any(weight.grad is not None for weight in stepper.model.sam.mask_decoder.parameters())


def test_a_step_lowers_the_loss_of_its_own_batch(tiny_sam, batches):
    stepper = make_stepper(tiny_sam, **{"opt.learning_rate": 3e-3})

    losses = []
    for _ in range(15):
        sums, objects, is_finite, _ = stepper.step(batches, epoch=0, wants_stop=False)
        assert is_finite
        losses.append(sums["total_loss"] / objects)

    assert losses[-1] < 0.9 * losses[0]
    parts = sums["focal_loss"] + sums["dice_loss"] + sums["iou_loss"]
    assert parts == pytest.approx(sums["total_loss"], rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tiny_sam, batches):
    stepper = make_stepper(tiny_sam)
    with torch.no_grad():
        stepper.model.sam.mask_decoder.iou_token.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in stepper.model.state_dict().items()}

    _, _, is_finite, _ = stepper.step(batches, epoch=0, wants_stop=False)

    assert not is_finite
    for name, value in stepper.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_step_without_objects_changes_nothing(tiny_sam):
    stepper = make_stepper(tiny_sam)
    before = copy.deepcopy(stepper.model.state_dict())

    _, objects, _, wants_stop = stepper.step([Batch([])], epoch=0, wants_stop=True)

    assert objects == 0
    assert wants_stop
    assert all(torch.equal(value, before[name]) for name, value in stepper.model.state_dict().items())


@pytest.mark.parametrize("multimask_output", [True, False])
def test_weights_that_no_prompt_reaches_do_not_train(tiny_sam, multimask_output):
    config = build_config(ALL_TRAIN | {"multimask_output": multimask_output})

    freeze_(tiny_sam, config)

    decoder, encoder = tiny_sam.sam.mask_decoder, tiny_sam.sam.prompt_encoder
    trains = [all(w.requires_grad for w in network.parameters()) for network in decoder.output_hypernetworks_mlps]
    assert trains == ([False, True, True, True] if multimask_output else [True, False, False, False])
    assert [embedding.weight.requires_grad for embedding in encoder.point_embeddings] == [False, True, False, False]
    assert not any(weight.requires_grad for weight in encoder.mask_downscaling.parameters())


def test_points_where_no_object_is_are_taught_the_score_zero(tiny_sam, records):
    config = build_config({"dataset.background_points": 4})
    dataset = SampleDataset(records, SampleSettings(64, 16, 0, config.prompts, config.dataset))
    with_background, without = dataset[(0, 0)], replace(dataset[(0, 0)], background=Prompts())
    plain = copy.deepcopy(tiny_sam).train()
    freeze_(plain, build_config(ALL_TRAIN))
    embedding = plain.encode([without.image])
    predictions = plain(embedding, without.prompts)
    loss = object_losses(predictions, without, 0, config.losses, 64).total.mean()
    (loss + plain(embedding, with_background.background).scores.square().mean()).backward()

    found = compute_gradients(make_stepper(tiny_sam, chunk_objects=3), [Batch([with_background])])
    ignored = compute_gradients(make_stepper(tiny_sam, chunk_objects=3), [Batch([without])])

    name = "sam.mask_decoder.iou_prediction_head.layers.2.bias"
    assert not torch.allclose(found[name], ignored[name], rtol=1e-3)
    for name, weight in plain.named_parameters():
        if weight.requires_grad and weight.grad is not None:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-6)
