"""Attention: each side to itself, and the decoder to the memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops import cross_attention, cross_attention_weights

__all__ = ["CrossAttention", "SelfAttention"]


class _Attention(nn.Module):
    def __init__(self, d_model: int, heads: int, dropout: float = 0.0) -> None:
        """Make the four projections.

        Args:
            d_model: Width of rows and memory.
            heads: Heads, each ``d_model / heads`` wide.
            dropout: Probability with which an attention weight is dropped in training.

        Raises:
            ConfigError: If heads do not divide the width.
        """
        if d_model % heads != 0:
            raise ConfigError(f"{heads} heads do not divide d_model {d_model}")
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def project_key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, H, L, d_head) of ``x`` (B, L, d_model)."""
        return self._split(self.k_proj(x)), self._split(self.v_proj(x))

    def _split(self, x: Tensor) -> Tensor:
        batch, length, d_model = x.shape
        return x.view(batch, length, self.heads, d_model // self.heads).transpose(1, 2)

    def _weighted(
        self, weights: Tensor, value: Tensor, head_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the output for weights (B, H, L, S), and these times the head mask."""
        if head_mask is not None:
            weights = weights * head_mask.to(weights.dtype)[:, None, None]
        dropped = functional.dropout(weights, self.dropout, self.training)
        return self._join(dropped @ value, None), weights

    def _join(self, context: Tensor, head_mask: Tensor | None) -> Tensor:
        """Project the heads' outputs (B, H, L, d_head) together, each times its factor."""
        if head_mask is not None:
            # As good as a factor of the weights, which then need not be written down.
            context = context * head_mask.to(context.dtype)[:, None, None]
        return self.out_proj(context.transpose(1, 2).flatten(2))


class SelfAttention(_Attention):
    """Attention of a sequence to itself, and to what stands before it in a cache."""

    qkv_proj: nn.Module | None
    """Packed weights: three projections as one, in their place."""

    def __init__(self, d_model: int, heads: int, dropout: float = 0.0) -> None:
        """Make the four projections."""
        super().__init__(d_model, heads, dropout)
        self.register_module("qkv_proj", None)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of ``x`` (B, L, d_model).

        Returns:
            (B, L, d_model), and twice (B, H, L, d_head).
        """
        if self.qkv_proj is None:
            return self.q_proj(x), *self.project_key_value(x)
        query, key, value = self.qkv_proj(x).chunk(3, dim=-1)
        return query, self._split(key), self._split(value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        head_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (rows, L, d_model), from ``project``. Positions that attend.
            key: (B, H, S, d_head), from ``project``: of the same positions, behind earlier ones.
                Where B is less than the rows, ``rows / B`` rows that stand next to each other,
                the beams of a sentence, attend to the same keys.
            value: (B, H, S, d_head).
            mask: Broadcastable to (B, H, rows / B * L, S): bool, true where attention is allowed,
                or of the dtype of the queries, to be added to the scores.
            causal: Whether a position sees only itself and what stands before it; then L is S
                and there is no mask.
            head_mask: (H,). Factor of each head's output, or ``None``.

        Returns:
            (rows, L, d_model).
        """
        context = functional.scaled_dot_product_attention(
            self._split(query.reshape(key.shape[0], -1, query.shape[-1])),
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self._join(context, head_mask).view(query.shape)

    def with_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and return the attention weights too; arguments as of a call.

        Computed explicitly, so that gradients reach the weights.

        Returns:
            (B, L, d_model), and the weights (B, H, L, S) times the head mask, before dropout.
            Without a head mask, rows sum to 1; where nothing may be attended to they are 0.
        """
        weights = self._weights(query, key, mask, causal)
        return self._weighted(weights, value, head_mask)

    def _weights(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        scores = self._split(query) @ key.mT * key.shape[-1] ** -0.5
        if causal:
            mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if mask is None:
            return scores.softmax(-1)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        return weights.masked_fill(~mask, 0)


class CrossAttention(_Attention):
    """Attention of decoder rows to the memory of their sentence."""

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        beams: int = 1,
        head_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the memory; beams of a sentence are query rows over one memory.

        Nothing limits what a query sees of the memory, so ``beams`` hypotheses of ``L`` positions
        are one query of ``beams * L`` positions: keys and values are never replicated.

        Args:
            x: (B * beams, L, d_model); rows of a sentence stand next to each other.
            key: (B, H, S, d_head), from ``project_key_value``: once per sentence.
            value: (B, H, S, d_head).
            key_mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            key_lengths: (B,) int32 or int64. Instead of a mask, how much of each memory is valid.
            beams: Rows per sentence.
            head_mask: (H,). Factor of each head's output, or ``None``.

        Returns:
            (B * beams, L, d_model). A row whose memory has nothing valid is ``out_proj`` of 0.

        Raises:
            ConfigError: If the rows are not ``beams`` for each sentence of ``key``, or as
                ``moe_mt.ops.cross_attention`` says.
        """
        rows, length, d_model = x.shape
        if rows != key.shape[0] * beams:
            raise ConfigError(
                f"x has {rows} rows; {key.shape[0]} sentences with {beams} beams each need "
                f"{key.shape[0] * beams}"
            )
        query = self._split(self.q_proj(x).reshape(key.shape[0], beams * length, d_model))
        context = cross_attention(
            query,
            key,
            value,
            key_mask=key_mask,
            key_lengths=key_lengths,
            dropout=self.dropout if self.training else 0.0,
        )
        return self._join(context, head_mask).reshape(rows, length, d_model)

    def with_weights(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        *,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend, and return the attention weights too; arguments as of a call, one row a sentence.

        Computed explicitly, so that gradients reach the weights.

        Returns:
            (B, L, d_model), and the weights (B, H, L, S) times the head mask, before dropout.
            Without a head mask, rows sum to 1; where the memory has nothing valid they are 0.
        """
        weights = cross_attention_weights(self._split(self.q_proj(x)), key, key_mask=key_mask)
        return self._weighted(weights, value, head_mask)
