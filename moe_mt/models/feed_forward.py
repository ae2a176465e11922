"""The dense feed-forward layer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from moe_mt.ops import ACTIVATIONS

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """``down_proj(dropout(activation(up_proj(x))))``."""

    def __init__(
        self, d_model: int, ffn_dim: int, *, activation: str, activation_dropout: float
    ) -> None:
        """Build the two projections, both with a bias."""
        super().__init__()
        self.up_proj = nn.Linear(d_model, ffn_dim)
        self.down_proj = nn.Linear(ffn_dim, d_model)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]
        self.activation_dropout = activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d_model) for ``x`` (..., d_model)."""
        hidden = self.activation(self.up_proj(x))
        hidden = functional.dropout(hidden, self.activation_dropout, self.training)
        return self.down_proj(hidden)
