"""The experts of a sparse layer, one by one, over weights that lie stacked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_mt.models import TransformerConfig
from moe_mt.moe import Experts, ExpertSlices
from moe_mt.ops import ACTIVATIONS

__all__ = ["NllbMoeDenseActDense", "StackedExperts"]

LEAVES = {
    "up_proj": ("fc1", "weight"),
    "up_bias": ("fc1", "bias"),
    "down_proj": ("fc2", "weight"),
    "down_bias": ("fc2", "bias"),
}
"""Stacked parameter → the layer and the parameter of an expert that is a slice of it."""


class NllbMoeDenseActDense(nn.Module):
    """A feed-forward network of NLLB-MoE: ``fc2(dropout(activation(fc1(x))))``."""

    def __init__(self, config: Any, ffn_dim: int) -> None:  # noqa: ANN401
        """Build the two layers.

        Args:
            config: An ``NllbMoeConfig``, or what it is for a model.
            ffn_dim: Inner width.
        """
        super().__init__()
        if not isinstance(config, TransformerConfig):
            config = config.for_model()
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.dropout = nn.Dropout(config.activation_dropout)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., d_model) for ``hidden_states`` (..., d_model)."""
        return self.fc2(self.dropout(self.act(self.fc1(hidden_states))))


class StackedExperts(nn.ModuleDict):
    """Experts ``expert_0`` to ``expert_{E-1}`` as modules, computed all at once.

    Their parameters are slices of the core's stacked ones: ``moe_mt.moe.ExpertSlices``.
    """

    slices: ExpertSlices

    def __init__(self, stacked: Experts, make_expert: Callable[[], nn.Module]) -> None:
        """Take over the weights of ``stacked``.

        Args:
            stacked: The core's experts.
            make_expert: Makes one expert, called on the meta device. An expert that is no
                ``NllbMoeDenseActDense`` has weights of its own: it is made where ``stacked`` is.
        """
        with torch.device("meta"):
            experts = [make_expert() for _ in range(stacked.num_experts)]
        plain = all(type(expert) is NllbMoeDenseActDense for expert in experts)
        if not plain:
            with stacked.up_proj.device:
                experts = [make_expert() for _ in range(stacked.num_experts)]
        super().__init__({f"expert_{index}": expert for index, expert in enumerate(experts)})
        # No module: weights are listed once, as those of the experts.
        self.slices = ExpertSlices(self, experts if plain else [], LEAVES, stacked)
        if plain:
            self.slices.bind()
        self.register_load_state_dict_post_hook(_gather_after_load)

    @property
    def stacked(self) -> Experts:
        """The core's experts, whose weights the experts' parameters are slices of."""
        return self.slices.stacked

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
        return self.slices(x, expert_ids, gates, residual)

    def train(self, mode: bool = True) -> "StackedExperts":
        """Set training mode, of the core's experts too."""
        self.stacked.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StackedExperts":
        """Move or cast the stack, then let the experts be its slices again."""
        if not self.slices.gather():
            return super()._apply(fn, recurse)
        gradients = {
            parameter: fn(parameter.grad)
            for parameter in self.parameters()
            if parameter.grad is not None
        }
        for parameter in gradients:
            parameter.grad = None
        self.stacked._apply(fn)
        self.slices.bind()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose slices were copied one by one."""
        super().__setstate__(state)
        self.slices.rebind()


def _gather_after_load(module: Any, incompatible_keys: object) -> None:  # noqa: ANN401
    module.slices.gather()
