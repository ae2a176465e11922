"""Experts of transformers 5 whose weights are stacked already: the seam that it has for them."""

from typing import Any

from torch import Tensor, nn

from moe_mt.errors import ConfigError
from moe_mt.integrations.activations import activation_of
from moe_mt.integrations.expert_modules import weights_obstacle
from moe_mt.integrations.patched import Patched
from moe_mt.ops import expert_ffn

__all__ = ["StackedWeights", "experts_forward", "has_stacked_weights"]

DEFAULT_GATE = "_default_apply_gate"
"""The method that transformers gives to classes without a gate of their own."""


def has_stacked_weights(module: nn.Module) -> bool:
    """Return whether a module is experts of the kind that transformers 5 dispatches."""
    attributes = vars(module)
    return "is_transposed" in attributes and "has_bias" in attributes and "config" in attributes


def experts_forward(
    self: Any,  # noqa: ANN401
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute the experts of transformers 5 with ``moe_mt.ops.expert_ffn``.

    Args:
        self: An instance of a class that transformers decorates with
            ``use_experts_implementation``.
        hidden_states: (T, d_model).
        top_k_index: (T, K); the number of experts means that a token's choice is elsewhere.
        top_k_weights: (T, K).

    Returns:
        (T, d_model) in the dtype of ``hidden_states``.

    Raises:
        ConfigError: If the experts compute what no kernel does.
    """
    if why := _foreign(self):
        raise ConfigError(f"{type(self).__name__}: {why}; choose another experts implementation")
    gate_bias = up_bias = down_bias = None
    if _is_gated(self):
        gate_proj, up_proj = self.gate_up_proj.chunk(2, dim=1)
        if self.has_bias:
            gate_bias, up_bias = self.gate_up_proj_bias.chunk(2, dim=1)
    else:
        gate_proj, up_proj = None, self.up_proj
        up_bias = self.up_proj_bias if self.has_bias else None
    if self.has_bias:
        down_bias = self.down_proj_bias
    mixture = expert_ffn(
        hidden_states,
        top_k_index.int(),
        top_k_weights.float(),
        up_proj,
        self.down_proj,
        gate_proj=gate_proj,
        up_bias=up_bias,
        gate_bias=gate_bias,
        down_bias=down_bias,
        activation=activation_of(self.act_fn) or "",
    )
    return mixture.to(hidden_states.dtype)


class StackedWeights(Patched):
    """Experts whose stacked weights are read as they lie."""

    @classmethod
    def foreign(cls, module: Any) -> str | None:  # noqa: ANN401
        """Return what experts compute that this package does not, or ``None``."""
        return _foreign(module)

    @classmethod
    def obstacle(cls, module: Any) -> str | None:  # noqa: ANN401
        """Return what state of the experts is in the way, or ``None`` if they can be patched."""
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            return "accelerate offloads it; load the model without offloading (device_map)"
        return super().obstacle(module) or weights_obstacle(module.parameters())

    @classmethod
    def description(cls, module: Any) -> str:  # noqa: ANN401
        """Return what a module is, in a few words."""
        return f"{type(module).__name__}, {module.down_proj.shape[0]} experts"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the mixture (T, d_model) of the chosen experts."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


def _is_gated(experts: Any) -> bool:  # noqa: ANN401
    return hasattr(experts, "gate_up_proj")


def _foreign(experts: Any) -> str | None:  # noqa: ANN401
    """Return what experts compute that ``expert_ffn`` does not, or ``None``."""
    if experts.is_transposed or not getattr(experts, "is_concatenated", True):
        return "its weights are transposed or interleaved, which no kernel here reads"
    apply_gate = getattr(type(experts), "_apply_gate", None)
    own_gate = getattr(apply_gate, "__name__", DEFAULT_GATE) != DEFAULT_GATE
    if own_gate or getattr(experts, "has_post_expert_norm", False):
        return "it has a gate or a norm of its own, which no kernel here computes"
    if activation_of(experts.act_fn) is None:
        return f"its activation is {type(experts.act_fn).__name__}, which no kernel here computes"
    return None
