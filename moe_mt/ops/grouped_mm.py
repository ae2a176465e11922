"""Multiply each expert's rows by its weight."""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op, use_triton

__all__ = ["grouped_mm", "grouped_mm_eager"]


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Compute ``out[r] = x[r] weight[e]^T + bias[e]`` for every row ``r`` of every expert ``e``.

    Args:
        x: (N, in), rows in expert order, from ``permute``.
        weight: (E, out, in), stacked; any strides with the last one 1, so that halves of a fused
            weight need no copy.
        offsets: (E + 1,) int64, from ``expert_order``: expert ``e`` owns rows ``offsets[e]`` to
            ``offsets[e + 1]``.
        bias: (E, out) or ``None``.

    Returns:
        (N, out) in the dtype of ``x``, summed in float32; rows past the last offset are zero.

    Raises:
        ConfigError: If shapes or dtypes do not fit together.

    Source: the grouped product of MegaBlocks, arXiv:2211.15841, section 5, without its padding.
    """
    _check(x, weight, offsets, bias)
    if use_triton(x):
        return _grouped_mm(x, weight, offsets, bias)
    return grouped_mm_eager(x, weight, offsets, bias=bias)


def grouped_mm_eager(
    x: Tensor, weight: Tensor, offsets: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """Define ``grouped_mm``: a linear map for each expert that has rows."""
    bounds = cast(list[int], offsets.tolist())  # pyright: ignore
    kept = bounds[-1]
    sizes = [stop - start for start, stop in pairwise(bounds)]
    biases = bias.unbind(0) if bias is not None else [None] * len(sizes)
    # unbind, not indexing: its gradient is one stack, not a full-size sum for every expert.
    experts = zip(torch.split(x[:kept], sizes), weight.unbind(0), biases, strict=True)
    pieces = [functional.linear(rows, w, b) for rows, w, b in experts if rows.shape[0] > 0]
    return torch.cat([*pieces, x.new_zeros(x.shape[0] - kept, weight.shape[1])])


def _check(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 3 or x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ConfigError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be (N, in) and (E, out, in)"
        )
    if offsets.shape != (weight.shape[0] + 1,):
        raise ConfigError(
            f"offsets are {tuple(offsets.shape)}; {weight.shape[0]} experts need one more than that"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ConfigError(f"bias is {tuple(bias.shape)}; it must be {tuple(weight.shape[:2])}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ConfigError(f"x is {x.dtype} and weight {weight.dtype}; they must be of one dtype")


def _launch(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    from moe_mt.kernels import grouped_mm as kernels

    out = x.new_zeros(x.shape[0], weight.shape[1])
    return kernels.grouped_mm(x, weight, offsets, bias, out=out)


def _fake(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from moe_mt.kernels import grouped_mm as kernels

    grad_x = kernels.grouped_mm_grad_input(grad, weight, offsets, out=x.new_zeros(x.shape))
    grad_weight, grad_bias = kernels.grouped_mm_grad_weight(
        grad, x, offsets, weight_dtype=weight.dtype, bias=bias
    )
    return grad_x, grad_weight, grad.new_empty(0) if grad_bias is None else grad_bias


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias = x.new_empty(weight.shape[:2] if bias else 0)
    return x.new_empty(x.shape), x.new_empty(weight.shape), grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    x, weight, offsets, bias = inputs
    ctx.save_for_backward(x, weight, offsets)
    ctx.bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, weight, offsets = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _grouped_mm_backward(grad, x, weight, offsets, ctx.bias)
    return grad_x, grad_weight, None, grad_bias if ctx.bias else None


_grouped_mm_backward = register_op(
    "grouped_mm_backward(Tensor grad, Tensor x, Tensor weight, Tensor offsets, bool bias)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
_grouped_mm = register_op(
    "grouped_mm(Tensor x, Tensor weight, Tensor offsets, Tensor? bias) -> Tensor",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
