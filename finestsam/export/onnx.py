"""A SAM as two ONNX files: the encoder embeds an image once, the decoder predicts masks from prompts and embedding.

Names are those of segment_anything's own export of the decoder, where it has them. Its export resizes masks to one
fixed image size; here the program that uses the files resizes them.
"""

import importlib
import warnings
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from finestsam.errors import UserError
from finestsam.model.sam import FinestSam

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
DATA_SUFFIX = ".data"  # of the file beside it that holds weights too large for the ONNX file
DECODER_INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input")
DECODER_OUTPUTS = ("low_res_masks", "iou_predictions")
# Protocol buffers hold at most 2 GiB; the rest is for the graph.
MAX_WEIGHT_BYTES = 2_000_000_000
OPSET = 18
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise unless all packages that write and run the files are installed."""
    problems = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f'export.format onnx: {"; ".join(problems)}; first run: pip install "finestsam[onnx]", which is: '
            f"pip install {' '.join(PACKAGES)}"
        )


def write_onnx(model: FinestSam, folder: Path) -> None:
    """Write both files of a model, which is on the CPU, into a folder."""
    sam, size = model.sam, model.image_size
    channels, side = sam.prompt_encoder.embed_dim, sam.prompt_encoder.image_embedding_size[0]
    height, width = (Dim(name, min=2, max=size) for name in ("height", "width"))
    _write(
        folder / ENCODER,
        EncoderGraph(sam),
        {"image": torch.zeros(1, 3, size - 4, size - 8)},
        ("image_embeddings",),
        [{2: height, 3: width}],
    )
    # 2 prompts of 3 points: the exporter could take a 1 for fixed, and equal numbers for the same dimension.
    shapes = ((1, channels, side, side), (2, 3, 2), (2, 3), (1, 1, 4 * side, 4 * side), (1,))
    prompts = {0: Dim("prompts"), 1: Dim("points")}
    _write(
        folder / DECODER,
        DecoderGraph(sam),
        {name: torch.zeros(shape) for name, shape in zip(DECODER_INPUTS, shapes, strict=True)},
        DECODER_OUTPUTS,
        [None, prompts, prompts, None, None],
    )


def _write(
    path: Path, graph: nn.Module, example: dict[str, torch.Tensor], outputs: tuple[str, ...], sizes: list[dict | None]
) -> None:
    """Write one file.

    Args:
        example: the inputs, by name.
        sizes: for each input the names of its dynamic dimensions, by index.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that two inputs share the dimension `prompts`, which is intended
        program = torch.onnx.export(
            graph.eval(),
            tuple(example.values()),
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=sizes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # source locations, with the paths of this machine
        weight_bytes = sum(value.nbytes for value in graph.state_dict().values())
        program.save(path, external_data=weight_bytes > MAX_WEIGHT_BYTES)


class EncoderGraph(nn.Module):
    """Image -> embedding, with normalisation and padding inside."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.register_buffer("mean", sam.pixel_mean.clone())
        self.register_buffer("deviation", sam.pixel_std.clone())

    def forward(self, image: Tensor) -> Tensor:
        """Return the embedding, 1 x C x g x g.

        Args:
            image: 1 x 3 x h x w, RGB, 0 to 255, input frame before padding.
        """
        side = self.image_encoder.img_size
        x = (image - self.mean) / self.deviation
        x = F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2]))
        if isinstance(self.image_encoder, ImageEncoderViT):
            return ImageEncoderViT.forward(self.image_encoder, x)
        return self.image_encoder(x)


class DecoderGraph(nn.Module):
    """Embedding and prompts -> the logits and scores of all four mask tokens."""

    def __init__(self, sam: Sam):
        super().__init__()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.image_size = sam.image_encoder.img_size
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe().detach())

    def forward(
        self, embedding: Tensor, points: Tensor, labels: Tensor, mask_input: Tensor, has_mask_input: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits, N x 4 x 4g x 4g, and the scores, N x 4.

        Args:
            embedding: 1 x C x g x g.
            points: N x P x 2, XY, input frame.
            labels: N x P, float: 1 inside, 0 outside, 2 and 3 a box's corners, -1 no point.
            mask_input: 1 x 1 x 4g x 4g, the logits of a mask prompt that all N prompts share.
            has_mask_input: 1, float: 1: use `mask_input`, 0: there is none.
        """
        encoder = self.prompt_encoder
        masks = encoder.mask_downscaling(mask_input)
        no_mask = encoder.no_mask_embed.weight[:, :, None, None]
        return self.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=self.image_pe,
            sparse_prompt_embeddings=self._embed_points(points, labels[..., None]),
            dense_prompt_embeddings=torch.where(has_mask_input[:, None, None, None] > 0, masks, no_mask),
        )

    def _embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return N x P x C. segment_anything assigns to masked positions, which cannot be exported."""
        encoder = self.prompt_encoder
        position_encoding = encoder.pe_layer._pe_encoding((points + 0.5) / self.image_size)
        embedded = torch.where(labels == -1, encoder.not_a_point_embed.weight, position_encoding)
        for label, kind in enumerate(encoder.point_embeddings):
            embedded = torch.where(labels == label, position_encoding + kind.weight, embedded)
        return embedded
