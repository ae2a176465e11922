"""Facts of the dense family: M2M100, NLLB-200, WMT21 and SMaLL-100.

Agrees with ``M2M100ForConditionalGeneration`` of transformers 4.57; the test that proves it is
``tests/models/test_transformer.py``.
"""

from collections.abc import Mapping
from typing import Any

from moe_mt.models.config import TransformerConfig
from moe_mt.models.family import Family

__all__ = ["M2M100", "SHARED_FIELDS", "published_value"]

SHARED_FIELDS = {
    "vocab_size": ("vocab_size", 128112),
    "max_positions": ("max_position_embeddings", 1024),
    "encoder_layers": ("encoder_layers", 12),
    "encoder_ffn_dim": ("encoder_ffn_dim", 4096),
    "encoder_heads": ("encoder_attention_heads", 16),
    "decoder_layers": ("decoder_layers", 12),
    "decoder_ffn_dim": ("decoder_ffn_dim", 4096),
    "decoder_heads": ("decoder_attention_heads", 16),
    "encoder_layerdrop": ("encoder_layerdrop", 0.05),
    "decoder_layerdrop": ("decoder_layerdrop", 0.05),
    "activation": ("activation_function", "relu"),
    "d_model": ("d_model", 1024),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "init_std": ("init_std", 0.02),
    "decoder_start_id": ("decoder_start_token_id", 2),
    "scale_embedding": ("scale_embedding", True),
    "pad_id": ("pad_token_id", 1),
    "bos_id": ("bos_token_id", 0),
    "eos_id": ("eos_token_id", 2),
}
"""Our field → the published name and what its absence means."""

LAYER_MODULES = {
    "self_attention": "self_attn",
    "self_attention_norm": "self_attn_layer_norm",
    "cross_attention": "encoder_attn",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "feed_forward.up_proj": "fc1",
    "feed_forward.down_proj": "fc2",
    "feed_forward_norm": "final_layer_norm",
}


def published_value(published: Mapping[str, Any], name: str, default: Any) -> Any:  # noqa: ANN401
    """Return a field of ``config.json``; a null there means the default, as it does upstream."""
    value = published.get(name)
    return default if value is None else value


def shared_fields_from_published(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that both families share."""
    return {
        ours: published_value(published, name, default)
        for ours, (name, default) in SHARED_FIELDS.items()
    }


def shared_fields_to_published(config: TransformerConfig) -> dict[str, Any]:
    """Return the published spelling of the fields that both families share."""
    fields = {name: getattr(config, ours) for ours, (name, _) in SHARED_FIELDS.items()}
    return fields | {
        "is_encoder_decoder": True,
        "use_cache": True,
        "num_hidden_layers": config.encoder_layers,
        "tie_word_embeddings": True,
    }


def _config_from_published(published: Mapping[str, Any]) -> TransformerConfig:
    fields = shared_fields_from_published(published)
    return TransformerConfig(family="m2m100", ffn_output_dropout=fields["dropout"], **fields)


M2M100 = Family(
    name="m2m100",
    model_types=("m2m_100",),
    architecture="M2M100ForConditionalGeneration",
    module_names=LAYER_MODULES,
    config_from_published=_config_from_published,
    config_to_published=shared_fields_to_published,
)
