"""Every setting: its name, type, default, valid range and what it does.

The command line, the YAML file, `--help` and the checks are all made from these dataclasses. Names that finestSAM has
are kept. Nothing heavy is imported here, so that `--help` and a mistyped flag are reported at once.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

MODES = ("train", "predict", "evaluate", "check", "convert", "export")
PRESETS = ("laptop", "colab", "gpu_24gb", "gpu_80gb", "multi_gpu")  # files of presets/


def setting(default: Any, help: str, valid: str | None = None) -> Any:
    """Declare one setting.

    Args:
        valid: the interval that numbers must lie in, in mathematical notation: "(0, 1]", "[0, inf)".
    """
    metadata = {"help": help, "valid": valid}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type) -> Any:
    return field(default_factory=kind)


# Where nothing is known of the memory.
CHUNK_OBJECTS = 16

LARGEST_WHOLE_NUMBER = 2**63 - 1  # of what counts steps and seeds generators
PATCH_SIZE = 16
IMAGE_SIZE_RANGE = (2 * PATCH_SIZE, 4096)  # pixels of the longest side
# Pixels of the longest side that each type of model is made for.
IMAGE_SIZES = {"vit_h": 1024, "vit_l": 1024, "vit_b": 1024, "vit_t": 1024, "vit_tiny": 768, "vit_tiny_test": 64}


@dataclass(frozen=True)
class ModelConfig:
    type: Literal["auto", "vit_h", "vit_l", "vit_b", "vit_t", "vit_tiny", "vit_tiny_test"] = setting(
        "auto",
        "SAM's size; auto: what the checkpoint holds, vit_b where there is none. vit_t is MobileSAM, and needs the "
        "package timm; vit_tiny suits a laptop",
    )
    checkpoint: str = setting(
        "auto",
        "weights to start from: a .pth or .safetensors file, a run, an adapter's folder, none (random weights), or "
        "auto (Meta's or MobileSAM's file, downloaded when it is missing; for vit_tiny those that come with finestsam; "
        "in predict, evaluate and export the newest run of sav_dir first)",
    )
    image_size: int | None = setting(
        None,
        "pixels of the longest side that the model sees, a multiple of 16; default: what the weights were made for. "
        "Another size has its position embeddings interpolated, and is worth training at",
        f"[{IMAGE_SIZE_RANGE[0]}, {IMAGE_SIZE_RANGE[1]}]",
    )


@dataclass(frozen=True)
class PromptsConfig:
    use_boxes: bool = setting(True, "train with boxes; prompts.use_logits: false")
    use_points: bool = setting(True, "train with points, which is what the generator prompts with")
    use_masks: bool = setting(False, "train with a coarse, perturbed version of the mask as input")
    use_logits: bool = setting(
        False,
        "train with the logits that the previous epoch gave for the object; before there are any, as use_masks says",
    )
    mix: bool = setting(
        True,
        "prompt the objects of each training image with one of the kinds that are turned on, another one from epoch to "
        "epoch at random, instead of with all of them together; prompts.use_logits: false",
    )
    correction_clicks: int = setting(
        0,
        "clicks that correct the first masks on half of the training images, one after the other: each in the middle "
        "of the largest error, together with the logits of the mask before, as annotators work and --mode evaluate "
        "measures. All masks of an object share its weight; each click takes at least as long as the first prompt",
        "[0, 20]",
    )


@dataclass(frozen=True)
class RatesConfig:
    image_encoder: float = setting(1.0, "learning rate of the image encoder, as a share of learning_rate", "(0, 1000]")


@dataclass(frozen=True)
class OptConfig:
    learning_rate: float = setting(4e-5, "peak learning rate of AdamW; from scratch 1e-3 is a good start", "(0, 1]")
    head_learning_rate: float = setting(
        1e-3, "peak learning rate of the head of --task classes and semantic, which starts from nothing", "(0, 1]"
    )
    weight_decay: float = setting(1e-4, "AdamW's weight decay; norms, biases and embeddings have none", "[0, 1]")
    keep_original: float | Literal["auto"] = setting(
        0.0,
        "share of the weights that training started from in those that it ends with, so that the model forgets less of "
        "what it could; auto: of 0, 0.1, 0.2, 0.3 and 0.5 the one that validates best. A blend has no adapter file",
        "[0, 1]",
    )
    accumulate_batches: int = setting(1, "batches per optimizer step", "[1, inf)")
    rates: RatesConfig = section(RatesConfig)


@dataclass(frozen=True)
class LambdaLRConfig:
    decay_factor: float = setting(
        10.0, "after the k-th entry of steps the rate is divided by this to the power k", "[1, inf)"
    )
    steps: list[float] = setting(
        [],
        "optimizer steps after which the rate decays, rising; those below 1 are shares of all steps: [0.6, 0.85]",
        "(0, inf)",
    )
    warmup_steps: int = setting(
        50,
        "optimizer steps of linear warm-up, the first above zero; at most a tenth of the run where steps are shares",
        "[0, inf)",
    )


@dataclass(frozen=True)
class ReduceLROnPlateauConfig:
    decay_factor: float = setting(0.5, "the rate is multiplied by this", "(0, 1)")
    epoch_patience: int = setting(10, "epochs without improvement before it is", "[0, inf)")
    threshold: float = setting(1e-4, "smallest relative improvement that counts", "[0, 1]")
    cooldown: int = setting(0, "evaluations to wait after a decay", "[0, inf)")
    min_lr: float = setting(0.0, "the rate never falls below this", "[0, 1]")


@dataclass(frozen=True)
class SchedConfig:
    type: Literal["LambdaLR", "ReduceLROnPlateau"] = setting(
        "LambdaLR",
        "LambdaLR: warm-up, then decay at given steps; ReduceLROnPlateau: decay when validation stands still",
    )
    LambdaLR: LambdaLRConfig = section(LambdaLRConfig)
    ReduceLROnPlateau: ReduceLROnPlateauConfig = section(ReduceLROnPlateauConfig)


@dataclass(frozen=True)
class LossesConfig:
    focal_ratio: float = setting(20.0, "weight of the focal loss", "[0, inf)")
    dice_ratio: float = setting(1.0, "weight of the Dice loss", "[0, inf)")
    iou_ratio: float = setting(1.0, "weight of the score head's squared error", "[0, inf)")
    focal_alpha: float = setting(
        0.8, "share of the focal loss given to pixels inside; below 0: no balancing", "[-1, 1]"
    )
    focal_gamma: float = setting(2.0, "how much easy pixels are played down", "[0, inf)")
    resolution: Literal["original", "input", "low"] = setting(
        "original",
        "frame of the loss: the file's pixels, the resized image's, or the decoder's own (a quarter of the input's "
        "side: cheapest, but another gradient)",
    )


@dataclass(frozen=True)
class FreezeConfig:
    image_encoder: bool = setting(True, "keep the image encoder as it is")
    prompt_encoder: bool = setting(True, "keep the prompt encoder as it is")
    mask_decoder: bool = setting(False, "keep the mask decoder as it is")


@dataclass(frozen=True)
class ThawConfig:
    blocks: int = setting(0, "train the last blocks of the frozen image encoder, and its neck", "[0, 64]")


@dataclass(frozen=True)
class LoraConfig:
    rank: int = setting(0, "rank of the low-rank additions that train beside frozen layers; 0: none", "[0, 1024]")
    alpha: float = setting(16.0, "their strength: they are scaled by alpha / rank", "(0, inf)")
    dropout: float = setting(
        0.0, "share of their inputs that is dropped in training; the decoder's attention does without", "[0, 1)"
    )
    encoder: Literal["none", "attention", "all"] = setting(
        "attention",
        "layers of the image encoder's blocks that get one: qkv and projection of attention; all: the MLP's as well",
    )
    decoder: Literal["none", "attention", "all"] = setting(
        "none", "layers of the mask decoder's transformer that get one; with model_layer.freeze.mask_decoder true"
    )

    @property
    def adapts_encoder(self) -> bool:
        return self.rank > 0 and self.encoder != "none"

    @property
    def adapts_decoder(self) -> bool:
        return self.rank > 0 and self.decoder != "none"


@dataclass(frozen=True)
class FftAttentionConfig:
    blocks: Literal["none", "global", "windowed", "all"] = setting(
        "none",
        "blocks of the image encoder whose attention training replaces by one through the Fourier transform, which "
        "costs N log N instead of N^2 for N tokens and gives other outputs: those that see the whole image, windows "
        "of it, or all. Weights that have some keep them. segment_anything refuses such weights",
    )
    distill_steps: int = setting(
        100,
        "before training, steps of one image each in which the replaced blocks learn to give what the original "
        "ones do, frozen encoder or not; afterwards freeze.image_encoder decides. Not from random weights",
        "[0, inf)",
    )


@dataclass(frozen=True)
class ModelLayerConfig:
    freeze: FreezeConfig = section(FreezeConfig)
    thaw: ThawConfig = section(ThawConfig)
    fft_attention: FftAttentionConfig = section(FftAttentionConfig)
    lora: LoraConfig = section(LoraConfig)
    recompute_encoder: bool = setting(
        False,
        "where the image encoder trains, compute its blocks again for their gradients instead of keeping what they "
        "were made of: less memory for more time",
    )

    @property
    def trains_encoder(self) -> bool:
        return not self.freeze.image_encoder or self.thaw.blocks > 0 or self.lora.adapts_encoder


@dataclass(frozen=True)
class ImagesConfig:
    max_pixels: int = setting(178_956_970, "a file that claims more pixels is refused before it is decoded", "[1, inf)")
    deep_range: Literal["percentile", "full"] = setting(
        "percentile",
        "how 16-bit and float images become 8-bit: percentile: stretched between the image's own 0.1 and 99.9 "
        "percentiles; full: the whole range of the number type",
    )


@dataclass(frozen=True)
class DatasetConfig:
    path: str | None = setting(None, "folder of the labelled images; --dataset is short for it")
    labels: Literal["complete", "partial"] = setting(
        "complete",
        "complete: every object of an image is annotated, so a mask that fits no annotation is wrong: training teaches "
        "the score 0 where no object is, and thresholds and best weights are chosen by F1. partial: some objects are "
        "not annotated: no background_points, thresholds and best weights are chosen by recall, and in --task semantic "
        "pixels of no object are neither trained on nor scored, where else they are background",
    )
    auto_split: bool | None = setting(
        None, "true: split data/; false: read train/ and val/; default: whichever of the two is there"
    )
    seed: int = setting(42, "seed of the split", "[0, inf)")
    val_size: float = setting(0.1, "share of the images that are validated on, at least one; 0: none", "[0, 1)")
    use_cache: bool = setting(True, "keep what the check of the dataset found, made anew when a file changes")
    sav: str | None = setting(
        None, "name of a file beside the annotations to keep it in; default: in the user's cache folder"
    )
    masks_from_boxes: bool = setting(False, "take the box for the mask where an annotation has nothing else")
    include_crowd: bool = setting(False, "train on crowd regions (iscrowd 1) as if each were one object")
    dedup: bool = setting(False, "of annotations with exactly the same mask in one image keep the first")
    follow_symlinks: bool = setting(False, "read files that are links to files outside the dataset")
    mask_instances: Literal["auto", "components", "values", "classes"] = setting(
        "auto",
        "objects of a mask image: its connected components, or its different grey values; auto: values where a "
        "lossless file has more than two of them; classes: values, and each is a category of its own",
    )
    min_region_pixels: int = setting(16, "components of a mask image that are smaller are specks, dropped", "[0, inf)")
    download: Literal["coco-val2017", "coco-train2017"] | None = setting(
        None, "fetch this part of COCO into the folder first; --download is short for it"
    )
    download_images: int | None = setting(None, "only so many of its images", "[1, inf)")
    images: ImagesConfig = section(ImagesConfig)
    positive_points: int = setting(1, "points inside each object", "[0, 1000]")
    negative_points: int = setting(0, "points outside each object, inside its box where there is room", "[0, 1000]")
    prompts_per_object: int = setting(
        1,
        "prompts for each object of a training image in a step, each with other points; on the grid at most as many as "
        "the object has grid points, as the generator uses every one. They share its weight, and the step takes "
        "so many times as long",
        "[1, 1024]",
    )
    background_points: int = setting(
        32,
        "points of the grid in each training image where no object is, whose masks are taught the score 0: the "
        "generator prompts there, too. dataset.labels partial: 0",
        "[0, 1024]",
    )
    use_center: bool = setting(
        False, "the first positive point is the centre, the pixel deepest inside, in every epoch; false: all vary"
    )
    snap_to_grid: bool = setting(
        True, "positive points lie on the generator's grid wherever the object covers any of it"
    )
    max_objects: int = setting(
        64,
        "objects of an image in a training step, a random choice where there are more; 0: all",
        "[0, inf)",
    )


@dataclass(frozen=True)
class AugmentConfig:
    """How training images vary; each setting's default leaves them alone. Validation never varies them."""

    orientations: Literal["upright", "mirrored", "all"] = setting(
        "upright",
        "mirrored: half of the images are mirrored, left to right; all: every one of the eight orientations is as "
        "likely, for images without an upper side, such as maps and cells",
    )
    crop_min: float = setting(
        1.0, "smallest share of the image's area that a crop keeps, a little narrower or wider; 1: no crop", "(0, 1]"
    )
    light: float = setting(
        0.0, "largest change of brightness and contrast: 0.2 multiplies each by 0.8 to 1.2", "[0, 1)"
    )
    colour: float = setting(
        0.0, "largest change of saturation, as with light, and of hue: 0.5 turns the colour circle by a tenth", "[0, 1)"
    )
    variants: int = setting(
        0, "variants of each image, which the epochs see in turn; 0: another one in each epoch", "[0, inf)"
    )

    @property
    def moves_pixels(self) -> bool:
        return self.orientations != "upright" or self.crop_min < 1

    @property
    def is_active(self) -> bool:
        return self.moves_pixels or max(self.light, self.colour) > 0


