"""What the documented ``generate`` returns with ``return_dict_in_generate=True``."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from moe_mt.pretrained.outputs import ModelOutput, PastKeyValues, Tensors

__all__ = [
    "BeamSampleEncoderDecoderOutput",
    "BeamSearchEncoderDecoderOutput",
    "GenerateBeamEncoderDecoderOutput",
    "GenerateEncoderDecoderOutput",
    "GreedySearchEncoderDecoderOutput",
    "SampleEncoderDecoderOutput",
    "StepTensors",
]

StepTensors: TypeAlias = tuple[Tensors, ...]
"""Per step, per layer: the first step reads the whole prompt, every other one token."""


@dataclass(eq=False)
class GenerateEncoderDecoderOutput(ModelOutput):
    """Of greedy search and sampling; ``rows`` is B * num_return_sequences."""

    sequences: Tensor | None = None
    """(rows, length) int64: prompt and what was generated, padded on the right."""

    scores: tuple[Tensor, ...] | None = None
    """Per step (rows, V) float32: the logits after all rules."""

    logits: tuple[Tensor, ...] | None = None
    """Per step (rows, V) float32: the logits before any."""

    encoder_attentions: Tensors | None = None
    """Per layer (B, H, S, S)."""

    encoder_hidden_states: Tensors | None = None
    """Layers + 1 of (B, S, d_model)."""

    decoder_attentions: StepTensors | None = None
    """Per step, per layer (rows, H, new, length so far)."""

    cross_attentions: StepTensors | None = None
    """Per step, per layer (rows, H, new, S)."""

    decoder_hidden_states: StepTensors | None = None
    """Per step, layers + 1 of (rows, new, d_model)."""

    past_key_values: PastKeyValues | None = None
    """Keys and values of all but the last token, unless ``use_cache=False``."""


@dataclass(eq=False)
class GenerateBeamEncoderDecoderOutput(ModelOutput):
    """Of beam search and beam sampling; ``rows`` is B * num_beams."""

    sequences: Tensor | None = None
    """(B * num_return_sequences, length) int64, each sentence's best first."""

    sequences_scores: Tensor | None = None
    """(B * num_return_sequences,) float32: what they are sorted by."""

    scores: tuple[Tensor, ...] | None = None
    """Per step (rows, V) float32: the log-probabilities after all rules, without what the beams
    have summed up before."""

    logits: tuple[Tensor, ...] | None = None
    """Per step (rows, V) float32: the logits before any rule."""

    beam_indices: Tensor | None = None
    """(B * num_return_sequences, steps) int64: the row each token was chosen in; -1 behind the
    last one."""

    encoder_attentions: Tensors | None = None
    """Per layer (B, H, S, S)."""

    encoder_hidden_states: Tensors | None = None
    """Layers + 1 of (B, S, d_model)."""

    decoder_attentions: StepTensors | None = None
    """Per step, per layer (rows, H, new, length so far)."""

    cross_attentions: StepTensors | None = None
    """Per step, per layer (rows, H, new, S)."""

    decoder_hidden_states: StepTensors | None = None
    """Per step, layers + 1 of (rows, new, d_model)."""

    past_key_values: PastKeyValues | None = None
    """Keys and values of the open beams, unless ``use_cache=False``."""


GreedySearchEncoderDecoderOutput = GenerateEncoderDecoderOutput
SampleEncoderDecoderOutput = GenerateEncoderDecoderOutput
BeamSearchEncoderDecoderOutput = GenerateBeamEncoderDecoderOutput
BeamSampleEncoderDecoderOutput = GenerateBeamEncoderDecoderOutput
