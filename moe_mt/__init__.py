"""Run M2M100, NLLB-200 and NLLB-MoE translation models, right and fast.

import moe_mt

translator = moe_mt.from_pretrained("tiny")
translator.translate("May 5, 2024", src_lang="eng_Latn", tgt_lang="fra_Latn")
"""

from moe_mt.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    InputError,
    MoeMtError,
    PlacementError,
    UnsupportedLanguageError,
)
from moe_mt.generation import GenerationConfig
from moe_mt.integrations import (
    PatchReport,
    patch,
    register_experts_implementation,
    unpatch,
)
from moe_mt.models import CrossAttention
from moe_mt.moe import Experts, MoELayer, Top1Router, Top2Router, TopKRouter
from moe_mt.pretrained import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    M2M100ForConditionalGeneration,
    M2M100Model,
    M2M100Tokenizer,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    NllbMoeModel,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
    NllbTokenizer,
    shift_tokens_right,
)
from moe_mt.translator import TranslationResult, Translator, from_pretrained, pipeline
from moe_mt.version import __version__

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForSeq2SeqLM",
    "AutoTokenizer",
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "CrossAttention",
    "Experts",
    "GenerationConfig",
    "InputError",
    "M2M100Config",
    "M2M100ForConditionalGeneration",
    "M2M100Model",
    "M2M100Tokenizer",
    "MoELayer",
    "MoeMtError",
    "NllbMoeConfig",
    "NllbMoeForConditionalGeneration",
    "NllbMoeModel",
    "NllbMoeSparseMLP",
    "NllbMoeTop2Router",
    "NllbTokenizer",
    "PatchReport",
    "PlacementError",
    "Top1Router",
    "Top2Router",
    "TopKRouter",
    "TranslationResult",
    "Translator",
    "UnsupportedLanguageError",
    "__version__",
    "from_pretrained",
    "patch",
    "pipeline",
    "register_experts_implementation",
    "shift_tokens_right",
    "unpatch",
]