@dataclass(frozen=True)
class GeneratorConfig:
    """The automatic mask generator's settings; null means: as stored beside the weights, else `GENERATOR_DEFAULTS`."""

    points_per_side: int | None = setting(None, "points along each side of the generator's grid, SAM: 32", "[1, 512]")
    masks_per_point: Literal["all", "best"] | None = setting(
        None,
        "all: of a point's three masks all that pass, ranked by predicted IoU, as SAM does; best: the one with the "
        "highest predicted IoU, ranked by predicted IoU times stability, which is what training chooses thresholds for",
    )
    points_per_batch: int = setting(64, "points decoded at a time: memory against speed", "[1, 4096]")
    pred_iou_thresh: float | None = setting(None, "masks must have a predicted IoU above this, SAM: 0.88", "[0, 1]")
    stability_score_thresh: float | None = setting(None, "masks must be at least this stable, SAM: 0.95", "[0, 1]")
    stability_score_offset: float = setting(1.0, "how far the cutoff is moved to measure stability, logits", "(0, inf)")
    box_nms_thresh: float | None = setting(
        None, "of masks whose boxes overlap more than this, the best stays, SAM: 0.7", "[0, 1]"
    )
    no_object_thresh: float | None = setting(
        None,
        "masks whose probability to be no object is above this are dropped, before duplicates are; of models that give "
        "masks a category. 1: none is",
        "[0, 1]",
    )
    crop_n_layers: int | None = setting(
        None, "layers of crops that are searched as well, layer n in 4^n crops, SAM: 0", "[0, 4]"
    )
    crop_nms_thresh: float = setting(0.7, "as box_nms_thresh between crops, where the smaller crop wins", "[0, 1]")
    crop_overlap_ratio: float = setting(
        512 / 1500, "overlap of the first layer's crops, share of the short side", "[0, 1]"
    )
    crop_n_points_downscale_factor: int = setting(
        1, "layer n has its grid's side divided by this to the power n", "[1, 16]"
    )
    min_mask_region_area: int | None = setting(
        None, "holes and islands of fewer pixels are filled and dropped, SAM: 0", "[0, inf)"
    )


