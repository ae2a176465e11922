"""Which classes of transformers are patched, and how."""

from torch import nn

from moe_mt.integrations.blocks import (
    DeepseekBlock,
    NllbMoeBlock,
    SoftmaxTopKBlock,
    SwitchBlock,
)
from moe_mt.integrations.cross_attention import CrossAttentionSeam, is_cross_attention
from moe_mt.integrations.patched import Patched
from moe_mt.integrations.stacked_weights import StackedWeights, has_stacked_weights
from moe_mt.integrations.versions import transformers_major

__all__ = ["KNOWN_FAMILIES", "patch_for"]

EVERY_VERSION: dict[str, type[Patched]] = {
    "nllb_moe.modeling_nllb_moe.NllbMoeSparseMLP": NllbMoeBlock,
    "switch_transformers.modeling_switch_transformers.SwitchTransformersSparseMLP": SwitchBlock,
}

VERSION_4: dict[str, type[Patched]] = {
    "mixtral.modeling_mixtral.MixtralSparseMoeBlock": SoftmaxTopKBlock,
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock": SoftmaxTopKBlock,
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock": SoftmaxTopKBlock,
    "olmoe.modeling_olmoe.OlmoeSparseMoeBlock": SoftmaxTopKBlock,
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2MoE": DeepseekBlock,
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE": DeepseekBlock,
}
"""Layers whose experts are modules there, and stacked weights in transformers 5."""

KNOWN_FAMILIES = (
    "NllbMoe, SwitchTransformers, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek V2 and V3, and in "
    "transformers 5 other models whose experts have stacked weights"
)


def patch_for(name: str, module: nn.Module, *, cross_attention: bool) -> type[Patched] | None:
    """Return what a module is patched with, or ``None`` where it is left as it is.

    Args:
        name: Of the module in its model.
        module: Any module. It is known by its exact class, which is not imported.
        cross_attention: Whether cross-attention is patched too.
    """
    package, _, path = type(module).__module__.partition(".models.")
    if package != "transformers":
        return None
    known = EVERY_VERSION | (VERSION_4 if transformers_major() == 4 else {})
    if found := known.get(f"{path}.{type(module).__name__}"):
        return found
    if has_stacked_weights(module):
        return StackedWeights
    if cross_attention and is_cross_attention(name, module):
        return CrossAttentionSeam
    return None
