"""The transformer, and the facts of the two families of checkpoints that fill it.

One architecture: a dense model is one whose configuration names no sparse layer. A family is a
file of facts (names in the checkpoint, defaults), never a second model.
"""

from moe_mt.models.attention import CrossAttention
from moe_mt.models.config import MoEConfig, TransformerConfig
from moe_mt.models.embedding import SinusoidalPositions, TokenEmbedding
from moe_mt.models.family import TIED_KEYS, Family, Location
from moe_mt.models.feed_forward import FeedForward
from moe_mt.models.kv_cache import KVCache
from moe_mt.models.layers import (
    DecoderLayer,
    DecoderMasks,
    EncoderLayer,
    HeadProbe,
    LayerOutput,
    moe_layer,
    top2_router,
)
from moe_mt.models.m2m100 import M2M100
from moe_mt.models.nllb_moe import NLLB_MOE
from moe_mt.models.packed import (
    Int8TokenEmbedding,
    PackedHeadEmbedding,
    PackedLinear,
    is_packed,
    keeps_values,
    pack_expert,
    pack_model,
    pack_parameter,
    packed_bytes,
)
from moe_mt.models.target_vocabulary import TargetVocabulary
from moe_mt.models.transformer import Seq2SeqTransformer, TransformerOutput

__all__ = [
    "FAMILIES",
    "TIED_KEYS",
    "CrossAttention",
    "DecoderLayer",
    "DecoderMasks",
    "EncoderLayer",
    "Family",
    "FeedForward",
    "HeadProbe",
    "Int8TokenEmbedding",
    "KVCache",
    "LayerOutput",
    "Location",
    "MoEConfig",
    "PackedHeadEmbedding",
    "PackedLinear",
    "Seq2SeqTransformer",
    "SinusoidalPositions",
    "TargetVocabulary",
    "TokenEmbedding",
    "TransformerConfig",
    "TransformerOutput",
    "is_packed",
    "keeps_values",
    "moe_layer",
    "pack_expert",
    "pack_model",
    "pack_parameter",
    "packed_bytes",
    "top2_router",
]

FAMILIES: dict[str, Family] = {
    model_type: family for family in (M2M100, NLLB_MOE) for model_type in family.model_types
}
"""``model_type`` of a ``config.json`` → its family."""
