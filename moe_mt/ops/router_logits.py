"""Score every expert for every token."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op, use_triton

__all__ = ["router_logits", "router_logits_eager"]


def router_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return ``x @ weight.T + bias``, computed in ``dtype`` whatever the inputs are stored in.

    In float32 the result is as exact as a float32 product of the inputs as they are: rounding the
    weights to bfloat16 flips one choice of experts in five hundred. The kernel computes float32
    only; other dtypes take the definition on every device.

    Args:
        x: (T, d_model), any float dtype. Rows may be strided.
        weight: (E, d_model), any float dtype.
        bias: (E,), any float dtype, or ``None``.
        dtype: Precision of the products, of their sums and of the result.

    Returns:
        (T, E) in ``dtype``.

    Raises:
        ConfigError: If shapes do not fit together.

    Source: NLLB Team, arXiv:2207.04672, section 6.2. Splitting a float32 factor into bfloat16
    terms: Henry, Tang and Heinecke, arXiv:1904.06376, section II.
    """
    _check(x, weight, bias)
    if use_triton(x) and dtype == torch.float32:
        return _router_logits(x, weight, bias)
    return router_logits_eager(x, weight, bias, dtype=dtype)


def router_logits_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Define ``router_logits``."""
    logits = functional.linear(x.to(dtype), weight.to(dtype))
    return logits if bias is None else logits + bias.to(dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            "they must be (T, d_model) and (E, d_model)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"bias is {tuple(bias.shape)}; it must be {tuple(weight.shape[:1])}")


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from moe_mt.kernels import router_logits as kernels

    return kernels.router_logits(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ANN401
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    # A backward pass may run inside autocast, which would round these products.
    with torch.autocast("cpu" if grad.is_meta else grad.device.type, enabled=False):
        return (
            (grad @ weight.float()).to(x.dtype) if needs_x else None,
            (grad.T @ x.float()).to(weight.dtype) if needs_weight else None,
            grad.sum(0).to(ctx.bias_dtype) if needs_bias else None,
        )


_router_logits = register_op(
    "router_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_save,
)
