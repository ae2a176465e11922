"""The documented ``generate``: settings and inputs as the pages have them, around our search."""

from moe_mt.pretrained.generation.config import PublishedGenerationConfig
from moe_mt.pretrained.generation.generate import GenerationMixin
from moe_mt.pretrained.generation.outputs import (
    BeamSampleEncoderDecoderOutput,
    BeamSearchEncoderDecoderOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
    GreedySearchEncoderDecoderOutput,
    SampleEncoderDecoderOutput,
)

__all__ = [
    "BeamSampleEncoderDecoderOutput",
    "BeamSearchEncoderDecoderOutput",
    "GenerateBeamEncoderDecoderOutput",
    "GenerateEncoderDecoderOutput",
    "GenerationMixin",
    "GreedySearchEncoderDecoderOutput",
    "PublishedGenerationConfig",
    "SampleEncoderDecoderOutput",
]
