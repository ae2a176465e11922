"""The two transformer layers, and what they share."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.models.attention import CrossAttention, SelfAttention
from moe_mt.models.config import TransformerConfig
from moe_mt.models.feed_forward import FeedForward
from moe_mt.models.kv_cache import LayerCache
from moe_mt.moe import Experts, MoELayer, Routing, Top2Router

__all__ = ["DecoderLayer", "EncoderLayer"]

FLOAT16_LIMIT = torch.finfo(torch.float16).max - 1000
"""Residuals are clamped below float16's largest value, so that one large token does not become
infinite and spread. The bound is that of the published classes."""


class _Layer(nn.Module):
    """Pre-norm residual blocks ``x + dropout(block(norm(x)))``, the last a feed-forward one."""

    def __init__(self, config: TransformerConfig, heads: int, ffn_dim: int, sparse: bool) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ffn_output_dropout = config.ffn_output_dropout
        self.self_attention = SelfAttention(config.d_model, heads, config.attention_dropout)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = (_moe_layer if sparse else _dense_layer)(config, ffn_dim)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def _residual(self, x: Tensor, update: Tensor, dropout: float) -> Tensor:
        return x + functional.dropout(update, dropout, self.training)

    def _apply_feed_forward(
        self, x: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """Return the layer's output (B, L, d_model) and, from a sparse layer, its routing."""
        routing = None
        normed = self.feed_forward_norm(x)
        if not isinstance(self.feed_forward, MoELayer):
            x = self._residual(x, self.feed_forward(normed), self.ffn_output_dropout)
        elif self.training and self.ffn_output_dropout > 0:
            update, routing = self.feed_forward(normed, padding)
            x = self._residual(x, update, self.ffn_output_dropout)
        else:
            x, routing = self.feed_forward(normed, padding, residual=x)
        if x.dtype == torch.float16:
            x = x.clamp(-FLOAT16_LIMIT, FLOAT16_LIMIT)
        return x, routing


class EncoderLayer(_Layer):
    """Self-attention in both directions, then a feed-forward network or experts."""

    def forward(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """Apply the layer.

        Args:
            x: (B, S, d_model).
            mask: (B, 1, 1, S) bool, true where attention is allowed, or ``None``.
            padding: (B, S) bool, true where a token is padding, or ``None``.

        Returns:
            (B, S, d_model) and the routing, ``None`` from a dense layer.
        """
        update = self.self_attention(self.self_attention_norm(x), mask)
        return self._apply_feed_forward(self._residual(x, update, self.dropout), padding)


class DecoderLayer(_Layer):
    """Causal self-attention, attention to the memory, then a feed-forward network or experts."""

    def __init__(self, config: TransformerConfig, heads: int, ffn_dim: int, sparse: bool) -> None:
        """Build the layer."""
        super().__init__(config, heads, ffn_dim, sparse)
        self.cross_attention = CrossAttention(config.d_model, heads, config.attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """Apply the layer to whole target sequences.

        Args:
            x: (B, L, d_model).
            memory: (B, S, d_model). Encoder output.
            memory_mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            padding: (B, L) bool, true where a target token is padding, or ``None``.
        """
        update = self.self_attention(self.self_attention_norm(x), causal=True)
        x = self._residual(x, update, self.dropout)
        key, value = self.cross_attention.project_key_value(memory)
        update = self.cross_attention(self.cross_attention_norm(x), key, value, memory_mask)
        return self._apply_feed_forward(self._residual(x, update, self.dropout), padding)

    def step(
        self,
        x: Tensor,
        cache: LayerCache,
        *,
        length: int,
        beams: int,
        mask: Tensor | None,
        memory_mask: Tensor | None,
    ) -> Tensor:
        """Apply the layer to new positions, reading and extending its cache.

        Args:
            x: (B * beams, new, d_model).
            cache: Keys and values of ``length`` earlier positions and of the memory.
            length: Positions stored so far.
            beams: Rows per sentence.
            mask: (new, length + new) bool, true where attention is allowed; ``None`` for all.
            memory_mask: (B, S) bool or ``None``.
        """
        normed = self.self_attention_norm(x)
        key, value = cache.append(*self.self_attention.project_key_value(normed), length)
        x = x + self.self_attention.step(normed, key, value, mask)
        x = x + self.cross_attention(
            self.cross_attention_norm(x),
            cache.cross_key,
            cache.cross_value,
            memory_mask,
            beams=beams,
        )
        return self._apply_feed_forward(x, None)[0]


def _dense_layer(config: TransformerConfig, ffn_dim: int) -> FeedForward:
    return FeedForward(
        config.d_model,
        ffn_dim,
        activation=config.activation,
        activation_dropout=config.activation_dropout,
    )


def _moe_layer(config: TransformerConfig, ffn_dim: int) -> MoELayer:
    moe = config.moe
    assert moe is not None
    router = Top2Router(
        config.d_model,
        moe.num_experts,
        bias=moe.router_bias,
        router_dtype=getattr(torch, moe.router_dtype),
        policy=moe.second_expert_policy,
        normalize_before_dropping=moe.normalize_before_dropping,
        batch_prioritized=moe.batch_prioritized,
        route_padding=moe.route_padding,
        eval_capacity_fraction=moe.eval_capacity_fraction,
        train_capacity=moe.train_capacity,
    )
    experts = Experts(
        moe.num_experts,
        config.d_model,
        ffn_dim,
        activation=config.activation,
        activation_dropout=config.activation_dropout,
    )
    return MoELayer(router, experts, token_dropout=moe.token_dropout)
