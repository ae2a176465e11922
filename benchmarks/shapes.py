"""The shapes that matter, by name."""

from dataclasses import dataclass

import torch

__all__ = ["LayerShape", "TranslateShape", "layer_shape", "layer_tokens", "translate_shapes"]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One mixture-of-experts layer, top-2."""

    name: str
    d_model: int
    ffn_dim: int
    num_experts: int

    @property
    def expert_weights(self) -> int:
        """Numbers in the two matrices of one expert."""
        return 2 * self.d_model * self.ffn_dim


@dataclass(frozen=True, kw_only=True)
class TranslateShape:
    """How a file is translated."""

    batch: int
    beam: int


NLLB_MOE_54B = LayerShape(name="nllb-moe-54b-layer", d_model=2048, ffn_dim=8192, num_experts=128)
NLLB_MOE_HALF_WIDTH = LayerShape(
    name="nllb-moe-half-width-layer", d_model=1024, ffn_dim=4096, num_experts=128
)
"""The layer of the 54B at half its width: 4.3 GB in float32, which a laptop holds."""

CPU_TOKENS = (4, 32, 256, 2048)
"""One sentence with beam 4; eight of them; a short batch to encode; a full one."""

GPU_TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)
"""From decoding one sentence greedily, over larger batches, to encoding and training."""

CPU_TRANSLATE = (
    TranslateShape(batch=1, beam=1),
    TranslateShape(batch=32, beam=1),
    TranslateShape(batch=32, beam=4),
)
GPU_TRANSLATE = (*CPU_TRANSLATE, TranslateShape(batch=128, beam=4))


def layer_shape(device: torch.device) -> LayerShape:
    """Return the layer that is measured on a kind of device."""
    return NLLB_MOE_54B if device.type == "cuda" else NLLB_MOE_HALF_WIDTH


def layer_tokens(device: torch.device) -> tuple[int, ...]:
    """Return the numbers of tokens that a layer is measured at on a kind of device."""
    return GPU_TOKENS if device.type == "cuda" else CPU_TOKENS


def translate_shapes(device: torch.device) -> tuple[TranslateShape, ...]:
    """Return how translation is measured on a kind of device."""
    return GPU_TRANSLATE if device.type == "cuda" else CPU_TRANSLATE
