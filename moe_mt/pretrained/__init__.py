"""The classes of the two documentation pages of transformers, thin over the one architecture.

What they compute is computed by ``models``, ``moe``, ``generation`` and ``tokenizers``; here are
their names, their arguments and their outputs.
"""

from moe_mt.pretrained.auto_model import AutoConfig, AutoModel, AutoModelForSeq2SeqLM
from moe_mt.pretrained.config import M2M100Config, NllbMoeConfig, PublishedConfig
from moe_mt.pretrained.experts import NllbMoeDenseActDense
from moe_mt.pretrained.generation import (
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
    PublishedGenerationConfig,
)
from moe_mt.pretrained.m2m100 import (
    M2M100Decoder,
    M2M100Encoder,
    M2M100ForConditionalGeneration,
    M2M100Model,
)
from moe_mt.pretrained.nllb_moe import (
    NllbMoeDecoder,
    NllbMoeEncoder,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
)
from moe_mt.pretrained.pretrained import PreTrainedModel
from moe_mt.pretrained.seq2seq import shift_tokens_right
from moe_mt.pretrained.tokenization import (
    AutoTokenizer,
    BatchEncoding,
    EncodingOptions,
    LanguageCodeError,
    M2M100Tokenizer,
    NllbTokenizer,
    PretrainedTokenizer,
    SMALL100Tokenizer,
)

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForSeq2SeqLM",
    "AutoTokenizer",
    "BatchEncoding",
    "EncodingOptions",
    "GenerateBeamEncoderDecoderOutput",
    "GenerateEncoderDecoderOutput",
    "LanguageCodeError",
    "M2M100Config",
    "M2M100Decoder",
    "M2M100Encoder",
    "M2M100ForConditionalGeneration",
    "M2M100Model",
    "M2M100Tokenizer",
    "NllbMoeConfig",
    "NllbMoeDecoder",
    "NllbMoeDenseActDense",
    "NllbMoeEncoder",
    "NllbMoeForConditionalGeneration",
    "NllbMoeModel",
    "NllbMoeSparseMLP",
    "NllbMoeTop2Router",
    "NllbTokenizer",
    "PreTrainedModel",
    "PretrainedTokenizer",
    "PublishedConfig",
    "PublishedGenerationConfig",
    "SMALL100Tokenizer",
    "shift_tokens_right",
]
