"""Bring expert rows back to token order, weighted by their gates."""

from typing import Any

import torch
from torch import Tensor

from moe_mt.errors import ConfigError
from moe_mt.ops.backend import register_op, use_triton

__all__ = ["combine", "combine_eager", "dtype_of"]


def combine(
    expert_rows: Tensor, rows: Tensor, gates: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Compute ``out[t] = residual[t] + sum_k gates[t, k] * expert_rows[rows[t, k]]``.

    Summed over k in order, then added to the residual, all in float32 (float64 for float64 rows)
    and rounded once, so that the result is the same every time and does not depend on what else
    stands in the batch.

    A gate of exactly zero means that its claim was dropped or masked: its row is not read, because
    nobody may have written it. For the same reason the gradient of such a gate is zero, not the
    product with its row.

    Args:
        expert_rows: (N, d_model), rows in expert order.
        rows: (T, K) int64, from ``expert_order``: the row of each claim. No row stands twice.
        gates: (T, K) float; zero where a claim was dropped.
        residual: (T, d_model) or ``None``.

    Returns:
        (T, d_model) in the dtype of ``expert_rows``, or what it and the residual's promote to.

    Raises:
        ConfigError: If shapes do not fit together.

    Source: NLLB Team, arXiv:2207.04672, section 6.2; GShard, arXiv:2006.16668, section 2.2.
    """
    _check(expert_rows, rows, gates, residual)
    if use_triton(expert_rows):
        return _combine(expert_rows, rows, gates, residual)
    return combine_eager(expert_rows, rows, gates, residual)


def combine_eager(
    expert_rows: Tensor, rows: Tensor, gates: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Define ``combine``: one gather for each choice, summed in order."""
    wide = torch.promote_types(expert_rows.dtype, torch.float32)
    gates = gates.to(wide)
    masked = gates == 0
    # A pass over all rows that most calls can do without; a compiler cannot look at values.
    if not torch.compiler.is_compiling() and not masked.any():
        masked = None
    out = _gather(expert_rows, rows, masked, 0).to(wide) * gates[:, :1]
    for k in range(1, rows.shape[1]):
        # In place: nothing that autograd keeps is written to.
        out.addcmul_(_gather(expert_rows, rows, masked, k).to(wide), gates[:, k, None])
    if residual is not None:
        out = residual.to(wide) + out
    return out.to(dtype_of(expert_rows, residual))


def _gather(expert_rows: Tensor, rows: Tensor, masked: Tensor | None, k: int) -> Tensor:
    """Return the row of every token's choice ``k``, zero where it is masked."""
    gathered = expert_rows[rows[:, k]]
    return gathered if masked is None else gathered.masked_fill_(masked[:, k, None], 0)


def dtype_of(expert_rows: Tensor, residual: Tensor | None) -> torch.dtype:
    """Return the dtype of a mixture: that of its rows, or a wider one of the residual."""
    if residual is None:
        return expert_rows.dtype
    return torch.promote_types(expert_rows.dtype, residual.dtype)


def _check(expert_rows: Tensor, rows: Tensor, gates: Tensor, residual: Tensor | None) -> None:
    if rows.dim() != 2 or gates.shape != rows.shape:
        raise ConfigError(
            f"rows are {tuple(rows.shape)} and gates {tuple(gates.shape)}; both must be (T, K)"
        )
    if expert_rows.dim() != 2:
        raise ConfigError(f"expert rows are {tuple(expert_rows.shape)}; they must be (N, d_model)")
    if residual is not None and residual.shape != (rows.shape[0], expert_rows.shape[1]):
        raise ConfigError(
            f"the residual is {tuple(residual.shape)}; {rows.shape[0]} tokens of width "
            f"{expert_rows.shape[1]} need ({rows.shape[0]}, {expert_rows.shape[1]})"
        )


def _launch(expert_rows: Tensor, rows: Tensor, gates: Tensor, residual: Tensor | None) -> Tensor:
    from moe_mt.kernels import combine as kernels

    return kernels.combine(expert_rows, rows, gates, residual)


def _fake(expert_rows: Tensor, rows: Tensor, gates: Tensor, residual: Tensor | None) -> Tensor:
    dtype = dtype_of(expert_rows, residual)
    return expert_rows.new_empty(rows.shape[0], expert_rows.shape[1], dtype=dtype)


def _launch_backward(
    grad: Tensor, expert_rows: Tensor, rows: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    from moe_mt.kernels import combine as kernels

    return kernels.combine_backward(grad, expert_rows, rows, gates)


def _fake_backward(
    grad: Tensor, expert_rows: Tensor, rows: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    return expert_rows.new_empty(expert_rows.shape), gates.new_empty(gates.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    expert_rows, rows, gates, residual = inputs
    ctx.save_for_backward(expert_rows, rows, gates)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    expert_rows, rows, gates = ctx.saved_tensors
    rows_grad = gates_grad = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        rows_grad, gates_grad = _combine_backward(grad, expert_rows, rows, gates)
    residual_grad = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return rows_grad, None, gates_grad, residual_grad


_combine_backward = register_op(
    "combine_backward(Tensor grad, Tensor expert_rows, Tensor rows, Tensor gates)"
    " -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
_combine = register_op(
    "combine(Tensor expert_rows, Tensor rows, Tensor gates, Tensor? residual) -> Tensor",
    _launch,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)
