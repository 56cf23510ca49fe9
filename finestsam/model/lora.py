"""Low-rank adaptation: a frozen layer W x becomes (W + s B A) x, and only the narrow matrices A and B train.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685).
"""

import math
from collections.abc import Iterator

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from finestsam.config import LoraConfig

# The layers that get LoRA, by setting; each text is the end of a layer's full name.
ATTENTION = ("attn.qkv", "attn.proj")
MLP = ("mlp.lin1", "mlp.lin2", "mlp.fc1", "mlp.fc2")  # as SAM and as TinyViT call them
ENCODER_LAYERS = {"none": (), "attention": ATTENTION, "all": (*ATTENTION, *MLP)}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
DECODER_LAYERS = {"none": (), "attention": PROJECTIONS, "all": (*PROJECTIONS, "lin1", "lin2")}
WIDE, NARROW = "lora_B.weight", "lora_A.weight"


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank addition, which starts at zero.

    Args:
        layer: its weight and bias are shared, not copied, and keep their names.
        rank: r, the width between A, r x in, and B, out x r.
        alpha: the addition is scaled by s = alpha / r.
        dropout: share of the inputs of A that is dropped in training.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        nn.Module.__init__(self)  # nn.Linear.__init__ would create a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        options = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, **options)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))

    def merge(self) -> Tensor:
        """Return W + s B A, with a gradient."""
        return merge(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)


def merge(weight: Tensor, narrow: Tensor, wide: Tensor, scale: float) -> Tensor:
    """Return W + s B A: `weight` out x in, `narrow` A r x in, `wide` B out x r."""
    return torch.addmm(weight, wide, narrow, alpha=scale)


def weight_of(layer: nn.Linear) -> Tensor:
    """Return the matrix that a layer multiplies with, out x in, for algebra that does not call the layer.

    Without dropout, because there is no input to drop.
    """
    return layer.merge() if isinstance(layer, LoraLinear) else layer.weight


def mount_lora_(sam: Sam, lora: LoraConfig, whole_blocks: int = 0) -> None:
    """Add LoRA to the layers that the settings name.

    Args:
        whole_blocks: how many of the image encoder's last blocks train whole; they get no LoRA.
    """
    if lora.rank == 0:
        return
    blocks = sam.image_encoder.blocks
    for block in blocks[: len(blocks) - whole_blocks]:
        _replace_layers_(block, ENCODER_LAYERS[lora.encoder], lora)
    _replace_layers_(sam.mask_decoder.transformer, DECODER_LAYERS[lora.decoder], lora)


def _replace_layers_(root: nn.Module, endings: tuple[str, ...], lora: LoraConfig) -> None:
    named = [(name, module) for name, module in root.named_modules() if name.endswith(endings) and endings]
    for name, layer in named:
        parent, _, own_name = name.rpartition(".")
        adapted = LoraLinear(layer, lora.rank, lora.alpha, lora.dropout)
        setattr(root.get_submodule(parent), own_name, adapted)


def list_lora(part: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the LoRA layers of a SAM, or of a part of one, with their names."""
    return ((name, module) for name, module in part.named_modules() if isinstance(module, LoraLinear))


def plain_state_dict(sam: Sam) -> dict[str, Tensor]:
    """Return the weights as segment_anything names them, with LoRA merged into its layers."""
    merged = {f"{name}.weight": layer.merge().detach() for name, layer in list_lora(sam)}
    state = sam.state_dict()
    return {name: merged.get(name, value) for name, value in state.items() if not is_lora(name)}


def load_plain_(sam: Sam, state: dict[str, Tensor]) -> None:
    """Load plain weights, as `plain_state_dict` returns them, and reset LoRA to zero."""
    own = {
        name: torch.zeros_like(value) if name.endswith(WIDE) else value
        for name, value in sam.state_dict().items()
        if is_lora(name)
    }
    sam.load_state_dict(state | own)


def is_lora(name: str) -> bool:
    """Whether a weight of this name belongs to LoRA."""
    return name.endswith((WIDE, NARROW))
