"""The two transformer layers, and what they share."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.models.attention import CrossAttention, SelfAttention
from moe_mt.models.config import TransformerConfig
from moe_mt.models.feed_forward import FeedForward
from moe_mt.moe import Experts, MoELayer, Routing, Top2Router

__all__ = [
    "DecoderLayer",
    "DecoderMasks",
    "EncoderLayer",
    "HeadProbe",
    "KeyValues",
    "LayerOutput",
    "moe_layer",
    "top2_router",
]

FLOAT16_LIMIT = torch.finfo(torch.float16).max - 1000
"""Residuals are clamped below float16's largest value, so that one large token does not become
infinite and spread. The bound is that of the published classes."""


class LayerOutput(NamedTuple):
    """What a layer gives."""

    x: Tensor
    """(B, L, d_model)."""

    routing: Routing | None
    """Of a sparse layer; ``None`` from a dense one."""

    self_weights: Tensor | None = None
    """(B, H, L, S) self-attention weights times the head mask, if a probe asked for weights."""

    cross_weights: Tensor | None = None
    """(B, H, L, S) the same of the attention to the memory."""


@dataclass(frozen=True, kw_only=True)
class HeadProbe:
    """What an analysis does to a layer's heads, and whether it wants to see their weights."""

    self_mask: Tensor | None = None
    """(H,) factor of each self-attention head's output."""

    cross_mask: Tensor | None = None
    """(H,) the same of the attention to the memory."""

    weights: bool = False
    """Whether attention weights are returned, which are then computed explicitly."""


NO_PROBE = HeadProbe()


@dataclass(frozen=True, kw_only=True)
class DecoderMasks:
    """What new target positions may see."""

    target: Tensor | None = None
    """Broadcastable to (rows, H, new, length + new): bool, true where attention is allowed, or of
    the dtype of the scores, to be added to them. Shaped as ``SelfAttention`` says where the rows
    of a sentence share their keys."""

    causal: bool = False
    """Whether a position sees only itself and what stands before it; then nothing stands in the
    cache and there is no ``target`` mask."""

    memory: Tensor | None = None
    """(B, S) bool, true where the memory may be attended to."""

    padding: Tensor | None = None
    """(B, new) bool, true where a position is padding, which claims no expert."""


