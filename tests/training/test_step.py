import copy
from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric

from finestsam.batch import Batch, Prompts
from finestsam.config import build_config
from finestsam.data.dataset import SampleDataset, SampleSettings
from finestsam.data.previous_logits import PreviousLogits
from finestsam.errors import UserError
from finestsam.masks import decode_rle
from finestsam.model.adapter import adapt_
from finestsam.prediction.clicks import add_clicks, show_preferred
from finestsam.prediction.embedder import Embedder
from finestsam.runtime.memory import is_out_of_memory, reporting_out_of_memory
from finestsam.tasks.losses import ObjectLosses, object_losses
from finestsam.tasks.masks import MasksTask
from finestsam.training.memory import OutOfMemory
from finestsam.training.optim import build_optimizer
from finestsam.training.step import Stepper
from finestsam.training.trainable import freeze_

POINTS = {"prompts.use_boxes": False, "dataset.background_points": 0}
ALL_TRAIN = {"model_layer.freeze.image_encoder": False, "model_layer.freeze.prompt_encoder": False} | POINTS


def make_stepper(tiny_sam, **values: object) -> Stepper:
    config = build_config(ALL_TRAIN | values)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = copy.deepcopy(tiny_sam).train()
    torch.manual_seed(0)
    adapt_(model.sam, config.model_layer)
    freeze_(model, config)
    optimizer = build_optimizer(model, config.opt)
    _, optimizer = fabric.setup(model, optimizer)
    scaler, chunk_objects = torch.amp.GradScaler("cpu", enabled=False), config.chunk_objects or 16
    stepper = Stepper(fabric, MasksTask(config, model), optimizer, scaler, Embedder(model), chunk_objects=chunk_objects)
    stepper.clip_norm = float("inf")  # so that a gradient can be compared with another one
    return stepper


@pytest.fixture
def batches(records) -> list[Batch]:
    config = build_config(POINTS)
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
        result = stepper.step(batches, epoch=0, wants_stop=False)
        assert result.is_finite
        losses.append(result.sums["total_loss"] / result.count)

    assert losses[-1] < 0.9 * losses[0]
    sums = result.sums
    parts = sums["focal_loss"] + sums["dice_loss"] + sums["iou_loss"]
    assert parts == pytest.approx(sums["total_loss"], rel=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(tiny_sam, batches):
    stepper = make_stepper(tiny_sam)
    with torch.no_grad():
        stepper.model.sam.mask_decoder.iou_token.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in stepper.model.state_dict().items()}

    result = stepper.step(batches, epoch=0, wants_stop=False)

    assert not result.is_finite
    for name, value in stepper.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_step_without_objects_changes_nothing(tiny_sam):
    stepper = make_stepper(tiny_sam)
    before = copy.deepcopy(stepper.model.state_dict())

    result = stepper.step([Batch([])], epoch=0, wants_stop=True)

    assert result.count == 0
    assert result.wants_stop
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
    config = build_config(POINTS | {"dataset.background_points": 4})
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


SEVERAL = {"dataset.prompts_per_object": 3, "generator.points_per_side": 32}
CORRECTED = {"prompts.correction_clicks": 2}


def make_batches(records, **values: object) -> list[Batch]:
    config = build_config(POINTS | values)
    dataset = SampleDataset(records, SampleSettings(64, 32, 0, config.prompts, config.dataset))
    clicks = config.prompts.correction_clicks
    first, second, third = (replace(dataset[(0, place)], correction_clicks=clicks) for place in range(3))
    return [Batch([first, second]), Batch([third])]


