"""The weights of a layer's experts, stacked."""

import torch
from torch import Tensor, nn

from moe_mt.moe.routing import Permutation
from moe_mt.ops import expert_ffn

__all__ = ["Experts"]


class Experts(nn.Module):
    """``E`` feed-forward networks of one shape, with their weights stacked on the first axis."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        ffn_dim: int,
        *,
        activation: str = "relu",
        activation_dropout: float = 0.0,
    ) -> None:
        """Build uninitialised experts: ``up_proj`` (E, ffn_dim, d_model) and so on."""
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, d_model))
        self.up_bias = nn.Parameter(torch.empty(num_experts, ffn_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, ffn_dim))
        self.down_bias = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, x: Tensor, permutation: Permutation) -> Tensor:
        """Return (N, d_model): each expert's output on its rows of ``x`` (T, d_model)."""
        return expert_ffn(
            x,
            self.up_proj,
            self.down_proj,
            permutation.order,
            permutation.offsets,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            activation_dropout=self.activation_dropout if self.training else 0.0,
        )