# segment_anything's own, chosen by its authors for vit_h; and where no object is as likely as all categories together.
GENERATOR_DEFAULTS = {
    "points_per_side": 32,
    "masks_per_point": "all",
    "pred_iou_thresh": 0.88,
    "stability_score_thresh": 0.95,
    "box_nms_thresh": 0.7,
    "no_object_thresh": 0.5,
    "crop_n_layers": 0,
    "min_mask_region_area": 0,
}


@dataclass(frozen=True)
class StoreConfig:
    """The store of the embeddings that a frozen image encoder computes, so that it runs once for each image."""

    folder: str | None = setting(None, "where; default: in the user's cache folder")
    max_gigabytes: float = setting(
        20.0,
        "of the disk at most (2 MB an image at 1024 pixels); the least recently used go first; 0: none is kept",
        "[0, inf)",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    split: Literal["auto", "train", "val", "test"] = setting(
        "auto",
        "which images; auto: those that the weights' own run validated on, where the dataset is the same; else val "
        "where there is one, and a dataset in one folder whole",
    )
    against: str = setting(
        "auto",
        "weights to compare with on the same images, the baseline; auto: those that the training started from, at the "
        "same image size, where they are still there; none: no comparison",
    )
    generator: bool = setting(
        True, "run the automatic mask generator as well, in validation too, and score it with COCO's measures"
    )
    clicks: int = setting(
        8, "corrective clicks on each object in --mode evaluate, as an annotator sets them; 0: none", "[0, 20]"
    )
    all_prompts: bool = setting(
        False,
        "in each validation of a training as well, prompt with the box of every object, and correct its mask click "
        "by click: one more prediction for each object and click",
    )
    predictions: str | None = setting(
        None, "score this COCO results file, of any program, instead of the generator's masks of a model"
    )
    search: bool | None = setting(
        None,
        "choose the generator's thresholds, those that are not given, on the same images; default: in training, "
        "which stores them beside the weights; not in --mode evaluate, which takes the stored ones",
    )
    goal: Literal["recall", "f1"] = setting(
        "f1",
        "what the generator's thresholds are chosen for; f1: the harmonic mean of precision and recall; recall: the "
        "share of objects found, where a hundred masks cost as much as one object. dataset.labels partial: recall",
    )
    store_thresholds: bool = setting(
        False,
        "write the thresholds that evaluate.search finds in --mode evaluate beside the weights, in place of those that "
        "are stored there",
    )
    max_images: int = setting(
        0, "images that the generator runs on in training's validation, the first ones; 0: all", "[0, inf)"
    )


@dataclass(frozen=True)
class CheckConfig:
    samples: int = setting(
        12, "images on the contact sheet, with masks and the points that training prompts with; 0: none", "[0, 1000]"
    )


@dataclass(frozen=True)
class ConvertConfig:
    images: Literal["link", "copy"] = setting(
        "link", "link: one file under two names, without extra space, where the disk allows, else a copy"
    )
    split: bool = setting(
        False,
        "write train/ and val/ by dataset.val_size; false: data/, to be split in training. Folders that are "
        "split already stay so",
    )


@dataclass(frozen=True)
class ExportConfig:
    format: Literal["onnx", "huggingface", "sam"] = setting(
        "onnx",
        "onnx: image encoder and decoder for onnxruntime, checked against torch; huggingface: a folder that "
        "transformers' SamModel loads; sam: a plain state dict for segment_anything, adapters merged",
    )


@dataclass(frozen=True)
class Config:
    task: Literal["auto", "masks", "classes", "semantic"] = setting(
        "auto",
        "what is trained: masks of objects; classes, masks with a category for each; or semantic, a class for each "
        "pixel; auto: masks, in predict and evaluate what the weights were trained for",
    )
    preset: Literal["auto", "none", "laptop", "colab", "gpu_24gb", "gpu_80gb", "multi_gpu"] = setting(
        "auto",
        "defaults of training for a machine or a model, which every setting that is given overrides; auto: by the "
        "model and the device; none: none",
    )
    device: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = setting("auto", "hardware; tpu is passed on, untried")
    num_devices: int | list[int] | Literal["auto"] = setting("auto", "how many devices, or which ones: [0, 2]")
    num_nodes: int = setting(1, "machines that train together", "[1, inf)")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = setting(
        "auto",
        "of the image encoder, and of the images that the mask generator's decoder looks at; points, boxes, scores, "
        "training's decoder and losses are always float32. auto: bf16-mixed on GPUs and CPUs that compute in it, "
        "else 32-true",
    )
    seed_device: int | None = setting(1337, "seed of everything random; null: another one each time", "[0, 4294967295]")
    sav_dir: str = setting("sav", "folder of the runs")
    run_name: str | None = setting(None, "folder of this run below sav_dir; default: the time it started")
    out_dir: str = setting("out", "folder of predictions, evaluations, reports, converted datasets, exported weights")
    strict: bool = setting(False, "refuse a dataset with any defect, where else it is skipped and reported")
    resume: str | None = setting(
        None,
        "continue a run: its folder, or auto for the newest of sav_dir; in predict, auto: leave out the images that "
        "out_dir has the results of (not with weights for classes of pixels). auto is also what the flag alone means",
    )
    input: list[str] = setting([], "images to predict: files, folders, patterns")
    polygons: bool = setting(
        False,
        "write outlines into predictions.json instead of run lengths, for tools that read no others, such as Label "
        "Studio's importer; holes are filled",
    )
    correct_scores: bool = setting(
        False, "report scores as corrected by the map stored beside the weights, the IoU to be expected of them"
    )
    opacity: float = setting(0.9, "of the masks laid over the image, 0 invisible, 1 solid", "[0, 1]")

    model: ModelConfig = section(ModelConfig)
    seed_dataloader: int | None = setting(None, "seed of order and prompts; default: seed_device", "[0, inf)")
    batch_size: int = setting(1, "images per step and device", "[1, inf)")
    num_workers: int = setting(2, "processes that read images ahead; 0: none", "[0, inf)")
    num_epochs: int = setting(30, "times that every image is seen", "[1, inf)")
    max_steps: int = setting(0, "stop after this many optimizer steps even so; 0: never", "[0, inf)")
    eval_interval: int = setting(1, "epochs between validations; 0: only before and after", "[0, inf)")
    early_stop_evaluations: int = setting(
        0, "stop after this many validations without a better one; 0: never", "[0, inf)"
    )
    best_metric: Literal[
        "auto",
        "val_generator_ar_100",
        "val_generator_ar_1000",
        "val_generator_ap",
        "val_generator_f1",
        "val_per_mask_iou",
        "val_best_iou",
        "val_classes_ar_100",
        "val_classes_ap",
    ] = setting(
        "auto",
        "what the best weights are chosen by, and ReduceLROnPlateau waits for. ar_100, the share of the objects that "
        "the generator's 100 best masks of an image find, also holds where images are partly labelled: a mask that "
        "fits no label costs nothing but its place among them. ap and f1 count it as wrong. auto: "
        "val_generator_ar_100, and in --task classes val_classes_ar_100, the mean over categories of the objects found "
        "under their own. Of equals, and where the generator does not run, val_per_mask_iou decides",
    )
    save_top_k: int = setting(0, "keep this many of the best weights, named {step}-{best_metric}.pth", "[0, inf)")
    chunk_objects: int | None = setting(
        None,
        "objects decoded at a time in training and validation, with the gradient of all together; default: as many as "
        "the memory found takes",
        "[1, inf)",
    )
    multimask_output: bool = setting(
        True, "train and predict three masks for a prompt, the best of which counts; false: the decoder's single mask"
    )
    prompts: PromptsConfig = section(PromptsConfig)
    opt: OptConfig = section(OptConfig)
    sched: SchedConfig = section(SchedConfig)
    losses: LossesConfig = section(LossesConfig)
    model_layer: ModelLayerConfig = section(ModelLayerConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    augment: AugmentConfig = section(AugmentConfig)
    generator: GeneratorConfig = section(GeneratorConfig)
    store: StoreConfig = section(StoreConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    check: CheckConfig = section(CheckConfig)
    convert: ConvertConfig = section(ConvertConfig)
    export: ExportConfig = section(ExportConfig)


# Where some objects are not annotated, a mask that fits no annotation is not known to be wrong.
PARTIAL_LABELS_DEFAULTS = {
    "dataset.background_points": 0,
    "evaluate.goal": "recall",
}

# Of models whose masks or pixels have classes.
HEADS_STAY = "no export format has a place for its head; --task masks exports the SAM that is beneath it"


def list_derived_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return {dotted name: value} of the defaults that follow from the labels and prompts given here."""
    derived = dict(PARTIAL_LABELS_DEFAULTS) if values["dataset.labels"] == "partial" else {}
    if values["prompts.use_logits"]:  # the logits of the epoch before go with the prompts that gave them
        derived |= {"prompts.use_boxes": False, "prompts.mix": False}
    return derived


def list_settings(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield every setting's dotted name and field, in the order of this page."""
    for entry in dataclasses.fields(kind):
        if dataclasses.is_dataclass(entry.type):
            yield from list_settings(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry


def list_choices(kind: Any) -> list[str]:
    """Return the words that a setting of this type may be; none where it may be something else."""
    choices = [choice for part in get_args(kind) for choice in (get_args(part) or [part]) if part is not type(None)]
    return choices if choices and all(isinstance(choice, str) for choice in choices) else []


def build_config(values: dict[str, Any], kind: type = Config, prefix: str = "") -> Any:
    """Make a Config from {dotted name: value}; what is not given has its default."""
    arguments = {}
    for entry in dataclasses.fields(kind):
        name = prefix + entry.name
        if dataclasses.is_dataclass(entry.type):
            arguments[entry.name] = build_config(values, entry.type, f"{name}.")
        elif name in values:
            arguments[entry.name] = values[name]
    return kind(**arguments)


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of a Config, or of nested dictionaries."""
    flat = {}
    items = config.items() if isinstance(config, dict) else vars(config).items()
    for name, value in items:
        if isinstance(value, dict) or dataclasses.is_dataclass(value):
            flat.update(flatten_config(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def find_problems(mode: str, values: dict[str, Any]) -> list[str]:
    """Return every reason why these settings cannot work, one line each."""
    problems = find_misfits(mode, values)
    if mode == "train":
        problems += _find_training_problems(build_config(values))
    if mode == "evaluate":
        problems += _find_storing_problems(build_config(values).evaluate)
    return problems


def find_misfits(mode: str, values: dict[str, Any]) -> list[str]:
    """Return what is wrong with single settings, whatever the defaults of the others are, one line each."""
    problems = [
        f"{name} must lie in {entry.metadata['valid']}, got {value}"
        for name, entry in list_settings()
        for value in _list_numbers(values[name])
        if entry.metadata["valid"] and not lies_in(value, entry.metadata["valid"])
    ]
    if (
        mode in ("train", "evaluate", "check", "convert")
        and not values["dataset.path"]
        and not (mode == "train" and values["resume"])
    ):
        problems.append(f"--mode {mode} needs --dataset FOLDER")
    if mode == "train" and (values["model.type"], values["model.checkpoint"]) == ("vit_t", "none"):
        problems.append(
            "model.type vit_t cannot start from random weights (model.checkpoint none): its batch norms keep the "
            "statistics of the weights that they come with"
        )
    if mode == "predict" and values["resume"] not in (None, "auto"):
        problems.append(f"--mode predict goes on in its --out_dir: --resume takes no value, got {values['resume']}")
    if mode == "predict" and not values["input"]:
        problems.append("--mode predict needs --input IMAGE, a folder or a pattern")
    if mode == "export" and values["task"] in ("classes", "semantic"):
        problems.append(f"task {values['task']}: {HEADS_STAY}")
    return problems


def _find_storing_problems(evaluate: EvaluateConfig) -> list[str]:
    if not evaluate.store_thresholds:
        return []
    if evaluate.predictions or not evaluate.generator:
        return ["evaluate.store_thresholds needs a model's generator: no evaluate.predictions, evaluate.generator true"]
    if not evaluate.search:
        return ["evaluate.store_thresholds has nothing to store without --evaluate.search"]
    return []


def _find_training_problems(config: Config) -> list[str]:
    if config.task == "semantic":
        return _find_semantic_problems(config)
    problems = []
    prompts, losses = config.prompts, config.losses
    points = config.dataset.positive_points + config.dataset.negative_points
    if not (prompts.use_boxes or prompts.use_points or prompts.use_masks):
        problems.append("no prompts: turn on prompts.use_points, prompts.use_boxes or prompts.use_masks")
    if prompts.use_points and points == 0:
        problems.append("prompts.use_points needs dataset.positive_points or dataset.negative_points above 0")
    if config.dataset.prompts_per_object > 1 and not prompts.use_points:
        problems.append("dataset.prompts_per_object above 1 needs prompts.use_points: they differ in their points")
    if prompts.use_logits and config.augment.moves_pixels:
        problems.append(
            "prompts.use_logits needs images that stay in place: leave augment.orientations and crop_min as they are "
            "by default"
        )
    if prompts.mix and prompts.use_logits:
        problems.append("prompts.mix changes an object's prompts, prompts.use_logits needs the logits of the last")
    has_head = config.task == "classes"
    if not has_head and losses.focal_ratio == losses.dice_ratio == losses.iou_ratio == 0:
        problems.append("nothing is learnt: losses.focal_ratio, dice_ratio and iou_ratio are all 0")
    problems += _find_adapter_problems(config.model_layer, has_head)
    return problems + _find_schedule_problems(config)


def _find_semantic_problems(config: Config) -> list[str]:
    problems = []
    if config.opt.keep_original != 0:
        problems.append("opt.keep_original has no part in --task semantic, whose head starts from nothing; leave it 0")
    problems += _find_adapter_problems(config.model_layer, has_head=True)
    return problems + _find_schedule_problems(config)


def _find_schedule_problems(config: Config) -> list[str]:
    problems = []
    steps, warmup_steps = config.sched.LambdaLR.steps, config.sched.LambdaLR.warmup_steps
    are_shares = all(step < 1 for step in steps)
    if steps != sorted(set(steps)) or not are_shares and steps[0] <= warmup_steps:
        problems.append(
            f"sched.LambdaLR.steps must rise and begin after warmup_steps {warmup_steps}, or be shares below 1, "
            f"got {steps}"
        )
    return problems


def _find_adapter_problems(layers: ModelLayerConfig, has_head: bool) -> list[str]:
    problems = []
    freeze, thaw, lora = layers.freeze, layers.thaw, layers.lora
    trains = layers.trains_encoder or lora.adapts_decoder or has_head
    if freeze.prompt_encoder and freeze.mask_decoder and not trains:
        problems.append("nothing trains: model_layer.freeze holds image_encoder, prompt_encoder and mask_decoder")
    if thaw.blocks > 0 and not freeze.image_encoder:
        problems.append(
            "model_layer.thaw is for a frozen image encoder: it needs model_layer.freeze.image_encoder true"
        )
    if lora.adapts_encoder and not freeze.image_encoder:
        problems.append(
            "model_layer.lora.encoder trains beside frozen layers: it needs model_layer.freeze.image_encoder true"
        )
    if lora.adapts_decoder and not freeze.mask_decoder:
        problems.append(
            "model_layer.lora.decoder trains beside frozen layers: it needs model_layer.freeze.mask_decoder true"
        )
    if lora.rank > 0 and not (lora.adapts_encoder or lora.adapts_decoder):
        problems.append("model_layer.lora.rank has no layer to adapt: encoder and decoder are both none")
    return problems


def _list_numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [number for number in values if isinstance(number, int | float) and not isinstance(number, bool)]


def lies_in(value: float, interval: str) -> bool:
    """Whether a number lies in an interval in mathematical notation, as `setting` takes it."""
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE_NUMBER:
        return False
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below
