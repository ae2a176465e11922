"""The weights of a layer's experts, stacked."""

import torch
from torch import Tensor, nn

from moe_mt.ops import expert_ffn

__all__ = ["Experts"]


class Experts(nn.Module):
    """``E`` feed-forward networks of one shape, with their weights stacked on the first axis."""

    gate_proj: nn.Parameter | None
    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        ffn_dim: int,
        *,
        activation: str = "relu",
        activation_dropout: float = 0.0,
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        """Build uninitialised experts: ``up_proj`` (E, ffn_dim, d_model) and so on.

        Args:
            num_experts: ``E``.
            d_model: Width of a token.
            ffn_dim: Inner width.
            activation: A name of ``ops.ACTIVATIONS``.
            activation_dropout: Dropout of hidden rows in training.
            gated: Whether a second product gates the first: SwiGLU with ``"silu"``.
            bias: Whether the products have biases.
        """
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.up_proj = nn.Parameter(torch.empty(num_experts, ffn_dim, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, ffn_dim))
        optional = {
            "gate_proj": (gated, (num_experts, ffn_dim, d_model)),
            "up_bias": (bias, (num_experts, ffn_dim)),
            "gate_bias": (gated and bias, (num_experts, ffn_dim)),
            "down_bias": (bias, (num_experts, d_model)),
        }
        for name, (wanted, shape) in optional.items():
            parameter = nn.Parameter(torch.empty(shape)) if wanted else None
            self.register_parameter(name, parameter)

    def forward(
        self, x: Tensor, expert_ids: Tensor, gates: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Return (T, d_model): ``residual`` plus the gated outputs of each token's experts.

        Args:
            x: (T, d_model).
            expert_ids: (T, K) int32; ``E`` means dropped.
            gates: (T, K) float32; zero where dropped.
            residual: (T, d_model) or ``None``.
        """
        return expert_ffn(
            x,
            expert_ids,
            gates,
            self.up_proj,
            self.down_proj,
            gate_proj=self.gate_proj,
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            activation_dropout=self.activation_dropout if self.training else 0.0,
            residual=residual,
        )
