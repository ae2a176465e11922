"""Attention: each side to itself, and the decoder to the memory."""

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CrossAttention", "SelfAttention"]


class _Attention(nn.Module):
    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
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

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """Return (B, L, d_model) before the output projection."""
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return context.transpose(1, 2).flatten(2)


class SelfAttention(_Attention):
    """Attention of a sequence to itself."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Attend over the whole sequence.

        Args:
            x: (B, L, d_model).
            mask: bool, broadcastable to (B, H, L, L), true where attention is allowed.
            causal: Whether a position sees only itself and what stands before it.
        """
        key, value = self.project_key_value(x)
        return self.out_proj(self._attend(self._split(self.q_proj(x)), key, value, mask, causal))

    def step(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from new positions (rows, new, d_model) to stored keys and values."""
        return self.out_proj(self._attend(self._split(self.q_proj(x)), key, value, mask, False))


class CrossAttention(_Attention):
    """Attention of decoder rows to the memory of their sentence."""

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, beams: int = 1
    ) -> Tensor:
        """Attend to the memory; beams of a sentence are query rows over one memory.

        Nothing limits what a query sees of the memory, so ``beams`` hypotheses of ``L`` positions
        are one query of ``beams * L`` positions: keys and values are never replicated.

        Args:
            x: (B * beams, L, d_model).
            key: (B, H, S, d_head), from ``project_key_value``.
            value: (B, H, S, d_head).
            mask: (B, S) bool, true where the memory may be attended to, or ``None``.
            beams: Rows per sentence.

        Returns:
            (B * beams, L, d_model).
        """
        rows, length, d_model = x.shape
        query = self._split(self.q_proj(x).reshape(rows // beams, beams * length, d_model))
        allowed = None if mask is None else mask[:, None, None, :]
        context = self._attend(query, key, value, allowed, False)
        return self.out_proj(context.reshape(rows, length, d_model))
