import io

import pytest
import torch

from finestsam.config import LambdaLRConfig, OptConfig, ReduceLROnPlateauConfig, SchedConfig
from finestsam.model.architectures import build_sam
from finestsam.training.optim import build_optimizer, build_scheduler, lr_factor, split_parameters

# Parameters of a SAM that weight decay must leave alone, beside everything called norm or bias.
SPARED = {
    "image_encoder.pos_embed",
    *(f"image_encoder.blocks.{block}.attn.rel_pos_{axis}" for block in (0, 1) for axis in "hw"),
    "image_encoder.neck.1.weight",  # LayerNorm2d
    "image_encoder.neck.3.weight",
    *(f"prompt_encoder.point_embeddings.{kind}.weight" for kind in range(4)),
    "mask_decoder.iou_prediction_head.layers.2.weight",  # rows of masks that no prompt uses must stay
    "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.no_mask_embed.weight",
    "prompt_encoder.mask_downscaling.1.weight",
    "prompt_encoder.mask_downscaling.4.weight",
    "mask_decoder.iou_token.weight",
    "mask_decoder.mask_tokens.weight",
    "mask_decoder.output_upscaling.1.weight",
}


def make_optimizer(learning_rate: float = 1.0) -> torch.optim.Optimizer:
    return build_optimizer(torch.nn.Linear(2, 2), OptConfig(learning_rate=learning_rate))


def follow_rates(optimizer: torch.optim.Optimizer, scheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (LambdaLRConfig(warmup_steps=0), [1, 1, 1]),
        (LambdaLRConfig(warmup_steps=1), [1, 1, 1]),
        (LambdaLRConfig(warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1]),
        (LambdaLRConfig(warmup_steps=2, steps=[4, 6], decay_factor=10), [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        (LambdaLRConfig(warmup_steps=0, steps=[1, 2, 3], decay_factor=2), [1, 0.5, 0.25, 0.125, 0.125]),
        (LambdaLRConfig(warmup_steps=2, steps=[3], decay_factor=1), [0.5, 1, 1, 1, 1]),
    ],
)
def test_the_rate_follows_a_table_written_by_hand(schedule, factors):
    assert [lr_factor(step, schedule) for step in range(len(factors))] == pytest.approx(factors)

    optimizer = make_optimizer(learning_rate=0.5)
    scheduler = build_scheduler(optimizer, SchedConfig(LambdaLR=schedule), eval_interval=1, total_steps=100)
    rates = follow_rates(optimizer, scheduler, len(factors))
    assert rates == pytest.approx([0.5 * factor for factor in factors])


def test_the_warm_up_of_a_schedule_in_shares_is_a_tenth_of_all_epochs_wherever_max_steps_ends_the_run():
    rates = []
    for total_steps in (20, 10):
        optimizer, sched = make_optimizer(), SchedConfig(LambdaLR=LambdaLRConfig(warmup_steps=50, steps=[0.9]))
        scheduler = build_scheduler(optimizer, sched, eval_interval=1, total_steps=total_steps, epoch_steps=20)
        rates.append(follow_rates(optimizer, scheduler, 4))

    assert rates[0] == rates[1] == pytest.approx([0.5, 1, 1, 1])


def test_decay_steps_below_one_are_shares_of_the_run():
    optimizer = make_optimizer()
    schedule = LambdaLRConfig(decay_factor=4, steps=[0.5, 0.75], warmup_steps=2)

    scheduler = build_scheduler(
        optimizer, SchedConfig(LambdaLR=schedule), eval_interval=1, total_steps=8, epoch_steps=100
    )

    assert follow_rates(optimizer, scheduler, 8) == pytest.approx([0.5, 1, 1, 1, 1 / 4, 1 / 4, 1 / 16, 1 / 16])


def test_the_first_step_of_a_warm_up_trains():
    optimizer = make_optimizer()
    build_scheduler(optimizer, SchedConfig(), eval_interval=1, total_steps=100)
    assert optimizer.param_groups[0]["lr"] == 1 / 50


@pytest.mark.parametrize(
    ("epoch_patience", "eval_interval", "evaluations"),
    [(10, 1, 10), (10, 3, 4), (9, 3, 3), (2, 5, 1), (0, 1, 0), (0, 4, 0), (10, 0, 10)],
)
def test_patience_is_counted_in_epochs_and_handed_on_in_validations(epoch_patience, eval_interval, evaluations):
    plateau = ReduceLROnPlateauConfig(epoch_patience=epoch_patience)
    sched = SchedConfig(type="ReduceLROnPlateau", ReduceLROnPlateau=plateau)
    assert build_scheduler(make_optimizer(), sched, eval_interval, 100).patience == evaluations


def test_the_rate_falls_when_the_metric_stands_still_and_stops_at_its_floor():
    optimizer = make_optimizer()
    plateau = ReduceLROnPlateauConfig(decay_factor=0.5, epoch_patience=1, min_lr=0.3)
    sched = SchedConfig(type="ReduceLROnPlateau", ReduceLROnPlateau=plateau)
    scheduler = build_scheduler(optimizer, sched, eval_interval=1, total_steps=100)

    rates = []
    for metric in [0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7]:
        scheduler.step(metric)
        rates.append(optimizer.param_groups[0]["lr"])

    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.3]