def test_an_object_weighs_one_however_often_it_is_requested(tiny_sam, records):
    batches = make_batches(records, **SEVERAL)
    stepper = make_stepper(tiny_sam, chunk_objects=3)
    plain = copy.deepcopy(stepper.model)
    means = []
    for sample in (sample for batch in batches for sample in batch.samples):
        predictions = plain(plain.encode([sample.image]), sample.prompts)
        losses = object_losses(predictions, sample, 0, stepper.config.losses, 64).total
        numbers = torch.tensor(sample.annotation_ids)
        means += [losses[numbers == number].mean() for number in numbers.unique()]
    assert len(means) < sum(len(sample) for batch in batches for sample in batch.samples)
    torch.stack(means).mean().backward()

    result = stepper.step(batches, epoch=0, wants_stop=False)

    assert result.count == len(means)
    assert result.sums["total_loss"] / result.count == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)
    for name, weight in stepper.model.named_parameters():
        expected = dict(plain.named_parameters())[name].grad
        if weight.requires_grad and expected is not None:
            torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-6)


def test_corrections_are_learnt_from_clicks_and_the_logits_before(tiny_sam, records):
    batches = make_batches(records, **CORRECTED)
    stepper = make_stepper(tiny_sam, chunk_objects=500, **CORRECTED)
    plain = copy.deepcopy(stepper.model)
    total, objects = 0.0, 0
    for sample in (sample for batch in batches for sample in batch.samples):
        prompts = sample.prompts
        for _ in range(3):
            predictions = plain(plain.encode([sample.image]), prompts)
            total = total + object_losses(predictions, sample, 0, stepper.config.losses, 64).total.sum() / 3
            shown = show_preferred(predictions, sample, 64)
            prompts = add_clicks(prompts, shown, [decode_rle(rle) for rle in sample.rles], sample)
        objects += len(sample)
    (total / objects).backward()

    result = stepper.step(batches, epoch=0, wants_stop=False)

    assert result.count == objects
    assert result.sums["total_loss"] == pytest.approx(total.item(), rel=1e-5)
    weights = dict(plain.named_parameters())
    assert weights["sam.prompt_encoder.mask_downscaling.6.weight"].grad.abs().max() > 0
    assert weights["sam.prompt_encoder.point_embeddings.0.weight"].grad.abs().max() > 0
    for name, weight in stepper.model.named_parameters():
        expected = weights[name].grad
        if weight.requires_grad and expected is not None:
            torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("values", [SEVERAL, CORRECTED, SEVERAL | CORRECTED | {"prompts.use_boxes": True}])
def test_chunks_of_several_prompts_and_corrections_give_one_gradient(tiny_sam, records, values):
    batches = make_batches(records, **values)

    whole = compute_gradients(make_stepper(tiny_sam, chunk_objects=500, **values), batches)
    chunked = compute_gradients(make_stepper(tiny_sam, chunk_objects=4, **values), batches)

    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first", [{}, {"prompts.use_points": False, "prompts.use_boxes": True}])
def test_corrective_clicks_reach_the_embeddings_of_clicks_and_masks(tiny_sam, first):
    freeze_(tiny_sam, build_config(ALL_TRAIN | CORRECTED | first))

    encoder = tiny_sam.sam.prompt_encoder
    reached = [embedding.weight.requires_grad for embedding in encoder.point_embeddings]
    assert reached == [True, True] + [bool(first)] * 2
    for part in (encoder.not_a_point_embed, encoder.mask_downscaling, encoder.no_mask_embed):
        assert all(weight.requires_grad for weight in part.parameters())


def test_the_next_epoch_gets_the_logits_of_the_first_masks(tiny_sam, records, tmp_path):
    batches = make_batches(records, **SEVERAL)
    corrected = [Batch([replace(s, correction_clicks=2) for s in batch.samples]) for batch in batches]
    kept = []
    for number, some in enumerate((batches, corrected)):
        stepper = make_stepper(tiny_sam, **SEVERAL)
        count = sum(len(record.annotations) for record in records)
        stepper.previous_logits = PreviousLogits(tmp_path / str(number), count, 16)
        stepper.previous_logits.create()
        stepper.step(some, epoch=0, wants_stop=False)
        kept.append(stepper.previous_logits.read(1, list(range(count))))

    (plain, is_known), (other, _) = kept
    assert is_known.sum() == sum(batch.object_count for batch in batches)
    torch.testing.assert_close(other, plain)