class KeyValues(Protocol):
    """The keys and values one decoder layer attends to."""

    @property
    def cross_key(self) -> Tensor | None:
        """(B, H, S, d_head) of the memory; ``None`` for a decoder that has none."""
        ...

    @property
    def cross_value(self) -> Tensor | None:
        """(B, H, S, d_head)."""
        ...

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take those of new positions, (rows, H, new, d_head); return what these attend to."""
        ...


@dataclass(frozen=True)
class _Uncached:
    """Keys and values of whole sequences, which nobody will continue."""

    cross_key: Tensor
    cross_value: Tensor

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return key, value


class _Layer(nn.Module):
    """Pre-norm residual blocks ``x + dropout(block(norm(x)))``, the last a feed-forward one."""

    def __init__(self, config: TransformerConfig, heads: int, ffn_dim: int, sparse: bool) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ffn_output_dropout = config.ffn_output_dropout
        self.self_attention = SelfAttention(config.d_model, heads, config.attention_dropout)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = (moe_layer if sparse else _dense_layer)(config, ffn_dim)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)

    def _residual(self, x: Tensor, update: Tensor, dropout: float) -> Tensor:
        if self.training:
            update = functional.dropout(update, dropout)
        return x + update

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
        self,
        x: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        probe: HeadProbe = NO_PROBE,
    ) -> LayerOutput:
        """Apply the layer.

        Args:
            x: (B, S, d_model).
            mask: (B, 1, 1, S) bool, true where attention is allowed, or ``None``.
            padding: (B, S) bool, true where a token is padding, or ``None``.
            probe: What to do with the heads.
        """
        projected = self.self_attention.project(self.self_attention_norm(x))
        weights = None
        if probe.weights:
            update, weights = self.self_attention.with_weights(
                *projected, mask, head_mask=probe.self_mask
            )
        else:
            update = self.self_attention(*projected, mask, head_mask=probe.self_mask)
        x, routing = self._apply_feed_forward(self._residual(x, update, self.dropout), padding)
        return LayerOutput(x, routing, weights)


class DecoderLayer(_Layer):
    """Causal self-attention, attention to the memory, then a feed-forward network or experts."""

    def __init__(self, config: TransformerConfig, heads: int, ffn_dim: int, sparse: bool) -> None:
        """Build the layer."""
        super().__init__(config, heads, ffn_dim, sparse)
        self.cross_attention = CrossAttention(config.d_model, heads, config.attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None, padding: Tensor | None
    ) -> LayerOutput:
        """Apply the layer to whole target sequences.

        Args:
            x: (B, L, d_model).
            memory: (B, S, d_model). Encoder output.
            memory_mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            padding: (B, L) bool, true where a target token is padding, or ``None``.
        """
        cache = _Uncached(*self.cross_attention.project_key_value(memory))
        masks = DecoderMasks(causal=True, memory=memory_mask, padding=padding)
        return self.step(x, cache, masks)

    def step(
        self,
        x: Tensor,
        cache: KeyValues,
        masks: DecoderMasks,
        probe: HeadProbe = NO_PROBE,
        *,
        beams: int = 1,
    ) -> LayerOutput:
        """Apply the layer to new positions, reading and extending its cache.

        Args:
            x: (B * beams, new, d_model).
            cache: Keys and values of earlier positions and of the memory. Without a memory, the
                layer has no attention to one.
            masks: What the new positions may see.
            probe: What to do with the heads.
            beams: Rows per sentence.
        """
        query, key, value = self.self_attention.project(self.self_attention_norm(x))
        target = (*cache.append(key, value), masks.target)
        self_weights = cross_weights = None
        if probe.weights:
            update, self_weights = self.self_attention.with_weights(
                query, *target, causal=masks.causal, head_mask=probe.self_mask
            )
        else:
            update = self.self_attention(
                query, *target, causal=masks.causal, head_mask=probe.self_mask
            )
        x = self._residual(x, update, self.dropout)
        if cache.cross_key is not None and cache.cross_value is not None:
            normed = self.cross_attention_norm(x)
            memory = (cache.cross_key, cache.cross_value, masks.memory)
            if probe.weights:
                update, cross_weights = self.cross_attention.with_weights(
                    normed, *memory, head_mask=probe.cross_mask
                )
            else:
                update = self.cross_attention(
                    normed, *memory, beams=beams, head_mask=probe.cross_mask
                )
            x = self._residual(x, update, self.dropout)
        x, routing = self._apply_feed_forward(x, masks.padding)
        return LayerOutput(x, routing, self_weights, cross_weights)


def _dense_layer(config: TransformerConfig, ffn_dim: int) -> FeedForward:
    return FeedForward(
        config.d_model,
        ffn_dim,
        activation=config.activation,
        activation_dropout=config.activation_dropout,
    )


def top2_router(config: TransformerConfig) -> Top2Router:
    """Return an uninitialised router of a configuration with experts."""
    moe = config.moe
    assert moe is not None
    return Top2Router(
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


def moe_layer(config: TransformerConfig, ffn_dim: int) -> MoELayer:
    """Return an uninitialised sparse layer of a configuration with experts."""
    moe = config.moe
    assert moe is not None
    # Whoever builds this fills it: experts that draw their weights at birth would draw them twice.
    device = torch.empty(0).device
    with torch.device("meta"):
        experts = Experts(
            moe.num_experts,
            config.d_model,
            ffn_dim,
            activation=config.activation,
            activation_dropout=config.activation_dropout,
        )
    if device.type != "meta":
        experts.to_empty(device=device)
    return MoELayer(top2_router(config), experts, token_dropout=moe.token_dropout)