@pytest.mark.parametrize("kind", ["LambdaLR", "ReduceLROnPlateau"])
def test_a_schedule_continues_from_its_saved_state(kind):
    schedule = LambdaLRConfig(warmup_steps=3, steps=[5, 8])
    sched = SchedConfig(kind, schedule, ReduceLROnPlateauConfig(epoch_patience=2, threshold=0.0))
    metrics = [0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]

    def run(optimizer, scheduler, metrics):
        rates = []
        for metric in metrics:
            optimizer.step()
            scheduler.step(*([metric] if kind == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole, broken, resumed = make_optimizer(), make_optimizer(), make_optimizer()
    expected = run(whole, build_scheduler(whole, sched, 1, 100), metrics)
    scheduler = build_scheduler(broken, sched, 1, 100)
    first_half = run(broken, scheduler, metrics[:5])
    optimizer_state, scheduler_state = through_a_file(broken.state_dict()), through_a_file(scheduler.state_dict())

    scheduler = build_scheduler(resumed, sched, 1, 100)
    scheduler.load_state_dict(scheduler_state)
    resumed.load_state_dict(optimizer_state)

    assert first_half + run(resumed, scheduler, metrics[5:]) == expected
    assert len(set(expected)) > 2


def test_norms_biases_tokens_and_positions_are_not_decayed():
    sam = build_sam("vit_tiny_test")
    decayed, spared = ({name for name, _ in group} for group in split_parameters(sam))

    expected = {name for name, _ in sam.named_parameters() if "norm" in name or name.endswith("bias")} | SPARED
    assert spared == expected
    assert decayed == {name for name, _ in sam.named_parameters()} - expected


def test_the_optimizer_has_each_trainable_parameter_once_and_no_frozen_one():
    sam = build_sam("vit_tiny_test")
    sam.image_encoder.requires_grad_(False)
    optimizer = build_optimizer(sam, OptConfig(learning_rate=1e-3, weight_decay=0.1))

    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in sam.parameters() if parameter.requires_grad)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3]


def test_decay_shrinks_a_weight_and_leaves_a_token_as_it_is():
    sam = build_sam("vit_tiny_test")
    weight, token = sam.image_encoder.patch_embed.proj.weight, sam.mask_decoder.mask_tokens.weight
    before = weight.detach().clone(), token.detach().clone()
    optimizer = build_optimizer(sam, OptConfig(learning_rate=0.1, weight_decay=0.5))
    for parameter in sam.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    torch.testing.assert_close(weight, before[0] * (1 - 0.1 * 0.5))
    torch.testing.assert_close(token, before[1], rtol=0, atol=0)


def test_a_model_that_trains_nothing_but_norms_has_an_optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.LayerNorm(2))
    optimizer = build_optimizer(model, OptConfig())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