def run_out_of_memory(stepper: Stepper, objects: int, first: int = 1) -> None:
    """Let the decoder fail from its n-th call on, where it is requested more objects than so many."""
    forward, calls = stepper.model.forward, []

    def limited(embedding, prompts):
        calls.append(1)
        if len(calls) >= first and len(prompts) > objects:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(embedding, prompts)

    stepper.model.forward = limited


DROPPING = {"model_layer.freeze.image_encoder": True, "model_layer.lora.rank": 2, "model_layer.lora.dropout": 0.5}


@pytest.mark.parametrize("values", [{}, DROPPING, CORRECTED])
def test_a_step_that_runs_out_of_memory_is_taken_again_with_fewer_objects_at_a_time(tiny_sam, records, values, capsys):
    batches = make_batches(records, **values)
    steppers = [make_stepper(tiny_sam, chunk_objects=chunk, **values) for chunk in (8, 2)]
    run_out_of_memory(steppers[0], objects=2, first=2)  # the first image has left a gradient by then

    results = []
    for stepper in steppers:
        torch.manual_seed(0)
        results.append(stepper.step(batches, epoch=0, wants_stop=False))

    assert steppers[0].chunk_objects == 2
    assert "objects): the memory of cpu is too small; from here on 4 objects at a time" in capsys.readouterr().err
    assert results[0] == results[1]
    for (name, weight), (_, other) in zip(*(stepper.model.named_parameters() for stepper in steppers), strict=True):
        assert torch.equal(weight, other), name
        assert weight.grad is None or torch.equal(weight.grad, other.grad), name
    moments = [stepper.optimizer.state_dict()["state"] for stepper in steppers]
    assert all(torch.equal(value["exp_avg"], moments[1][key]["exp_avg"]) for key, value in moments[0].items())


def test_a_step_that_does_not_fit_at_all_names_its_images_and_changes_nothing(tiny_sam, batches):
    stepper = make_stepper(tiny_sam, chunk_objects=4)
    run_out_of_memory(stepper, objects=0, first=2)
    before = copy.deepcopy(stepper.model.state_dict())
    first = batches[0].samples[0]

    with pytest.raises(
        OutOfMemory, match=rf"^{first.file_name} \(96 x 96, {len(first)} objects\), .*the memory of cpu"
    ):
        stepper.step(batches, epoch=0, wants_stop=False)

    assert all(torch.equal(value, before[name]) for name, value in stepper.model.state_dict().items())
    assert stepper.optimizer.state_dict()["state"] == {}


def test_an_error_of_the_memory_is_reported_from_others():
    with pytest.raises(RuntimeError) as found:
        torch.empty(10**15)

    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    message = "^validation: out of memory; try --a$"
    with pytest.raises(UserError, match=message), reporting_out_of_memory("validation", "--a"):
        torch.empty(10**15)
    with pytest.raises(ZeroDivisionError), reporting_out_of_memory("validation", "--a"):
        raise ZeroDivisionError


def spoil_losses(monkeypatch, spoil) -> None:
    """Change the losses of every second call."""
    calls = []

    def spoiled(*arguments):
        losses = object_losses(*arguments)
        calls.append(1)
        return spoil(losses) if len(calls) % 2 == 0 else losses

    monkeypatch.setattr("finestsam.tasks.masks.object_losses", spoiled)


def test_the_image_whose_loss_is_not_finite_is_suspected(tiny_sam, batches, monkeypatch):
    stepper = make_stepper(tiny_sam, chunk_objects=500)
    spoil_losses(monkeypatch, lambda losses: replace(losses, total=losses.total * float("nan")))
    before = copy.deepcopy(stepper.model.state_dict())

    result = stepper.step(batches, epoch=0, wants_stop=False)

    assert not result.is_finite
    assert result.broken_images == [batches[0].samples[1].file_name]
    assert all(torch.equal(value, before[name]) for name, value in stepper.model.state_dict().items())
    monkeypatch.undo()
    result = stepper.step(batches, epoch=0, wants_stop=False)
    assert result.is_finite and result.broken_images == []


