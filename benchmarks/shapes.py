"""The shapes that matter, by name."""

from dataclasses import dataclass

import torch

__all__ = [
    "BACKWARD_TOKENS",
    "PADDINGS",
    "AttentionShape",
    "LayerShape",
    "TranslateShape",
    "decode_shapes",
    "graph_shape",
    "graph_tokens",
    "layer_shape",
    "layer_tokens",
    "operation_shape",
    "operation_tokens",
    "training_shapes",
    "translate_shapes",
]


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One mixture-of-experts layer, top-2."""

    name: str
    d_model: int
    ffn_dim: int
    num_experts: int
    top_k: int = 2

    @property
    def expert_weights(self) -> int:
        """Numbers in the two matrices of one expert."""
        return 2 * self.d_model * self.ffn_dim


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One call of cross-attention."""

    sentences: int
    beams: int = 1
    length: int = 1
    """Target tokens of a hypothesis: one while decoding."""

    keys: int
    heads: int = 16
    d_head: int = 128

    @property
    def name(self) -> str:
        """The model that it is of, as a signature says it."""
        return f"{self.heads}-heads-of-{self.d_head}"

    @property
    def queries(self) -> int:
        """Query rows of one sentence."""
        return self.beams * self.length

    @property
    def sizes(self) -> str:
        """What tells it from other shapes, in a word."""
        return f"{self.sentences}x{self.queries}-S{self.keys}"


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

OPERATIONS_ON_CPU = LayerShape(
    name="quarter-width-layer-16-experts", d_model=512, ffn_dim=1024, num_experts=16
)
"""Operations one by one: large enough to be more than overhead, done in seconds."""

TOY = LayerShape(name="toy-layer", d_model=32, ffn_dim=64, num_experts=4)
"""For rehearsals, which run kernels in an interpreter."""

CPU_TOKENS = (4, 32, 256, 2048)
"""One sentence with beam 4; eight of them; a short batch to encode; a full one."""

GPU_TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)
"""From decoding one sentence greedily, over larger batches, to encoding and training."""

BACKWARD_TOKENS = (1024, 4096, 16384)
"""Training; decoding has no backward pass."""

OPERATION_TOKENS_ON_CPU = (32, 512)
TOY_TOKENS, TOY_BACKWARD_TOKENS = (1, 20), (20,)
"""One call of the path for few tokens, one of the other."""

DECODE_ON_GPU = (
    AttentionShape(sentences=32, beams=4, keys=64),
    AttentionShape(sentences=32, beams=1, keys=64),
    AttentionShape(sentences=8, beams=4, keys=64),
    AttentionShape(sentences=1, beams=1, keys=64),
    AttentionShape(sentences=1, beams=4, keys=512),
    AttentionShape(sentences=32, beams=5, keys=256),
)
"""Full batches and a few sentences; the last but one fills a GPU only if its keys are split."""

TRAINING_ON_GPU = (
    *(AttentionShape(sentences=32, length=size, keys=size) for size in (128, 256, 512)),
    AttentionShape(sentences=8, length=64, keys=1500, heads=20, d_head=64),
)
"""Sentences of one length with their translations; the last has the sizes of Whisper."""

DECODE_ON_CPU = (
    AttentionShape(sentences=32, beams=4, keys=64, d_head=64),
    AttentionShape(sentences=1, beams=5, keys=64, d_head=64),
)
TRAINING_ON_CPU = (AttentionShape(sentences=4, length=64, keys=64, d_head=64),)
TOY_DECODE = (AttentionShape(sentences=2, beams=3, keys=20, heads=1, d_head=16),)
TOY_TRAINING = (AttentionShape(sentences=2, length=17, keys=20, heads=1, d_head=16),)

PADDINGS = (0, 40)
"""Per cent of the keys that are padding, over all sentences."""

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


def operation_shape(device: torch.device, *, rehearsal: bool) -> LayerShape:
    """Return the layer whose operations are measured one by one."""
    if rehearsal:
        return TOY
    return NLLB_MOE_54B if device.type == "cuda" else OPERATIONS_ON_CPU


def operation_tokens(device: torch.device, *, rehearsal: bool) -> tuple[int, ...]:
    """Return the numbers of tokens that operations are measured at."""
    if rehearsal:
        return TOY_TOKENS
    return GPU_TOKENS if device.type == "cuda" else OPERATION_TOKENS_ON_CPU


def decode_shapes(device: torch.device, *, rehearsal: bool) -> tuple[AttentionShape, ...]:
    """Return the calls of cross-attention that are measured while decoding."""
    if rehearsal:
        return TOY_DECODE
    return DECODE_ON_GPU if device.type == "cuda" else DECODE_ON_CPU


def training_shapes(device: torch.device, *, rehearsal: bool) -> tuple[AttentionShape, ...]:
    """Return the calls of cross-attention that are measured in training, in both directions."""
    if rehearsal:
        return TOY_TRAINING
    return TRAINING_ON_GPU if device.type == "cuda" else TRAINING_ON_CPU


def graph_shape(*, rehearsal: bool) -> LayerShape:
    """Return the layer that is measured as a CUDA graph."""
    return TOY if rehearsal else NLLB_MOE_54B


def graph_tokens(*, rehearsal: bool, backward: bool = False) -> tuple[int, ...]:
    """Return the numbers of tokens that a layer is measured at as a CUDA graph."""
    if rehearsal:
        return TOY_BACKWARD_TOKENS if backward else TOY_TOKENS
    return BACKWARD_TOKENS if backward else GPU_TOKENS
