"""Each expert's feed-forward network on the rows that chose it."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.errors import ConfigError

__all__ = ["ACTIVATIONS", "expert_ffn"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def expert_ffn(
    x: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    activation_dropout: float = 0.0,
) -> Tensor:
    """Compute ``activation(x W_up^T + b_up) W_down^T + b_down`` per expert, in expert order.

    Rows are gathered expert by expert, so that neither a copy of all rows (but where their gradient
    is asked for) nor one of any weight is made, and experts without rows are not touched.

    Args:
        x: (T, d_model). One row per token.
        up_proj: (E, ffn_dim, d_model). First weight of every expert.
        down_proj: (E, d_model, ffn_dim). Second weight of every expert.
        order: (N,) int64, from ``permute``: the claim ``t * K + k`` at each row.
        offsets: (E + 1,) int64, from ``permute``: which rows belong to which expert.
        up_bias: (E, ffn_dim) or ``None``.
        down_bias: (E, d_model) or ``None``.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        activation_dropout: Dropout probability after the activation; 0 outside training.

    Returns:
        (N, d_model) in the dtype of ``x``; rows of dropped claims are zero.

    Raises:
        ConfigError: If the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is unknown; choose from {list(ACTIVATIONS)}")
    act = ACTIVATIONS[activation]
    num_experts = up_proj.shape[0]
    top_k = order.numel() // max(x.shape[0], 1)
    tokens = order // max(top_k, 1)
    bounds = list(pairwise(cast(list[int], offsets.tolist())))  # pyright: ignore
    # unbind, not indexing: its gradient is one stack, not a full-size sum for every expert.
    weights = zip(
        up_proj.unbind(0),
        down_proj.unbind(0),
        up_bias.unbind(0) if up_bias is not None else [None] * num_experts,
        down_bias.unbind(0) if down_bias is not None else [None] * num_experts,
        strict=True,
    )
    pieces: list[Tensor] = []
    rows = _rows_by_expert(x, tokens, bounds)
    for inputs, (up, down, b_up, b_down) in zip(rows, weights, strict=True):
        if inputs.shape[0] == 0:
            continue
        hidden = act(functional.linear(inputs, up, b_up))
        if activation_dropout > 0:
            hidden = functional.dropout(hidden, activation_dropout)
        pieces.append(functional.linear(hidden, down, b_down))
    pieces.append(x.new_zeros(order.numel() - bounds[-1][1], x.shape[1]))
    return torch.cat(pieces)


def _rows_by_expert(x: Tensor, tokens: Tensor, bounds: list[tuple[int, int]]) -> Iterable[Tensor]:
    """Return the rows of ``x`` that each expert reads."""
    if torch.is_grad_enabled() and x.requires_grad:
        # All at once: the gradient of each gather is as large as x, whatever it gathers.
        return torch.split(x[tokens[: bounds[-1][1]]], [stop - start for start, stop in bounds])
    return (x[tokens[start:stop]] if start < stop else x[:0] for start, stop in bounds)
