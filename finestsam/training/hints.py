"""Hints and warnings for the user before the first step and after a validation."""

from collections.abc import Mapping

from finestsam.config import Config
from finestsam.model.fft_attention import list_blocks
from finestsam.model.heads import is_kept
from finestsam.model.lora import list_lora
from finestsam.model.sam import FinestSam
from finestsam.training.optim import limit_warmup

LARGE_IMAGE_SIZE = 1024
# A validation prints a hint if the number of masks per annotated object is outside this range.
MANY_MASKS, FEW_MASKS = 2.0, 0.5


def describe_training(model: FinestSam, model_type: str) -> str:
    """Return one line: what trains, how many of the weights, and the precision unless it is float32."""
    parts = []
    for name, part in model.sam.named_children():
        count = sum(weight.numel() for weight in part.parameters() if weight.requires_grad)
        ranks = {layer.lora_A.out_features for _, layer in list_lora(part)}
        if count:
            parts.append(f"{name} {_in_millions(count)}" + "".join(f" (LoRA of rank {rank})" for rank in ranks))
    for name, head in model.heads.items():
        if is_kept(head):
            parts.append(f"{name} {_in_millions(sum(weight.numel() for weight in head.parameters()))}")
    blocks = list_blocks(model.sam.state_dict())
    fft = f"; FFT attention in blocks {', '.join(map(str, blocks))}" if blocks else ""
    total = sum(weight.numel() for weight in model.sam.parameters())
    half = "" if model.encoder_dtype is None else f"; encodes in {str(model.encoder_dtype).removeprefix('torch.')}"
    size = f"{model_type} at {model.image_size} pixels, {_in_millions(total)} weights"
    return f"{size}; trains {', '.join(parts)}{fft}{half}"


def list_mismatches(config: Config, starts_from_nothing: bool, predicts_masks: bool = True) -> list[str]:
    """Return warnings about settings that train what prediction will not read.

    Args:
        predicts_masks: whether prediction prompts the mask decoder.
    """
    warnings = _list_prompt_mismatches(config) if predicts_masks else []
    freeze = config.model_layer.freeze
    fft_attention = config.model_layer.fft_attention
    if fft_attention.blocks != "none" and fft_attention.distill_steps == 0 and freeze.image_encoder:
        warnings.append(
            "replaces attention in a frozen image encoder, where nothing teaches what stands in for it; "
            "--model_layer.fft_attention.distill_steps 100 does, --model_layer.freeze.image_encoder false trains it"
        )
    if starts_from_nothing and freeze.image_encoder:
        warnings.append(
            "starts from random weights and freezes the image encoder, which then never learns to see; "
            "--model_layer.freeze.image_encoder false --model_layer.freeze.prompt_encoder false trains all of it"
        )
    return warnings


def warn_of_counts(metrics: Mapping[str, float], labels: str) -> list[str]:
    """Return a hint where validation found many more or far fewer masks than there are annotated objects.

    Args:
        metrics: of the validation; masks and objects per image are among them where the generator ran.
        labels: dataset.labels.
    """
    masks, objects = metrics.get("val_generator_masks", 0.0), metrics.get("val_generator_objects", 0.0)
    if objects == 0:
        return []
    ratio = f"{masks / objects:.1f} masks for each annotated object"
    if masks > MANY_MASKS * objects and labels == "partial":
        return [f"{ratio}: where every object is annotated, --dataset.labels complete gives fewer"]
    if masks > MANY_MASKS * objects:
        return [
            f"{ratio}: more epochs teach it what is no object (--num_epochs); where objects are missing from the "
            "annotations, --dataset.labels partial is right"
        ]
    if masks < FEW_MASKS * objects:
        return [
            f"{ratio}: many objects are missed; --mode check prints how many the generator's grid can reach, "
            "--generator.points_per_side and --model.image_size raise it, more epochs (--num_epochs) help the rest"
        ]
    return []


def warn_of_cpu(config: Config, device: str, model: FinestSam, model_type: str) -> list[str]:
    """Return a warning where a large model trains on the CPU and the user did not choose the CPU.

    Args:
        device: the type of the device that was found.
    """
    if config.device != "auto" or device != "cpu" or model.image_size < LARGE_IMAGE_SIZE:
        return []
    return [
        f"no GPU found, so all runs on the CPU, where {model_type} at {model.image_size} pixels takes seconds to look "
        "at an image and minutes to find its objects; --model.type vit_tiny suits it; --device cpu if that is meant"
    ]


def warn_of_schedule(config: Config, last_step: int, epoch_steps: int) -> list[str]:
    """Return warnings about warm-up or decay steps that the run does not reach.

    Args:
        last_step: of the run.
        epoch_steps: of all epochs, wherever max_steps ends the run.
    """
    if config.sched.type != "LambdaLR":
        return []
    schedule, warnings = config.sched.LambdaLR, []
    warmup_steps = limit_warmup(schedule, epoch_steps)
    if warmup_steps >= last_step:
        warnings.append(
            f"the run ends at step {last_step}, within the {warmup_steps} steps of its warm-up, before the "
            "learning rate is what opt.learning_rate says; lower --sched.LambdaLR.warmup_steps"
        )
    beyond = [step for step in schedule.steps if step >= last_step]
    if beyond:
        warnings.append(f"sched.LambdaLR.steps {beyond} come after the run's last step, which is {last_step}")
    return warnings


def _list_prompt_mismatches(config: Config) -> list[str]:
    warnings = []
    prompts, data = config.prompts, config.dataset
    if not prompts.use_points or data.positive_points == 0:
        warnings.append(
            "trains without positive points, but the generator prompts with points alone: it will find little; "
            "--prompts.use_points true --dataset.positive_points 1 trains what it reads"
        )
    elif (
        (prompts.use_boxes or prompts.use_masks)
        and not prompts.mix
        or data.positive_points > 1
        or data.negative_points > 0
    ):
        warnings.append(
            "every training prompt holds more than the one point that the generator prompts with; "
            "what is learnt from them need not show in its masks"
        )
    if prompts.use_points and not data.snap_to_grid:
        warnings.append("points are not snapped to the generator's grid (dataset.snap_to_grid false)")
    return warnings


def _in_millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
