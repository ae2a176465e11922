"""The gated mixture of expert FFNs: which kernels run, forward and backward.

Few tokens take the decode path, which needs no order; all others are put into expert order. The
backward pass keeps neither the experts' outputs nor any row in expert order beside the hidden ones
(the identity for the gates' gradient is that of SonicMoE, arXiv:2512.14080).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_mt.kernels._launch import inner_contiguous
from moe_mt.kernels.combine import combine, combine_grad
from moe_mt.kernels.expert_ffn.decode import expert_ffn_decode
from moe_mt.kernels.expert_ffn.grouped import hidden_grad, hidden_rows
from moe_mt.kernels.expert_order import expert_order
from moe_mt.kernels.grouped_mm import (
    grouped_mm,
    grouped_mm_grad_input,
    grouped_mm_grad_weight,
)

__all__ = [
    "Needed",
    "Saved",
    "Weights",
    "expert_ffn",
    "expert_ffn_backward",
    "expert_ffn_forward",
    "weights_of",
]

DECODE_CLAIMS = 16
"""Most claims of a call that takes the decode path, if there are as many experts: each claim
streams its expert's weights for itself. 16 random claims on 128 experts share 6 % of them."""


class Weights(NamedTuple):
    """The weights of all experts; shapes as ``moe_mt.ops.expert_ffn`` takes them."""

    up_proj: Tensor
    down_proj: Tensor
    gate_proj: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None


def weights_of(tensors: Iterable[Tensor | None]) -> Weights:
    """Return the weights, in the order of ``Weights``, laid out as kernels read them."""
    return Weights(*(t if t is None else inner_contiguous(t) for t in tensors))  # pyright: ignore


class Saved(NamedTuple):
    """What a backward pass needs of the forward one."""

    order: Tensor
    rows: Tensor
    offsets: Tensor
    hidden: Tensor | None
    up: Tensor | None
    gate: Tensor | None


def expert_ffn(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    weights: Weights,
    *,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """Return the mixture (T, d_model) where no gradient is wanted."""
    claims, num_experts = expert_ids.numel(), weights.up_proj.shape[0]
    if x.shape[0] <= 1 or claims <= min(DECODE_CLAIMS, num_experts):
        return expert_ffn_decode(
            x, expert_ids, gates, *weights, activation=activation, residual=residual
        )
    options = {"activation": activation, "residual": residual, "save": False}
    return expert_ffn_forward(x, expert_ids, gates, weights, **options)[0]


def expert_ffn_forward(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    weights: Weights,
    *,
    activation: str,
    residual: Tensor | None,
    save: bool = True,
) -> tuple[Tensor, Saved]:
    """Return the mixture (T, d_model) and what its backward pass needs."""
    order, rows, offsets = expert_order(expert_ids, weights.up_proj.shape[0])
    gates = _gates_of_kept(gates, expert_ids, weights)
    hidden, saved_up, saved_gate = hidden_rows(
        x,
        order,
        offsets,
        weights.up_proj,
        weights.gate_proj,
        weights.up_bias,
        weights.gate_bias,
        activation=activation,
        save=save,
    )
    expert_rows = grouped_mm(hidden, weights.down_proj, offsets, weights.down_bias)
    out = combine(expert_rows, rows, gates, residual)
    kept = None if saved_up is not None else hidden
    return out, Saved(order, rows, offsets, kept, saved_up, saved_gate)


class Needed(NamedTuple):
    """Which gradients are wanted; a weight's brings its bias's along."""

    x: bool
    up: bool
    gate: bool
    down: bool


def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    weights: Weights,
    saved: Saved,
    needed: Needed,
    *,
    activation: str,
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """Return the gradients of ``x``, of the gates and of ``Weights``; ``None`` where not needed.

    Args:
        grad: (T, d_model), of the mixture, contiguous.
        x: (T, d_model), as in the forward pass.
        expert_ids: (T, K) int32.
        gates: (T, K) float32.
        weights: As in the forward pass.
        saved: From the forward pass.
        needed: Which gradients are wanted.
        activation: As in the forward pass.
    """
    gates = _gates_of_kept(gates, expert_ids, weights)
    hidden = saved.hidden
    if hidden is None:
        assert saved.up is not None
        hidden = torch.empty_like(saved.up)
    grad_up, grad_gate, partials = hidden_grad(
        grad,
        saved.order,
        saved.offsets,
        gates,
        weights.down_proj,
        hidden,
        saved.up,
        saved.gate,
        activation=activation,
    )
    grad_rows, grad_gates = combine_grad(
        grad, saved.rows, gates, expert_ids, weights.down_bias, partials
    )
    shared = {"offsets": saved.offsets, "weight_dtype": weights.up_proj.dtype}
    gathered = {"order": saved.order, "top_k": gates.shape[1], **shared}
    up = gate = down = (None, None)
    if needed.down:
        bias = weights.down_bias is not None
        down = grouped_mm_grad_weight(grad_rows, hidden, bias=bias, **shared)
    if needed.up:
        up = grouped_mm_grad_weight(grad_up, x, bias=weights.up_bias is not None, **gathered)
    if needed.gate and grad_gate is not None:
        bias = weights.gate_bias is not None
        gate = grouped_mm_grad_weight(grad_gate, x, bias=bias, **gathered)
    grad_x = None
    if needed.x:
        second = None
        if grad_gate is not None:
            assert weights.gate_proj is not None
            second = (grad_gate, weights.gate_proj)
        rows = grouped_mm_grad_input(grad_up, weights.up_proj, saved.offsets, second=second)
        # Each row counts once, but those of dropped claims, which nobody wrote.
        ones = _gates_of_kept(torch.ones_like(gates), expert_ids, weights)
        grad_x = combine(rows, saved.rows, ones, None)
    return grad_x, grad_gates, [up[0], down[0], gate[0], up[1], gate[1], down[1]]


def _gates_of_kept(gates: Tensor, expert_ids: Tensor, weights: Weights) -> Tensor:
    """Return gates that are zero for dropped claims, whatever they were: their rows are empty."""
    return gates.masked_fill(expert_ids >= weights.up_proj.shape[0], 0)
