"""Cross-attention of M2M100, NLLB and BART-like models of transformers, by its attention seam."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.integrations.patched import Patched
from moe_mt.ops import cross_attention, cross_attention_weights

__all__ = ["CrossAttentionSeam", "attention_forward", "is_cross_attention"]

IMPLEMENTATION = "moe_mt"

NAMES = ("encoder_attn", "cross_attention")
"""What decoder layers call it."""


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Return whether a module is a decoder's attention to the memory, made as BART's."""
    wanted = ("q_proj", "k_proj", "v_proj", "out_proj", "config", "scaling")
    return name.rpartition(".")[2] in NAMES and all(hasattr(module, part) for part in wanted)


def attention_forward(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor | None]:
    """Attend to a memory, as an attention function of transformers.

    Args:
        module: The attention module; not read.
        query: (B, H, L, d_head).
        key: (B, H, S, d_head).
        value: (B, H, S, d_head).
        attention_mask: (B, 1, L, S), bool, or added to scores and then 0 where attention is
            allowed; the same for all queries of a sentence, as masks of a memory are.
        scaling: What scores are multiplied with; ``d_head ** -0.5`` where ``None``.
        dropout: Probability with which an attention weight is dropped.
        options: ``output_attentions`` asks for weights; others are for other functions.

    Returns:
        (B, L, H, d_head), and the weights (B, H, L, S) where they were asked for.
    """
    del module
    key_mask = None
    if attention_mask is not None:
        row = attention_mask[:, 0, -1, : key.shape[2]].expand(query.shape[0], -1)
        key_mask = row if row.dtype == torch.bool else row == 0
    if options.get("output_attentions"):
        weights = cross_attention_weights(query, key, key_mask=key_mask, scale=scaling)
        return (functional.dropout(weights, dropout) @ value).transpose(1, 2), weights
    context = cross_attention(query, key, value, key_mask=key_mask, scale=scaling, dropout=dropout)
    return context.transpose(1, 2), None


class CrossAttentionSeam(Patched):
    """Attention whose own ``forward`` projects and caches, and asks this package to attend."""

    @property
    def config(self) -> Any:  # noqa: ANN401
        """The model's configuration, but for the implementation of attention."""
        return _WithImplementation(vars(self)["config"])

    def attach(self) -> None:
        """Let transformers find the function by its name, as its documentation asks for."""
        sys.modules["transformers"].AttentionInterface.register(IMPLEMENTATION, attention_forward)


class _WithImplementation:
    """A configuration as it is, with this package's implementation of attention."""

    _attn_implementation = IMPLEMENTATION

    def __init__(self, config: Any) -> None:  # noqa: ANN401
        self._config = config

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._config, name)
