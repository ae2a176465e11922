"""Put the rows of tokens into expert order."""

from typing import Any

from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op, use_triton

__all__ = ["permute", "permute_eager"]


def permute(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    """Compute ``out[r] = x[order[r] // K]``: every claim's token, in expert order.

    Rows of dropped claims stand last and hold their tokens too. The gradient of a token is the sum
    over its ``K`` rows, in order and in float32, rounded once.

    Args:
        x: (T, d_model). One row per token; any strides.
        order: (N,) int64, from ``expert_order``: the claim ``t * K + k`` at each row.
        rows: (T, K) int64, from ``expert_order``: the row of each claim.

    Returns:
        (N, d_model) in the dtype of ``x``.

    Raises:
        ConfigError: If shapes do not fit together.

    Source: permutation of MegaBlocks, arXiv:2211.15841, section 5.2.
    """
    _check(x, order, rows)
    if use_triton(x):
        return _permute(x, order, rows)
    return permute_eager(x, order, rows)


def permute_eager(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    """Define ``permute``: each token once for each of its claims, then gathered."""
    tokens, top_k = rows.shape
    # Not x[order // K], whose gradient is summed and rounded row by row.
    claims = x[:, None].expand(tokens, top_k, x.shape[1]).reshape(tokens * top_k, x.shape[1])
    return claims[order]


def _check(x: Tensor, order: Tensor, rows: Tensor) -> None:
    if x.dim() != 2 or rows.dim() != 2 or x.shape[0] != rows.shape[0]:
        raise ConfigError(
            f"x is {tuple(x.shape)} and rows {tuple(rows.shape)}; they must be (T, d_model) and "
            "(T, K)"
        )
    if order.shape != (rows.shape[0] * rows.shape[1],):
        raise ConfigError(
            f"the order is {tuple(order.shape)}; rows {tuple(rows.shape)} need "
            f"({rows.shape[0] * rows.shape[1]},)"
        )


def _launch(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    from moe_mt.kernels import permute as kernels

    return kernels.permute(x, order, rows.shape[1])


def _fake(x: Tensor, order: Tensor, rows: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _launch_backward(grad: Tensor, rows: Tensor) -> Tensor:
    from moe_mt.kernels import combine as kernels

    return kernels.combine(grad, rows, None, None)


def _fake_backward(grad: Tensor, rows: Tensor) -> Tensor:
    return grad.new_empty(rows.shape[0], grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    (rows,) = ctx.saved_tensors
    return _permute_backward(grad, rows), None, None


_permute_backward = register_op(
    "permute_backward(Tensor grad, Tensor rows) -> Tensor", _launch_backward, _fake_backward
)
_permute = register_op(
    "permute(Tensor x, Tensor order, Tensor rows) -> Tensor",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