def test_a_loss_that_is_not_finite_is_not_learnt_from_though_its_gradient_is(tiny_sam, batches, monkeypatch):
    stepper = make_stepper(tiny_sam, chunk_objects=500)
    spoil_losses(monkeypatch, lambda losses: replace(losses, total=losses.total + float("inf")))

    assert not stepper.step(batches, epoch=0, wants_stop=False).is_finite
    assert all(torch.isfinite(weight.grad).all() for weight in stepper.model.parameters() if weight.requires_grad)
    assert stepper.optimizer.state_dict()["state"] == {}


def test_a_gradient_that_overflows_though_no_loss_does_puts_all_images_under_suspicion(tiny_sam, batches):
    stepper = make_stepper(tiny_sam)
    weight = stepper.model.sam.mask_decoder.iou_token.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))

    result = stepper.step(batches, epoch=0, wants_stop=False)
    assert not result.is_finite
    assert result.broken_images == [sample.file_name for batch in batches for sample in batch.samples]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_prompts_where_they_are(tiny_sam, records, dtype):
    values = {"prompts.use_boxes": True, "dataset.snap_to_grid": False}
    batches = make_batches(records, **values)
    seen = []
    for kind in (None, dtype):
        tiny_sam.encoder_dtype = kind
        stepper = make_stepper(tiny_sam, **values)
        encoder, kept = stepper.model.sam.prompt_encoder, []
        encoder.register_forward_hook(lambda module, given, output, kept=kept: kept.append(output[0].detach()))
        stepper.step(batches, epoch=0, wants_stop=False)
        seen.append(kept)

    assert any((sample.prompts.boxes % 1).any() for batch in batches for sample in batch.samples)
    assert len(seen[0]) == len(seen[1]) >= 3
    for full, half in zip(*seen, strict=True):
        torch.testing.assert_close(half, full, rtol=0, atol=0)


def test_half_precision_finds_its_scale_in_the_first_steps_and_goes_on(tiny_sam, batches):
    tiny_sam.encoder_dtype = torch.float16
    stepper = make_stepper(tiny_sam, **{"opt.learning_rate": 3e-3})
    stepper.clip_norm = Stepper.clip_norm
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    scales, losses = [stepper.scaler.get_scale()], []
    for _ in range(30):
        before = copy.deepcopy(stepper.model.state_dict())
        result = stepper.step(batches, epoch=0, wants_stop=False)
        scales.append(stepper.scaler.get_scale())
        assert result.is_finite == (scales[-1] == scales[-2])
        if result.is_finite:
            losses.append(result.sums["total_loss"] / result.count)
        else:
            assert scales[-1] == scales[-2] / 2
            assert all(torch.equal(value, before[name]) for name, value in stepper.model.state_dict().items())

    assert 1 <= scales[-1] < 2.0**26
    assert len(losses) > 15
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("multimask_output", [True, False])
def test_weights_of_unused_mask_tokens_stay_as_they_are(tiny_sam, batches, multimask_output):
    tiny_sam.multimask_output = multimask_output
    values = {"multimask_output": multimask_output, "opt.weight_decay": 1.0, "opt.learning_rate": 1e-2}
    stepper = make_stepper(tiny_sam, **values)
    rows = stepper.model.sam.mask_decoder.iou_prediction_head.layers[-1].weight
    before = rows.detach().clone()

    for _ in range(2):
        stepper.step(batches, epoch=0, wants_stop=False)

    kept, wanted = ([0], [1, 2, 3]) if multimask_output else ([1, 2, 3], [0])
    assert torch.equal(rows[kept], before[kept])
    assert all((rows[row] != before[row]).any() for row in wanted)


def test_no_predicted_iou_above_1_is_logged(tiny_sam):
    ones = torch.ones(2)
    losses = ObjectLosses(ones, ones, ones, ones, ones, torch.tensor([1.2, 0.4]), ones.long(), ones[:, None])

    stepper = make_stepper(tiny_sam)
    logged = dict(zip(stepper.task.measures, stepper.task.list_measures(losses), strict=True))

    torch.testing.assert_close(logged["predicted_iou"], torch.tensor([1.0, 0.4]))
