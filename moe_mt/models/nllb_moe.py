"""Facts of the mixture-of-experts family: NLLB-MoE-54B.

Agrees with ``NllbMoeForConditionalGeneration`` of transformers 4.57 (never 5.x, whose experts 2
and up do not run); the test that proves it is ``tests/models/test_transformer.py``.
"""

from collections.abc import Mapping
from typing import Any

from moe_mt.models.config import MoEConfig, TransformerConfig
from moe_mt.models.family import Family
from moe_mt.models.m2m100 import (
    LAYER_MODULES,
    published_value,
    shared_fields_from_published,
    shared_fields_to_published,
)

__all__ = ["NLLB_MOE"]

MOE_FIELDS = {
    "num_experts": ("num_experts", 128),
    "encoder_sparse_step": ("encoder_sparse_step", 4),
    "decoder_sparse_step": ("decoder_sparse_step", 4),
    "router_bias": ("router_bias", False),
    "router_dtype": ("router_dtype", "float32"),
    "route_padding": ("router_ignore_padding_tokens", False),
    "eval_capacity_fraction": ("moe_eval_capacity_token_fraction", 1.0),
    "second_expert_policy": ("second_expert_policy", "all"),
    "normalize_before_dropping": ("normalize_router_prob_before_dropping", False),
    "batch_prioritized": ("batch_prioritized_routing", False),
    "token_dropout": ("moe_token_dropout", 0.2),
    "aux_loss_coef": ("router_aux_loss_coef", 0.001),
}
"""Our field → the published name and what its absence means. ``router_z_loss_coef`` is not among
them: published files carry 0.001 there and no implementation ever used it."""

MODULES = LAYER_MODULES | {
    "cross_attention": "cross_attention",
    "cross_attention_norm": "cross_attention_layer_norm",
    "feed_forward.up_proj": "ffn.fc1",
    "feed_forward.down_proj": "ffn.fc2",
    "feed_forward.router.classifier": "ffn.router.classifier",
    "feed_forward_norm": "ff_layer_norm",
}


def _config_from_published(published: Mapping[str, Any]) -> TransformerConfig:
    fields = shared_fields_from_published(published)
    moe = MoEConfig(
        # A null capacity has a meaning of its own: fairseq's rule.
        train_capacity=published.get("expert_capacity", 64),
        **{
            ours: published_value(published, name, default)
            for ours, (name, default) in MOE_FIELDS.items()
        },
    )
    return TransformerConfig(
        family="nllb_moe", ffn_output_dropout=fields["activation_dropout"], moe=moe, **fields
    )


def _config_to_published(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    sparse = {name: getattr(moe, ours) for ours, (name, _) in MOE_FIELDS.items()}
    return (
        shared_fields_to_published(config)
        | sparse
        | {"expert_capacity": moe.train_capacity, "output_router_logits": False}
    )


NLLB_MOE = Family(
    name="nllb_moe",
    model_types=("nllb-moe", "nllb_moe"),
    architecture="NllbMoeForConditionalGeneration",
    module_names=MODULES,
    config_from_published=_config_from_published,
    config_to_published=_config_to_published,
)
